"""What the machine can do at most, in about ten seconds: matrix products, copies, and images of one data worker. Prints json.

python scripts/ceilings.py --device cuda
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

from qwenvl_lit.models.qwen_vl.image_processing import resized

ROUNDS = 5


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of one `work()`: the median over rounds of `repeats`."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    rounds = []
    for _ in range(ROUNDS + 1):  # the first warms up
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        wait()
        rounds.append((time.perf_counter() - start) / repeats)
    return statistics.median(rounds[1:])


def matmul_tflops(device: torch.device, size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device, 20) / 1e12


def fp8_tflops(device: torch.device, size: int) -> float | None:
    """None where the device has no FP8."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return None
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    scaled = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return 2 * size**3 / seconds_of(lambda: torch._scaled_mm(a, b.t(), **scaled), device, 20) / 1e12


def copy_gb_per_second(device: torch.device, megabytes: int) -> float:
    """Read and written bytes of a copy on the device."""
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), device, 10) / 1e9


def upload_gb_per_second(device: torch.device, megabytes: int) -> float | None:
    """From page-locked memory to the device; None where there is no device."""
    if device.type != "cuda":
        return None
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return (
        source.numel()
        / seconds_of(lambda: target.copy_(source, non_blocking=True), device, 10)
        / 1e9
    )


def images_per_second(side: int) -> float:
    """JPEG files of 640 x 480 that one worker reads and brings to `side`."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in write_images(Path(folder), 32)]

        def read() -> None:
            for file in files:
                with Image.open(file) as image:
                    resized(image, side)

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
    found = {
        "matmul_size": size,
        "matmul_tflops": matmul_tflops(device, size, torch.bfloat16 if on_gpu else torch.float32),
        "fp8_matmul_tflops": fp8_tflops(device, size),
        "copy_gb_per_second": copy_gb_per_second(device, megabytes),
        "upload_gb_per_second": upload_gb_per_second(device, megabytes),
        "images_per_second_of_a_worker": images_per_second(448),
    }
    rounded = {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in found.items()
    }
    named = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__,
    }
    print(json.dumps({**named, **rounded}))


if __name__ == "__main__":
    main()
