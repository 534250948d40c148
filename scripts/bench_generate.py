"""Measures decoding at full size.

    python scripts/bench_generate.py --record benchmarks/generate.json
    python scripts/bench_generate.py --model qwen3_vl_8b --record benchmarks/generate_qwen3_vl.json
    python scripts/bench_generate.py --size small --device cpu    # tries the script without a GPU

Random weights of the published sizes, prompts of 300 tokens with an image of 448 x 448, and 64 new
tokens. `--four-bits` also decodes with 4-bit weights, which needs bitsandbytes. `bench_commands.py`
measures the command `predict`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from records import write_record
from transformers import PreTrainedModel

from qwenvl_lit.data.collate import Pad
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.protocols import Family
from qwenvl_lit.models.quantization import NF4
from qwenvl_lit.runs.config_folder import config_folder
from qwenvl_lit.runs.versions import versions
from qwenvl_lit.types import Conversation, ImageSource, Turn

GiB = 2**30
PROMPT, NEW = 300, 64  # tokens
ENDS = {"stop_ids": (), "pad_id": 0}
TINY = {"qwen2_5": "qwen2_5_vl_tiny", "qwen3": "qwen3_vl_tiny", "qwen": "qwen_vl_tiny"}
NOTE = (
    "rates are after warm-up, without loading, unless the name says so; medians of three; weights "
    "are in peak_gib; first_answer_s has compilation in it"
)

Measured = dict[str, Any]


def family_of(model: str, size: str, dtype: str, vocabulary: str = "tiny") -> Family:
    """Builds a family of `conf/model` with random weights, or the small twin of its generation."""
    options = ["model.weights=random", f"model.vocabulary={vocabulary}"]
    if size == "small":
        model, options = TINY[model.partition("_vl")[0]], []
    with initialize_config_dir(str(config_folder()), version_base=None):
        config = compose("train", [f"model={model}", f"model.dtype={dtype}", *options])
    return instantiate(config.model, _convert_="all")


def prompts(family: Family, rows: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Returns left-padded prompts: digits after an image of noise.

    Args:
        rows: a number that determines the content, and the tokens of each row.
    """
    processor = family.processor()
    samples = []
    for number, length in rows:
        generator = torch.Generator().manual_seed(number)
        noise = torch.randint(0, 256, (448, 448, 3), generator=generator, dtype=torch.uint8)
        image = ImageSource(Image.fromarray(noise.numpy()))
        digits = torch.randint(0, 10, (length,), generator=generator).tolist()
        empty = processor.length(_question(image, ""), prompt=True).tokens
        text = "".join(map(str, digits[: length - empty]))  # a digit is a token
        samples.append(processor.encode(_question(image, text), prompt=True))
    collate = Pad(pad_id=processor.pad_id, collate_vision=processor.collate_vision, side="left")
    batch = collate(samples)
    assert batch.lengths == tuple(length for _, length in rows), batch.lengths
    return family.inputs(batch, generate=True)


def _question(image: ImageSource, text: str) -> Conversation:
    return Conversation(id="prompt", turns=(Turn(role="user", parts=(image, text)),))


def on_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    moved = {}
    for name, value in inputs.items():
        moved[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    return moved


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


def measure_decoding(
    model: PreTrainedModel, family: Family, rows: int, compiled: bool, on_gpu: bool
) -> Measured:
    """Measures the first answer, which compiles and captures, and rates after it."""
    inputs = on_device(prompts(family, [(row, PROMPT) for row in range(rows)]), model.device)
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


def measure_agreement(
    model: PreTrainedModel, family: Family, rows: int, compiled: bool
) -> Measured:
    """Compares answers to rows of different lengths in a batch with those to each row alone.

    They differ by the rounding of the weights' precision.
    """
    sizes = [(row, PROMPT + 3 * row) for row in range(rows)]
    generation = Generation(max_new_tokens=NEW, compile=compiled)
    together = generation(model, on_device(prompts(family, sizes), model.device), **ENDS)
    equal_tokens = []  # of each row, before the first difference
    for row, size in enumerate(sizes):
        alone = on_device(prompts(family, [size]), model.device)
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
    option("--model", default="qwen_vl_chat", help="of conf/model")
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
    family = family_of(arguments.model, arguments.size, arguments.dtype)
    model = family.load(arguments.device)
    results["model"] = {
        "name": arguments.model,
        "parameters": model.num_parameters(),
        "dtype": arguments.dtype,
        "drawn_in_s": time.perf_counter() - start,
    }
    report(results["model"])

    results["decoding"] = []
    for compiled in [False, True] if on_gpu else [False]:
        for rows in arguments.sizes:
            results["decoding"].append(measure_decoding(model, family, rows, compiled, on_gpu))
            report(results["decoding"][-1])
    rows = min(8, max(arguments.sizes))
    results["together_and_one_by_one"] = measure_agreement(model, family, rows, compiled=on_gpu)
    report(results["together_and_one_by_one"])

    if arguments.four_bits:
        Generation.release(model)
        del model
        model = family.load(arguments.device, quantization=NF4)
        results["decoding_with_four_bits"] = []
        for compiled in [False, True] if on_gpu else [False]:
            for rows in arguments.sizes:
                measured = measure_decoding(model, family, rows, compiled, on_gpu)
                results["decoding_with_four_bits"].append(measured)
                report(measured)

    if arguments.record:
        options = ["--four-bits"] if arguments.four_bits else []
        record(results, arguments, "bench_generate.py", NOTE, *options)


def record(
    results: Measured, arguments: argparse.Namespace, script: str, note: str, *options: str
) -> None:
    """Writes the results of a script, with the command that repeats them.

    Args:
        options: of the command, in addition to the model, its size, the device and the dtype.
    """
    command = [f"python scripts/{script}"]
    for name in ("model", "size", "device", "dtype"):
        command += [f"--{name}", getattr(arguments, name)]
    device = platform.processor() or platform.machine()
    if arguments.device.startswith("cuda"):
        device = torch.cuda.get_device_name()
    content = {
        "command": " ".join([*command, *options]),
        "device": device,
        "versions": versions(),
        "note": note,
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
