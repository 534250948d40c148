"""Measures decoding at full size.

    python scripts/bench_generate.py --record benchmarks/generate.json
    python scripts/bench_generate.py --size small --device cpu    # tries the script without a GPU

Random weights of the published sizes, prompts of 300 tokens with an image, and 64 new tokens.
`--four-bits` also decodes with 4-bit weights, which needs bitsandbytes. `bench_commands.py`
measures the command `predict`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from records import write_record

from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.quantization import NF4
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM
from qwenvl_lit.runs.versions import versions

GiB = 2**30
PROMPT, NEW = 300, 64  # tokens
ENDS = {"stop_ids": (), "pad_id": 0}
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "intermediate_size": 256,
    "visual": {
        "image_size": 56,
        "patch_size": 14,
        "width": 32,
        "layers": 2,
        "heads": 2,
        "mlp_ratio": 2.0,
        "output_dim": 64,
        "n_queries": 256,
        "resampler_heads": 2,
    },
}
NOTE = (
    "rates are after warm-up, without loading, unless the name says so; medians of three; weights "
    "are in peak_gib; first_answer_s has compilation in it"
)

Measured = dict[str, Any]


def prompts(
    model: QwenVLForCausalLM, rows: int, lengths: list[int] | None = None
) -> dict[str, torch.Tensor]:
    """Returns left-padded rows of random text, each after an image of noise.

    Args:
        lengths: tokens of each row; by default all are `PROMPT` long.
    """
    queries, visual = model.config.n_queries, model.config.visual
    image_start_id = visual["image_start_id"]
    image_ids = [image_start_id, *[image_start_id + 2] * queries, image_start_id + 1]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 500, (rows, PROMPT), generator=generator)
    mask = torch.ones(rows, PROMPT, dtype=torch.int64)
    starts = PROMPT - torch.tensor(lengths or [PROMPT] * rows)
    for row, start in enumerate(starts.tolist()):
        ids[row, :start] = 0
        mask[row, :start] = 0
        ids[row, start : start + queries + 2] = torch.tensor(image_ids)
    first_positions = torch.arange(rows) * PROMPT + starts + 1
    positions = first_positions[:, None] + torch.arange(queries)
    shape = (rows, 3, visual["image_size"], visual["image_size"])
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "vision_positions": positions.flatten(),
        "pixel_values": torch.randn(shape, generator=generator),
    }
    return {name: value.to(model.device) for name, value in inputs.items()}


def seconds(work: Callable[[], Any], on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(work: Callable[[], Any], on_gpu: bool) -> float:
    return statistics.median(seconds(work, on_gpu) for _ in range(3))


def measure_decoding(model: QwenVLForCausalLM, rows: int, compiled: bool, on_gpu: bool) -> Measured:
    """Measures the first answer, which compiles and captures, and rates after it."""
    inputs = prompts(model, rows)
    Generation.release(model)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    whole = Generation(max_new_tokens=NEW, compile=compiled)
    one_token = Generation(max_new_tokens=1, compile=compiled)
    first_s = seconds(lambda: whole(model, inputs, **ENDS), on_gpu)
    whole_s = median_seconds(lambda: whole(model, inputs, **ENDS), on_gpu)
    prefill_s = median_seconds(lambda: one_token(model, inputs, **ENDS), on_gpu)
    step_s = (whole_s - prefill_s) / (NEW - 1)
    measured: Measured = {
        "rows": rows,
        "compiled": compiled,
        "tokens_per_s": rows / step_s,
        "step_ms": 1000 * step_s,
        "prefill_with_image_s": prefill_s,
        "tokens_per_s_with_prefill": rows * NEW / whole_s,
        "first_answer_s": first_s,
    }
    if on_gpu:
        measured["peak_gib"] = torch.cuda.max_memory_allocated() / GiB
    return measured


def measure_agreement(model: QwenVLForCausalLM, rows: int, compiled: bool) -> Measured:
    """Compares answers to rows of different lengths in a batch with those to each row alone.

    They differ by the rounding of the weights' precision.
    """
    lengths = [PROMPT - 3 * row for row in range(rows)]
    inputs, queries = prompts(model, rows, lengths), model.config.n_queries
    generation = Generation(max_new_tokens=NEW, compile=compiled)
    together = generation(model, inputs, **ENDS)
    equal_tokens = []  # of each row, before the first difference
    for row, length in enumerate(lengths):
        ids = inputs["input_ids"][row : row + 1, PROMPT - length :]
        alone = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": inputs["pixel_values"][row : row + 1],
            "vision_positions": torch.arange(1, queries + 1, device=ids.device),
        }
        (answer,) = generation(model, alone, **ENDS)
        equal = [a == b for a, b in zip(answer, together[row], strict=True)]
        equal_tokens.append([*equal, False].index(False))
    return {
        "rows": rows,
        "same_answer": sum(count == NEW for count in equal_tokens) / rows,
        "same_first_token": sum(count > 0 for count in equal_tokens) / rows,
        "tokens_before_the_first_difference": statistics.mean(equal_tokens),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--size", default="full", choices=["full", "small"], help="small: to try this script")
    option("--device", default="cuda:0")
    option("--dtype", default="bfloat16")
    option(
        "--sizes",
        type=int,
        nargs="+",
        default=[1, 8, 32, 128],
        help="numbers of rows that are decoded together",
    )
    option("--four-bits", action="store_true", help="also decode with 4-bit weights")
    option("--record", type=Path, help="JSON file to write the results to")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    on_gpu = arguments.device.startswith("cuda")
    results: Measured = {}

    start = time.perf_counter()
    source: dict[str, Any] = {"config": SMALL}
    if arguments.size == "full":
        source = {"path": "Qwen/Qwen-VL-Chat", "weights": "random"}
    family = QwenVLFamily(**source, vocabulary="tiny", dtype=arguments.dtype)
    model = family.load(arguments.device)
    results["model"] = {
        "parameters": model.num_parameters(),
        "dtype": arguments.dtype,
        "drawn_in_s": time.perf_counter() - start,
    }
    report(results["model"])

    results["decoding"] = []
    for compiled in [False, True] if on_gpu else [False]:
        for rows in arguments.sizes:
            results["decoding"].append(measure_decoding(model, rows, compiled, on_gpu))
            report(results["decoding"][-1])
    rows = min(8, max(arguments.sizes))
    results["together_and_one_by_one"] = measure_agreement(model, rows, compiled=on_gpu)
    report(results["together_and_one_by_one"])

    if arguments.four_bits:
        Generation.release(model)
        del model
        model = family.load(arguments.device, quantization=NF4)
        results["decoding_with_four_bits"] = []
        for compiled in [False, True] if on_gpu else [False]:
            for rows in arguments.sizes:
                measured = measure_decoding(model, rows, compiled, on_gpu)
                results["decoding_with_four_bits"].append(measured)
                report(measured)

    if arguments.record:
        record(results, arguments)


def record(results: Measured, arguments: argparse.Namespace) -> None:
    command = ["python scripts/bench_generate.py", "--size", arguments.size]
    command += ["--device", arguments.device, "--dtype", arguments.dtype]
    if arguments.four_bits:
        command.append("--four-bits")
    device = platform.processor() or platform.machine()
    if arguments.device.startswith("cuda"):
        device = torch.cuda.get_device_name()
    content = {
        "command": " ".join(command),
        "device": device,
        "versions": versions(),
        "note": NOTE,
        **rounded(results),
    }
    write_record(arguments.record, content)


def report(measured: Measured) -> None:
    print(json.dumps(rounded(measured)), flush=True)


def rounded(value: Any) -> Any:
    """Rounds all floats to three decimals; more are not reproducible."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
