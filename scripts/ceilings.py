"""Measures the limits of the machine: matmuls, copies, and the images of one data worker.

    python scripts/ceilings.py --device cuda

Takes about ten seconds and prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from training_rows import write_images

from qwenvl_lit.models.qwen_vl.image_processing import resize_image
from qwenvl_lit.training.float8 import FP8, MIN_CAPABILITY, scaled_matmul

ROUNDS = 5


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of one `work()`: the median over rounds of `repeats` calls."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    rounds = []
    for _ in range(ROUNDS + 1):  # the first is warm-up
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize()
        rounds.append((time.perf_counter() - start) / repeats)
    return statistics.median(rounds[1:])


def matmul_tflops(device: torch.device, size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device, 20) / 1e12


def fp8_tflops(device: torch.device, size: int) -> float | None:
    """As `matmul_tflops` in FP8; None if the device has no FP8 matmuls."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return None
    a, b = (torch.randn(size, size, device=device).to(FP8) for _ in range(2))
    scale = torch.ones((), device=device)
    seconds = seconds_of(lambda: scaled_matmul(a, scale, b, scale, torch.bfloat16), device, 20)
    return 2 * size**3 / seconds / 1e12


def copy_gb_per_second(device: torch.device, megabytes: int) -> float:
    """Bytes that a copy on the device reads and writes per second, in 1e9."""
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), device, 10) / 1e9


def upload_gb_per_second(device: torch.device, megabytes: int) -> float | None:
    """Copies from page-locked memory to the GPU; None if there is no GPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    seconds = seconds_of(lambda: target.copy_(source, non_blocking=True), device, 10)
    return source.numel() / seconds / 1e9


def images_per_second(side: int) -> float:
    """JPEG files of 640 x 480 that one worker decodes and resizes to `side` per second."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in write_images(Path(folder), 32)]

        def read() -> None:
            for file in files:
                with Image.open(file) as image:
                    resize_image(image, side)

        return len(files) / seconds_of(read, torch.device("cpu"), 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    size, megabytes = (8192, 1024) if on_gpu else (512, 16)
    torch.set_num_threads(torch.get_num_threads() if on_gpu else 1)
    measured = {
        "matmul_size": size,
        "matmul_tflops": matmul_tflops(device, size, torch.bfloat16 if on_gpu else torch.float32),
        "fp8_matmul_tflops": fp8_tflops(device, size),
        "copy_gb_per_second": copy_gb_per_second(device, megabytes),
        "upload_gb_per_second": upload_gb_per_second(device, megabytes),
        "images_per_second_of_a_worker": images_per_second(448),
    }
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__,
    }
    for name, value in measured.items():
        result[name] = round(value, 3) if isinstance(value, float) else value
    print(json.dumps(result))


if __name__ == "__main__":
    main()
