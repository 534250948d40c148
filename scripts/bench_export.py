"""Measures the time and host memory of merging an adapter into a full-size checkpoint.

    python scripts/bench_export.py --folder /tmp/random-qwen-vl --record benchmarks/export.json

Writes a full model of random weights (19.3 GB) and an adapter of noise to FOLDER if they
are not there, and the merged model (19.3 GB), which is removed again. A fresh process exports
without and with the comparison, each reading from the disk. The record is written after each row.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench_load import GiB, Peak, device_name, forget, make_checkpoint, rounded, size_of
from records import write_record

from qwenvl_lit.runs.versions import versions


def write_noise(folder: Path, base: Path, targets: str, rank: int) -> None:
    """Writes an adapter folder whose adapter changes the model that it is merged into."""
    import torch

    from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
    from qwenvl_lit.training.adapters.methods import LoRA

    family = QwenVLFamily(path=str(base), dtype="bfloat16")
    adapter = LoRA(rank=rank, alpha=4 * rank, dropout=0.0, targets=targets)
    adapted = adapter.apply(family.meta_model(), family)
    generator = torch.Generator().manual_seed(0)
    noise: dict[str, torch.Tensor] = {}
    for name, tensor in adapted.named_parameters():
        if tensor.requires_grad:
            noise[name] = torch.randn(tensor.shape, generator=generator) / 1000
    adapted.load_state_dict(noise, strict=False, assign=True)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder, state_dict=noise, save_embedding_layers=False)


def measure(arguments: list[str]) -> dict[str, float]:
    """Exports with these command-line arguments; the time does not include the imports."""
    import torch

    from qwenvl_lit import export
    from qwenvl_lit.cli.command import command

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.argv[1:] = arguments
    anonymous = Peak("RssAnon")
    start = time.perf_counter()
    with anonymous:
        command("export", export.main, run="needed")
    measured = {
        "seconds": time.perf_counter() - start,
        "host_gib_before": before / GiB,
        "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GiB,
        "host_peak_without_mapped_files_gib": anonymous.bytes / GiB,
    }
    if torch.cuda.is_available():
        measured["gpu_peak_gib"] = torch.cuda.max_memory_allocated() / GiB
    return measured


def comparison_in(printed: str) -> str:
    """Returns what an export prints about the comparison: the line after "Wrote ..."."""
    lines = printed.splitlines()
    return lines[next(number for number, line in enumerate(lines, 1) if line.startswith("Wrote "))]


def record_results(arguments: argparse.Namespace, results: list[dict[str, float | str]]) -> None:
    command = "python scripts/bench_export.py"
    for name in ("size", "device", "format"):
        command += f" --{name} {getattr(arguments, name)}"
    adapter = f"an adapter of rank {arguments.rank} on {arguments.targets}"
    record = {
        "command": command,
        "device": device_name(arguments.device),
        "versions": versions(),
        "note": f"{adapter}; one process a row, imports not included",
        "results": results,
    }
    write_record(arguments.record, record)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="where base, adapter and merged model are, or are written to",
    )
    parser.add_argument("--size", default="full", help='"small" to try this script')
    parser.add_argument(
        "--device",
        default="cuda:0",
        help="where random weights are made and the models are compared",
    )
    formats = ("bin", "safetensors")
    parser.add_argument("--format", default="bin", choices=formats, help="of the base")
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--rank", type=int, default=8)
    modes = ("none", "sample")
    parser.add_argument("--compare", nargs="+", default=modes, choices=modes, help="a row each")
    parser.add_argument("--record", type=Path)
    # Used by the processes that measure: the arguments of the export.
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    folder = arguments.folder.resolve()
    base, adapter, merged = folder / arguments.format, folder / "adapter", folder / "merged"
    if not base.exists():
        make_checkpoint(base, arguments.size, arguments.format, arguments.device)
    if not adapter.exists():
        write_noise(adapter, base, arguments.targets, arguments.rank)
    results = []
    for compare in arguments.compare:
        forget(base)
        command = [sys.executable, __file__, "--folder", folder, "--one"]
        command += [f"ckpt={adapter}", f"out={merged}", f"compare={compare}"]
        command += [f"device={arguments.device}", f"hydra.run.dir={folder}"]
        command += ["hydra.output_subdir=null"]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        row = {
            "compare": compare,
            "checkpoint_gib": size_of(base) / GiB,
            "largest_shard_gib": max(file.stat().st_size for file in base.iterdir()) / GiB,
            **json.loads(printed.splitlines()[-1]),
            "comparison": comparison_in(printed),
        }
        results.append(rounded(row))
        print(json.dumps(results[-1]), flush=True)
        shutil.rmtree(merged)
        if arguments.record:
            record_results(arguments, results)


if __name__ == "__main__":
    main()
