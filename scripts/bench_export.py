"""How long a full-size checkpoint takes to be merged with an adapter, and how much host memory; the comparison apart.

    python scripts/bench_export.py --folder /tmp/random-qwen-vl --record benchmarks/export.json

Writes random weights in the published layout (19.3 GB) and an adapter of noise to FOLDER if they are not there, and the merged model
(19.3 GB), which is removed again. A fresh process each merges without and with the comparison, from the disk. The
record is written after each row.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench_load import GiB, Peak, forget


def write_noise(folder: Path, base: Path, targets: str, rank: int) -> None:
    """An adapter folder whose adapter changes what it is merged into."""
    import torch

    from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
    from qwenvl_lit.training.adapters.methods import LoRA

    family = QwenVLFamily(path=str(base), dtype="bfloat16")
    adapted = LoRA(rank=rank, alpha=4 * rank, dropout=0.0, targets=targets).apply(
        family.meta_model(), family
    )
    draw = torch.Generator().manual_seed(0)
    learned = {name: tensor for name, tensor in adapted.named_parameters() if tensor.requires_grad}
    noise = {
        name: torch.randn(tensor.shape, generator=draw) / 1000 for name, tensor in learned.items()
    }
    adapted.load_state_dict(noise, strict=False, assign=True)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder, state_dict=noise, save_embedding_layers=False)


def export(arguments: list[str]) -> dict[str, float | str]:
    """What one process measures, from its start to its end but for the imports."""
    import torch

    from qwenvl_lit import export as verb
    from qwenvl_lit.cli.command import command

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.argv[1:] = arguments
    anonymous = Peak("RssAnon")
    start = time.perf_counter()
    with anonymous:
        command("export", verb.main, needs_run=True)
    measured: dict[str, float | str] = {
        "seconds": time.perf_counter() - start,
        "host_gib_before": before / GiB,
        "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GiB,
        "host_peak_without_mapped_files_gib": anonymous.bytes / GiB,
    }
    if torch.cuda.is_available():
        measured["gpu_peak_gib"] = torch.cuda.max_memory_allocated() / GiB
    return measured


def said(printed: str) -> str:
    """What an export found out about what it wrote: the line below the one that says where that is."""
    lines = printed.splitlines()
    return lines[next(number for number, line in enumerate(lines, 1) if line.startswith("Wrote "))]


def write_record(arguments: argparse.Namespace, results: list[dict[str, float | str]]) -> None:
    import torch
    import transformers

    options = {name: getattr(arguments, name) for name in ("size", "device", "format")}
    on_gpu = arguments.device.startswith("cuda")
    record = {
        "command": " ".join(
            [
                "python scripts/bench_export.py",
                *(f"--{name} {value}" for name, value in options.items()),
            ]
        ),
        "device": torch.cuda.get_device_name()
        if on_gpu
        else platform.processor() or platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "note": f"an adapter of rank {arguments.rank} on {arguments.targets}; one process a row, imports apart",
        "results": results,
    }
    arguments.record.parent.mkdir(exist_ok=True)
    arguments.record.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="where base, adapter and the merged model are, or are written to",
    )
    parser.add_argument("--size", default="full", help="small, to try this script")
    parser.add_argument(
        "--device",
        default="cuda:0",
        help="where random weights are drawn and the models are compared",
    )
    parser.add_argument(
        "--format", default="bin", choices=("bin", "safetensors"), help="of the base"
    )
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--compare",
        nargs="+",
        default=("none", "sample"),
        choices=("none", "sample"),
        help="a row each",
    )
    parser.add_argument("--record", type=Path)
    parser.add_argument(
        "--one", nargs="+", help=argparse.SUPPRESS
    )  # a process that measures an export with these arguments
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(export(arguments.one)))
        return

    base, adapter, merged = (
        arguments.folder.resolve() / name for name in (arguments.format, "adapter", "merged")
    )
    if not base.exists():
        script = Path(__file__).with_name("make_checkpoint.py")
        options = [
            "--size",
            arguments.size,
            "--format",
            arguments.format,
            "--device",
            arguments.device.split(":")[0],
        ]
        subprocess.run([sys.executable, script, base, *options], check=True)
    if not adapter.exists():
        write_noise(adapter, base, arguments.targets, arguments.rank)
    largest = max(file.stat().st_size for file in base.iterdir())
    results = []
    for compare in arguments.compare:
        forget(base)
        overrides = [
            f"ckpt={adapter}",
            f"out={merged}",
            f"compare={compare}",
            f"device={arguments.device}",
            f"hydra.run.dir={arguments.folder.resolve()}",
        ]
        command = [
            sys.executable,
            __file__,
            "--folder",
            arguments.folder,
            "--one",
            *overrides,
            "hydra.output_subdir=null",
        ]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        row = {
            "compare": compare,
            "checkpoint_gib": sum(file.stat().st_size for file in base.iterdir()) / GiB,
        }
        row |= {
            "largest_shard_gib": largest / GiB,
            **json.loads(printed.splitlines()[-1]),
            "said": said(printed),
        }
        results.append(
            {
                key: round(value, 3) if isinstance(value, float) else value
                for key, value in row.items()
            }
        )
        print(json.dumps(results[-1]), flush=True)
        shutil.rmtree(merged)
        if arguments.record:
            write_record(arguments, results)


if __name__ == "__main__":
    main()
