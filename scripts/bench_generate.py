"""How fast answers are decoded at full size, and a whole prediction from images on disk to a file of answers.

    python scripts/bench_generate.py --record benchmarks/generate.json

Random weights of the published sizes; a prompt of 300 tokens with an image, 64 new tokens. Then `python -m qwenvl_lit.predict` over 1,000
rows with a JPEG each, which this script makes, and 20 new tokens. `--four-bits` decodes with such weights too (needs bitsandbytes).
`--size small --device cpu` is to try this script.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from PIL import Image

from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.quantization import NF4
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily

GiB = 2**30
PROMPT, NEW = 300, 64
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


def prompts(model, rows: int, lengths: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Left-padded rows of random text, each after an image of noise."""
    device, span, visual = model.device, model.config.n_queries, model.config.visual
    start = visual["image_start_id"]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 500, (rows, PROMPT), generator=draw)
    mask = torch.ones(rows, PROMPT, dtype=torch.int64)
    places = torch.empty(rows, dtype=torch.int64)
    for row in range(rows):
        first = PROMPT - (lengths[row] if lengths else PROMPT)
        ids[row, :first], mask[row, :first], places[row] = 0, 0, first
        ids[row, first : first + span + 2] = torch.tensor([start, *[start + 2] * span, start + 1])
    positions = torch.arange(rows)[:, None] * PROMPT + places[:, None] + 1 + torch.arange(span)
    pixels = torch.randn(rows, 3, visual["image_size"], visual["image_size"], generator=draw)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "vision_positions": positions.flatten(),
        "pixel_values": pixels,
    }
    return {name: value.to(device) for name, value in inputs.items()}


def seconds(work, on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def decoding(model, rows: int, compile: bool, on_gpu: bool) -> dict[str, float | int | bool]:
    """Rates after warm-up; the first answer, with what is compiled and captured for it, stands apart."""
    inputs, ends = prompts(model, rows), {"stop_ids": (), "pad_id": 0}
    Generation.release(model)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    answer, token = (Generation(max_new_tokens=count, compile=compile) for count in (NEW, 1))
    first = seconds(lambda: answer(model, inputs, **ends), on_gpu)
    whole = statistics.median(
        seconds(lambda: answer(model, inputs, **ends), on_gpu) for _ in range(3)
    )
    prefill = statistics.median(
        seconds(lambda: token(model, inputs, **ends), on_gpu) for _ in range(3)
    )
    step = (whole - prefill) / (NEW - 1)
    measured: dict[str, float | int | bool] = {
        "rows": rows,
        "compiled": compile,
        "tokens_per_s": rows / step,
        "step_ms": 1000 * step,
    }
    measured |= {
        "prefill_with_image_s": prefill,
        "tokens_per_s_with_prefill": rows * NEW / whole,
        "first_answer_s": first,
    }
    if on_gpu:
        measured["peak_gib"] = torch.cuda.max_memory_allocated() / GiB
    return measured


def agreement(model, rows: int, compile: bool) -> dict[str, float | int]:
    """Answers to rows of different lengths, together and one by one, in the precision of the weights."""
    lengths = [PROMPT - 3 * row for row in range(rows)]
    inputs, ends = prompts(model, rows, lengths), {"stop_ids": (), "pad_id": 0}
    generation = Generation(max_new_tokens=NEW, compile=compile)
    together, span = generation(model, inputs, **ends), model.config.n_queries
    shared = []
    for row, length in enumerate(lengths):
        ids = inputs["input_ids"][row : row + 1, PROMPT - length :]
        alone = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": inputs["pixel_values"][row : row + 1],
        }
        alone["vision_positions"] = torch.arange(1, span + 1, device=ids.device)
        (answer,) = generation(model, alone, **ends)
        same = [a == b for a, b in zip(answer, together[row], strict=True)]
        shared.append(same.index(False) if False in same else NEW)
    first = sum(count > 0 for count in shared) / rows
    return {
        "rows": rows,
        "same_answer": sum(count == NEW for count in shared) / rows,
        "same_first_token": first,
    } | {"tokens_before_the_first_difference": statistics.mean(shared)}


def whole_prediction(arguments: argparse.Namespace) -> dict[str, float | int | str]:
    """`python -m qwenvl_lit.predict` as a user runs it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw = torch.Generator().manual_seed(0)
        with (folder / "rows.jsonl").open("w") as file:
            for row in range(arguments.rows):
                coarse = torch.randint(0, 256, (30, 40, 3), generator=draw, dtype=torch.uint8)
                Image.fromarray(coarse.numpy()).resize((640, 480), Image.Resampling.BICUBIC).save(
                    folder / f"{row}.jpg", quality=90
                )
                file.write(
                    json.dumps(
                        {
                            "query": f"<img>{folder / f'{row}.jpg'}</img>Where is thing {row}?",
                            "response": "",
                        }
                    )
                    + "\n"
                )
        full = arguments.size == "full"
        model = [
            "model=qwen_vl_chat",
            "model.weights=random",
            "model.vocabulary=tiny",
            f"model.dtype={arguments.dtype}",
        ]
        command = [
            sys.executable,
            "-m",
            "qwenvl_lit.predict",
            *(model if full else ["model=qwen_vl_tiny"]),
        ]
        command += [
            "data=jsonl",
            f"data.test={folder / 'rows.jsonl'}",
            f"data.eval_batch_size={arguments.batch}",
        ]
        command += [
            f"data.num_workers={arguments.workers}",
            "generation.max_new_tokens=20",
            "generation.min_new_tokens=20",
        ]
        command += [
            f"generation.compile={str(arguments.device.startswith('cuda')).lower()}",
            f"hydra.run.dir={folder / 'run'}",
        ]
        command += [] if arguments.device.startswith("cuda") else ["strategy=cpu"]
        start = time.perf_counter()
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        total = time.perf_counter() - start
        if run.returncode:
            sys.exit(f"predict ended with {run.returncode}: {run.stdout}")
        written = (folder / "run" / "predictions.jsonl").read_text().splitlines()
        assert [json.loads(line)["index"] for line in written] == list(range(arguments.rows))
    rate = r"([\d.]+) images/s, (\d+) new tokens/s"
    all_rows = re.search(rf"predict: (\d+) rows in ([\d.]+) s, {rate}", run.stdout)
    warm = re.search(rf"first batch, of ([\d.]+) s: {rate}; loading took ([\d.]+) s", run.stdout)
    assert all_rows, run.stdout
    assert warm, run.stdout
    return {
        "command": " ".join(["python", *command[1:]]).replace(name, "FOLDER"),
        "rows": int(all_rows[1]),
        "seconds_with_compilation": float(all_rows[2]),
        "images_per_s_with_compilation": float(all_rows[3]),
        "first_batch_with_compilation_s": float(warm[1]),
        "images_per_s": float(warm[2]),
        "new_tokens_per_s": int(warm[3]),
        "loading_s": float(warm[4]),
        "process_s": total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", default="full", choices=["full", "small"], help="small, to try this script"
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[1, 8, 32, 128],
        help="rows that are decoded together",
    )
    parser.add_argument("--rows", type=int, default=1000, help="of the prediction; 0: none")
    parser.add_argument("--batch", type=int, default=128, help="of the prediction")
    parser.add_argument("--workers", type=int, default=4, help="of the prediction")
    parser.add_argument("--four-bits", action="store_true")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    on_gpu = arguments.device.startswith("cuda")

    result: dict[str, object] = {}
    made = time.perf_counter()
    sizes = (
        {"path": "Qwen/Qwen-VL-Chat", "weights": "random"}
        if arguments.size == "full"
        else {"config": SMALL}
    )
    family = QwenVLFamily(**sizes, vocabulary="tiny", dtype=arguments.dtype)
    model = family.load(arguments.device)
    result["model"] = {
        "parameters": model.num_parameters(),
        "dtype": arguments.dtype,
        "drawn_in_s": time.perf_counter() - made,
    }
    print(json.dumps(result["model"]), flush=True)
    decoded = []
    for compile in [False, True] if on_gpu else [False]:
        for rows in arguments.sizes:
            decoded.append(decoding(model, rows, compile, on_gpu))
            print(json.dumps(rounded(decoded[-1])), flush=True)
    result["decoding"] = decoded
    result["together_and_one_by_one"] = agreement(
        model, min(8, max(arguments.sizes)), compile=on_gpu
    )
    print(json.dumps(rounded(result["together_and_one_by_one"])), flush=True)
    if arguments.four_bits:
        Generation.release(model)
        del model
        model = family.load(arguments.device, quantization=NF4)
        result["decoding_with_four_bits"] = [
            decoding(model, rows, False, on_gpu) for rows in arguments.sizes if rows <= 32
        ]
        print(json.dumps(rounded(result["decoding_with_four_bits"])), flush=True)
    if arguments.rows:  # in a process of its own, which finds the kernels that were compiled above in the cache of torch
        Generation.release(model)
        del model
        gc.collect()
        torch._dynamo.reset()
        if on_gpu:
            torch.cuda.empty_cache()
        result["predict"] = whole_prediction(arguments)
        print(json.dumps(result["predict"]), flush=True)
    if arguments.record:
        options = [
            "--size",
            arguments.size,
            "--device",
            arguments.device,
            "--dtype",
            arguments.dtype,
        ]
        options += ["--four-bits"] * arguments.four_bits
        record = {
            "command": " ".join(["python scripts/bench_generate.py", *options]),
            "device": torch.cuda.get_device_name()
            if on_gpu
            else platform.processor() or platform.machine(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "note": "rates are after warm-up, without loading, unless the name says so; medians of three; weights are in peak_gib; "
            "first_answer_s has compilation in it, predict finds the kernels compiled",
            **rounded(result),
        }
        arguments.record.parent.mkdir(exist_ok=True)
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")


def rounded(value):
    """Three decimals are more than repeats."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
