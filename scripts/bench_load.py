"""Measures how long a full-size checkpoint takes to load, with how much host memory.

    python scripts/bench_load.py --folder /tmp/random-qwen-vl --record benchmarks/load.json

A first forward pass and 20 greedy steps are timed too. Writes random weights in the published
layout to FOLDER if there are none (19.3 GB). A fresh process loads each format, once from the disk
and once from the page cache, as `VisionLanguageModule.configure_model` does it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from records import write_record

from qwenvl_lit.runs.versions import versions

GiB = 2**30


def measure(folder: Path, device: str, dtype: str, steps: int) -> dict[str, float | str]:
    """Loads a checkpoint, and runs forward passes and greedy steps."""
    import torch

    from qwenvl_lit.generation.generation import Generation
    from qwenvl_lit.models.qwen_vl.family import QwenVLFamily

    on_gpu = device.startswith("cuda")
    torch.ones(1, device=device)  # the device's context is not part of loading
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    anonymous = Peak("RssAnon")
    start = time.perf_counter()
    with anonymous:
        family = QwenVLFamily(path=str(folder), dtype=dtype)
        model = family.load(device)
        if on_gpu:
            torch.cuda.synchronize()
    measured: dict[str, float | str] = {
        "load_s": time.perf_counter() - start,
        "host_gib_before": before / GiB,
        "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GiB,
        "host_peak_without_mapped_files_gib": anonymous.bytes / GiB,
        "parameters": model.num_parameters(),
    }
    if on_gpu:
        measured["gpu_after_load_gib"] = torch.cuda.max_memory_allocated() / GiB

    inputs = prompt(model.config, device)
    greedy = Generation(max_new_tokens=steps, min_new_tokens=steps)
    with torch.inference_mode():
        for name in ("first_forward_s", "forward_s"):
            start = time.perf_counter()
            logits = model(**inputs, use_cache=False).logits
            assert logits.isfinite().all(), "the forward pass gave logits that are not finite"
            measured[name] = time.perf_counter() - start
    for name in ("first_greedy_s", "greedy_s"):
        start = time.perf_counter()
        [answer] = greedy(model, inputs, stop_ids=(model.config.vocab_size - 1,), pad_id=0)
        assert len(answer) == steps
        measured[name] = time.perf_counter() - start
    tokens = inputs["input_ids"].shape[1]
    measured |= {"prompt_tokens": tokens, "new_tokens": steps, "torch": torch.__version__}
    if on_gpu:
        measured["gpu_peak_gib"] = torch.cuda.max_memory_allocated() / GiB
    return measured


def prompt(config: Any, device: str) -> dict[str, Any]:
    """Returns the arguments of `forward` for 3 tokens, an image of noise, and 39 tokens."""
    import torch

    start_id, size = config.visual["image_start_id"], config.visual["image_size"]
    image = [start_id, *[start_id + 2] * config.n_queries, start_id + 1]
    ids = [1, 2, 3, *image, *range(10, 49)]
    return {
        "input_ids": torch.tensor([ids], device=device),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64, device=device),
        "pixel_values": torch.randn(1, 3, size, size, device=device),
        "vision_positions": torch.arange(4, 4 + config.n_queries, device=device),
    }


class Peak:
    """The largest value of a line of /proc/self/status in a context, sampled every 10 ms."""

    def __init__(self, line: str):
        self.line, self.bytes, self._on = line, 0, False

    def __enter__(self):
        self._on, self._thread = True, threading.Thread(target=self._sample)
        self._thread.start()

    def __exit__(self, *_):
        self._on = False
        self._thread.join()

    def _sample(self) -> None:
        while self._on:
            status = Path("/proc/self/status").read_text()
            self.bytes = max(self.bytes, int(status.split(f"{self.line}:")[1].split()[0]) * 1024)
            time.sleep(0.01)


def forget(folder: Path) -> None:
    """Drops the files of a folder from the page cache."""
    os.sync()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def make_checkpoint(folder: Path, size: str, kind: str, device: str) -> None:
    """Writes random weights with `make_checkpoint.py`, in a process that ends afterwards."""
    script = Path(__file__).with_name("make_checkpoint.py")
    options = ["--size", size, "--format", kind, "--device", device.split(":")[0]]
    subprocess.run([sys.executable, script, folder, *options], check=True)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Rounds the measured values of a row to three decimals."""
    values = dict(row)
    for key, value in row.items():
        if isinstance(value, float):
            values[key] = round(value, 3)
    return values


def device_name(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="where the checkpoints are, or are written to: FOLDER/bin, ...",
    )
    parser.add_argument("--formats", nargs="+", default=["bin", "safetensors"])
    parser.add_argument("--size", default="full", help='"small" to try this script')
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--record", type=Path)
    # Used by the processes that measure: FOLDER is the checkpoint itself.
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device, dtype, steps = arguments.device, arguments.dtype, arguments.steps
    if arguments.one:
        print(json.dumps(measure(arguments.folder, device, dtype, steps)))
        return
    results = []
    for kind in arguments.formats:
        folder = arguments.folder / kind
        if not folder.exists():
            make_checkpoint(folder, arguments.size, kind, device)
        for source in ("disk", "page cache"):
            if source == "disk":
                forget(folder)
            command = [sys.executable, __file__, "--one", "--folder", folder]
            command += ["--device", device, "--dtype", dtype, "--steps", str(steps)]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = {
                "format": kind,
                "from": source,
                "checkpoint_gib": size_of(folder) / GiB,
                "largest_shard_gib": max(file.stat().st_size for file in folder.iterdir()) / GiB,
                **json.loads(printed.splitlines()[-1]),
            }
            row["host_peak_above_one_shard_gib"] = row["host_peak_gib"] - row["largest_shard_gib"]
            results.append(rounded(row))
            print(json.dumps(results[-1]), flush=True)
    if arguments.record:
        options = f"--size {arguments.size} --device {device} --dtype {dtype}"
        record = {
            "command": f"python scripts/bench_load.py {options}",
            "device": device_name(device),
            "versions": versions(),
            "note": "one process a row; load_s does not include imports and the device's context; "
            "first_... includes the warm-up",
            "results": results,
        }
        write_record(arguments.record, record)


if __name__ == "__main__":
    main()
