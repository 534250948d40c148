"""How long a full-size checkpoint takes to load and how much host memory, and a first forward pass and 20 greedy steps with it.

    python scripts/bench_load.py --folder /tmp/random-qwen-vl --record benchmarks/load.json

Writes random weights in the published layout to FOLDER if there are none (19.3 GB). Each format is loaded by a fresh process, once from the
disk and once from the page cache, as `VisionLanguageModule.configure_model` does it.
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

GiB = 2**30


def load(folder: Path, device: str, dtype: str, steps: int) -> dict[str, float | str]:
    """What one process measures."""
    import torch

    from qwenvl_lit.generation.generation import Generation
    from qwenvl_lit.models.qwen_vl.family import QwenVLFamily

    on_gpu = device.startswith("cuda")
    torch.ones(1, device=device)  # the device's context is not part of a checkpoint
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

    span, visual = model.config.n_queries, model.config.visual
    ids = [
        1,
        2,
        3,
        visual["image_start_id"],
        *[visual["image_start_id"] + 2] * span,
        visual["image_start_id"] + 1,
        *range(10, 49),
    ]
    inputs = {
        "input_ids": torch.tensor([ids], device=device),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64, device=device),
        "pixel_values": torch.randn(
            1, 3, visual["image_size"], visual["image_size"], device=device
        ),
        "vision_positions": torch.arange(4, 4 + span, device=device),
    }
    greedy = Generation(max_new_tokens=steps, min_new_tokens=steps)
    with torch.inference_mode():
        for name in ("first_forward_s", "forward_s"):
            start = time.perf_counter()
            logits = model(**inputs, use_cache=False).logits
            assert logits.isfinite().all(), "the forward pass gave numbers that are not finite"
            measured[name] = time.perf_counter() - start
    for name in ("first_greedy_s", "greedy_s"):
        start = time.perf_counter()
        [answer] = greedy(model, inputs, stop_ids=(model.config.vocab_size - 1,), pad_id=0)
        assert len(answer) == steps
        measured[name] = time.perf_counter() - start
    measured |= {"prompt_tokens": len(ids), "new_tokens": steps, "torch": torch.__version__}
    if on_gpu:
        measured["gpu_peak_gib"] = torch.cuda.max_memory_allocated() / GiB
    return measured


class Peak:
    """The largest value of a line of /proc/self/status while the context lasts, looked at every 10 ms."""

    def __init__(self, line: str):
        self.line, self.bytes, self._on = line, 0, False

    def __enter__(self):
        self._on, self._thread = True, threading.Thread(target=self._look)
        self._thread.start()

    def __exit__(self, *_):
        self._on = False
        self._thread.join()

    def _look(self) -> None:
        while self._on:
            status = Path("/proc/self/status").read_text()
            self.bytes = max(self.bytes, int(status.split(f"{self.line}:")[1].split()[0]) * 1024)
            time.sleep(0.01)


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    os.sync()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
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
    parser.add_argument("--size", default="full", help="small, to try this script")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--record", type=Path)
    parser.add_argument(
        "--one", action="store_true", help=argparse.SUPPRESS
    )  # a process that measures FOLDER
    arguments = parser.parse_args()
    if arguments.one:
        print(
            json.dumps(load(arguments.folder, arguments.device, arguments.dtype, arguments.steps))
        )
        return

    import torch
    import transformers

    results = []
    for kind in arguments.formats:
        folder = arguments.folder / kind
        if not folder.exists():
            script = Path(__file__).with_name("make_checkpoint.py")
            options = [
                "--size",
                arguments.size,
                "--format",
                kind,
                "--device",
                arguments.device.split(":")[0],
            ]
            subprocess.run([sys.executable, script, folder, *options], check=True)
        largest = max(file.stat().st_size for file in folder.iterdir())
        for source in ("disk", "page cache"):
            if source == "disk":
                forget(folder)
            command = [
                sys.executable,
                __file__,
                "--one",
                "--folder",
                folder,
                "--device",
                arguments.device,
                "--dtype",
                arguments.dtype,
            ]
            command += ["--steps", str(arguments.steps)]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            size = sum(file.stat().st_size for file in folder.iterdir())
            row = {
                "format": kind,
                "from": source,
                "checkpoint_gib": size / GiB,
                "largest_shard_gib": largest / GiB,
            }
            row |= json.loads(printed.splitlines()[-1])
            row["host_peak_above_one_shard_gib"] = row["host_peak_gib"] - row["largest_shard_gib"]
            results.append(
                {
                    key: round(value, 3) if isinstance(value, float) else value
                    for key, value in row.items()
                }
            )
            print(json.dumps(results[-1]), flush=True)
    if arguments.record:
        on_gpu = arguments.device.startswith("cuda")
        record = {
            "command": f"python scripts/bench_load.py --size {arguments.size} --device {arguments.device} --dtype {arguments.dtype}",
            "device": torch.cuda.get_device_name()
            if on_gpu
            else platform.processor() or platform.machine(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "note": "one process a row; load_s has no import and no device context in it; `first_` has warm-up in it",
            "results": results,
        }
        arguments.record.parent.mkdir(exist_ok=True)
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
