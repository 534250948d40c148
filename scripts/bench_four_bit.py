"""Times matmuls with 4-bit weights on the shapes of Qwen-VL's blocks, against bf16.

    python scripts/bench_four_bit.py --record benchmarks/four_bit.json

Needs bitsandbytes. Takes a minute on a GPU, and several more for the kernels of torch.compile,
which `--kernels bf16 bitsandbytes fused fused_by_4 dequantize tinygemm` leaves out.
`--scale 4 --device cpu` tries the script without a GPU.

A kernel is timed as decoding runs it: in a CUDA graph, over so many copies of a weight that none is
found in the L2 cache. All kernels but `tinygemm` multiply with the same NF4 weights. `tinygemm`
shows the speed of torch's own 4-bit kernel, whose weights are evenly spaced: models would have
other weights than those that adapters were trained on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bench_data import cpu_name
from bitsandbytes import functional as bnb
from records import record_option, write_record
from torch.nn.functional import linear

from qwenvl_lit.models.dynamo import allow_recompilations
from qwenvl_lit.runs.versions import versions

# (outputs, inputs) of the linear layers of a block, and how many of them it has
SHAPES = {
    "attn.c_attn": (12288, 4096, 1),
    "attn.c_proj": (4096, 4096, 1),
    "mlp.w1, mlp.w2": (11008, 4096, 2),
    "mlp.c_proj": (4096, 11008, 1),
}
BLOCKS = 32
COPIES_BYTES = 512 * 2**20  # of copies of a weight; the L2 cache of an H200 has 60 MB
GROUP = 64  # weights per scale, for NF4 as for tinygemm
ROUNDS, REPLAYS = 5, 20
NOTE = (
    "us: microseconds of a matmul, median; block_us: of all linear layers of a block; ratio: the "
    "block_us of bf16 over this one; error: of the product with the bf16 weight, relative to its "
    "norm; best: for each shape the fastest kernel with NF4 weights"
)
EXACT = ("bitsandbytes", "fused", "fused_by_4", "dequantize", "compiled")  # kernels for NF4

# Makes a multiplication from a weight: inputs (M, K) -> outputs (M, N)
Multiply = Callable[[torch.Tensor], torch.Tensor]
Measured = dict[str, Any]


def plain(weight: torch.Tensor) -> Multiply:
    return lambda x: linear(x, weight)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, bnb.QuantState]:
    """Quantizes as the model's layers are quantized, see `quantization.NF4`."""
    return bnb.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4", compress_statistics=True)


def by_bitsandbytes(weight: torch.Tensor) -> Multiply:
    """The kernel that bitsandbytes chooses."""
    packed, state = quantize(weight)
    return lambda x: bitsandbytes.matmul_4bit(x, packed, state)


def fused(weight: torch.Tensor, rows: int | None = None) -> Multiply:
    """bitsandbytes' fused kernel for any number of rows, in passes of `rows` rows."""
    from bitsandbytes.backends.cuda.ops import _gemm_4bit_kernel_impl

    packed, state = quantize(weight)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        return _gemm_4bit_kernel_impl(
            x,
            packed,
            state.shape,
            state.state2.absmax,
            state.blocksize,
            state.quant_type,
            absmax_8bit=state.absmax,
            absmax_code=state.state2.code,
            absmax_offset=state.offset,
        )

    if rows is None:
        return multiply
    return lambda x: torch.cat([multiply(part) for part in x.split(rows)])


def dequantize(weight: torch.Tensor) -> Multiply:
    """Dequantizes the weight, with scales that are not quantized themselves, and multiplies."""
    packed, state = bnb.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4")
    return lambda x: linear(x, bnb.dequantize_4bit(packed, state))


def compiled(weight: torch.Tensor) -> Multiply:
    """torch.compile's kernel, which may dequantize while it multiplies."""
    packed, state = bnb.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4")
    outputs, inputs = weight.shape
    packed = packed.view(outputs, inputs // 2)
    scales = state.absmax.view(outputs, inputs // GROUP)
    multiply = compiled_function()
    return lambda x: multiply(x, packed, scales, state.code)


@cache
def compiled_function() -> Callable[..., torch.Tensor]:
    allow_recompilations(64)  # one for each shape and number of rows
    options = {"max_autotune": True, "prologue_fusion": True}
    return torch.compile(multiply_packed, dynamic=False, options=options)


def multiply_packed(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, code: torch.Tensor
) -> torch.Tensor:
    """Multiplies with weights (N, K / 2), two of them in a byte, the high bits first."""
    indices = torch.stack([packed >> 4, packed & 15], dim=-1).long()
    weight = code[indices].view(*scales.shape, -1) * scales[:, :, None]
    return linear(x, weight.view(len(packed), -1).to(x.dtype))


def tinygemm(weight: torch.Tensor) -> Multiply:
    """torch's 4-bit kernel: weights are `scale * (integer - 8) + zero`."""
    groups = weight.float().view(len(weight), -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).to(torch.bfloat16).float().clamp(min=1e-6)
    integers = ((groups - low) / scale).round().clamp(0, 15).int().view(weight.shape)
    zero = low + 8 * scale
    scales = torch.cat([scale, zero], dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()
    tiles = 8  # of 16 inputs
    if weight.device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, tiles)
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        pairs = (integers[:, ::2] << 4 | integers[:, 1::2]).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
        kernel = torch.ops.aten._weight_int4pack_mm
    return lambda x: kernel(x, packed, GROUP, scales)


KERNELS: Mapping[str, Callable[[torch.Tensor], Multiply]] = {
    "bf16": plain,
    "bitsandbytes": by_bitsandbytes,
    "fused": fused,
    "fused_by_4": partial(fused, rows=4),
    "dequantize": dequantize,
    "compiled": compiled,
    "tinygemm": tinygemm,
}


def microseconds(works: Sequence[Callable[[], Any]], on_gpu: bool) -> float:
    """Returns the time of one of `works`, which are run one after the other."""

    def run_all() -> None:
        for work in works:
            work()

    run_all()  # compiles, and initializes libraries
    repeats = 1
    if on_gpu:
        repeats = REPLAYS
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_all()
        run_all = graph.replay
        run_all()
    rounds = []
    for _ in range(ROUNDS):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            run_all()
        if on_gpu:
            torch.cuda.synchronize()
        rounds.append((time.perf_counter() - start) / repeats)
    return 1e6 * statistics.median(rounds) / len(works)


def measure_shape(
    name: str, shape: tuple[int, int], rows: Sequence[int], kernels: Sequence[str], device: str
) -> list[Measured]:
    """Times every kernel with every number of rows on a weight of (outputs, inputs)."""
    on_gpu = device.startswith("cuda")
    generator = torch.Generator(device).manual_seed(0)
    options = {"device": device, "dtype": torch.bfloat16, "generator": generator}
    weight = 0.02 * torch.randn(shape, **options)
    copies = 1
    if on_gpu:
        copies = -(-2 * COPIES_BYTES // weight.numel())  # of half a byte per weight
    results = []
    for kernel in kernels:
        try:
            multiplies = [KERNELS[kernel](weight.clone()) for _ in range(copies)]
            for n in rows:
                x = torch.randn(n, shape[1], **options)
                expected = x.float() @ weight.float().mT
                error = (multiplies[0](x).float() - expected).norm() / expected.norm()
                us = microseconds([partial(multiply, x) for multiply in multiplies], on_gpu)
                measured = {"shape": name, "kernel": kernel, "rows": n, "us": us}
                results.append({**measured, "error": error.item()})
                report(results[-1])
        except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
            report({"shape": name, "kernel": kernel, "failed": str(error).splitlines()[:1]})
    return results


def totals(results: Sequence[Measured], rows: Sequence[int]) -> list[Measured]:
    """Adds up the layers of a block, for each kernel that ran on all shapes, and for the best."""
    table: dict[tuple[str, int], dict[str, float]] = {}
    for result in results:
        table.setdefault((result["kernel"], result["rows"]), {})[result["shape"]] = result["us"]
    summary = []
    for n in rows:
        by_kernel = {kernel: us for (kernel, count), us in table.items() if count == n}
        best, chosen = {}, {}
        for shape in SHAPES:
            times = {k: by_kernel[k][shape] for k in EXACT if shape in by_kernel.get(k, {})}
            if times:
                chosen[shape] = min(times, key=lambda kernel: times[kernel])
                best[shape] = times[chosen[shape]]
        sums = {}
        for kernel, us in {**by_kernel, "best": best}.items():
            if len(us) == len(SHAPES):
                sums[kernel] = sum(us[shape] * count for shape, (*_, count) in SHAPES.items())
        for kernel, block_us in sums.items():
            total = {"rows": n, "kernel": kernel, "block_us": block_us}
            total["all_blocks_ms"] = BLOCKS * block_us / 1000
            if "bf16" in sums:
                total["ratio"] = sums["bf16"] / block_us
            if kernel == "best":
                total["chosen"] = chosen
            summary.append(total)
    return summary


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--device", default="cuda:0")
    option("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    option("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    option("--scale", type=int, default=1, help="divides the sizes of the weights, for a trial")
    option("--record", type=Path, help="JSON file to write the results to")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    results: list[Measured] = []
    for name, (outputs, inputs, _) in SHAPES.items():
        shape = (outputs // arguments.scale, inputs // arguments.scale)
        results += measure_shape(name, shape, arguments.rows, arguments.kernels, arguments.device)
    summary = totals(results, arguments.rows)
    for total in summary:
        report(total)
    if arguments.record:
        device = cpu_name()
        if arguments.device.startswith("cuda"):
            device = torch.cuda.get_device_name()
        content = {
            "command": f"python scripts/bench_four_bit.py {record_option(arguments.record)}",
            "device": device,
            "versions": {**versions(), "bitsandbytes": bitsandbytes.__version__},
            "note": NOTE,
            "blocks": [rounded(total) for total in summary],
            "matmuls": [rounded(result) for result in results],
        }
        write_record(arguments.record, content)


def report(measured: Measured) -> None:
    print(json.dumps(rounded(measured)), flush=True)


def rounded(measured: Measured) -> Measured:
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in measured.items()
    }


if __name__ == "__main__":
    main()
