"""Samples a second of the data path, next to a plain loop that opens, resizes and tokenises row by row in one process.

    python scripts/bench_data.py                        prints the table, and what `--record` would write
    python scripts/bench_data.py --record benchmarks/data.json

Rows are captions of JPEG images of 640 x 480, made in a temporary folder; every figure is the median of several rounds, taken in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from training_rows import write_images

from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.models.qwen_vl.image_processing import normalized, preprocess
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import TINY_VOCABULARY, QwenTokenizer

SIDE, SPAN, BATCH = 448, 256, 8
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WORDS = (
    "a",
    "man",
    "in",
    "red",
    "jacket",
    "stands",
    "beside",
    "two",
    "dogs",
    "on",
    "the",
    "grass",
    "near",
    "an",
    "old",
    "stone",
    "bridge",
)
SYSTEM = "system\nYou are a helpful assistant."


def write_rows(folder: Path, count: int) -> None:
    """`rows.jsonl` and its images."""
    draw = np.random.default_rng(0)
    with (folder / "rows.jsonl").open("w") as file:
        for name in write_images(folder, count):
            answer = " ".join(draw.choice(WORDS, 12))
            query = f"Picture 1:<img>{name}</img>\nplease describe the image."
            file.write(json.dumps({"query": query, "response": answer}) + "\n")


def plain_loop(folder: Path, tokenizer: QwenTokenizer) -> int:
    """What a script without this package would do: one row after the other, batches of tensors."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    batch: list[tuple[torch.Tensor, torch.Tensor]] = []
    rows = 0
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        before, rest = row["query"].split("<img>")
        name, after = rest.split("</img>")
        image = (
            Image.open(folder / name).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        )
        pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - mean) / std
        ids = [
            tokenizer.im_start_id,
            *tokenizer.encode(SYSTEM),
            tokenizer.im_end_id,
            *tokenizer.encode("\n"),
        ]
        ids += [
            tokenizer.im_start_id,
            *tokenizer.encode(f"user\n{before}"),
            tokenizer.special["<img>"],
        ]
        ids += [tokenizer.special["<imgpad>"]] * SPAN + [
            tokenizer.special["</img>"],
            *tokenizer.encode(after),
            tokenizer.im_end_id,
        ]
        ids += [
            *tokenizer.encode("\n"),
            tokenizer.im_start_id,
            *tokenizer.encode(f"assistant\n{row['response']}"),
            tokenizer.im_end_id,
        ]
        batch.append((torch.tensor(ids), pixels))
        if len(batch) == BATCH:
            torch.nn.utils.rnn.pad_sequence([ids for ids, _ in batch], batch_first=True)
            torch.stack([pixels for _, pixels in batch])
            rows += len(batch)
            batch = []
    return rows


def measured(rounds: int, ways: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Samples a second of each way, the median over rounds in which all of them take their turn."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            rows = way()
            rates[name].append(rows / (time.perf_counter() - start))
    return {name: round(statistics.median(some), 1) for name, some in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = QwenTokenizer(TINY_VOCABULARY)
    processor = QwenVLProcessor(tokenizer, tokens_per_image=SPAN, image_size=SIDE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, arguments.rows)
        rows = read_rows(
            "rows.jsonl",
            DataModule(processor=processor, read=read_rows, root=folder).datasets[""].read_options,
        )
        parsed = list(rows)
        data = DataModule(
            processor=processor,
            read=read_rows,
            root=folder,
            train="rows.jsonl",
            batch_size=BATCH,
            num_workers=arguments.workers,
        )
        data.setup("fit")
        loader = data.train_dataloader()

        def load() -> int:
            return sum(
                len(normalized(batch.vision["pixel_values"])) for batch in loader
            )  # on a GPU this costs next to nothing

        load()  # workers are started once a run, and files are in the page cache for all alike
        rates = measured(
            arguments.rounds,
            {
                "plain loop, 1 process": lambda: plain_loop(folder, tokenizer),
                "rows read, 1 core": lambda: sum(1 for _ in rows),
                "rows tokenised, 1 core": lambda: len([processor.length(row) for row in parsed]),
                "images prepared, 1 core": lambda: len(
                    [preprocess(row.images[0].open(), SIDE) for row in parsed]
                ),
                f"loader, {arguments.workers} workers": load,
            },
        )
    plain, *_, loaded = rates.values()
    report = {
        "command": f"python scripts/bench_data.py --rows {arguments.rows} --rounds {arguments.rounds} --workers {arguments.workers}",
        "device": f"{cpu_name()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pillow": PIL.__version__,
        },
        "rows": f"{arguments.rows} JPEG images of 640 x 480 with a caption, to {SIDE} x {SIDE} pixels and about {SPAN + 60} tokens",
        "samples_per_second": rates,
        "loader_to_plain_loop": round(loaded / plain, 2),
    }
    for name, rate in rates.items():
        print(f"{name:28} {rate:10,.1f} samples/s")
    print(f"the loader is {report['loader_to_plain_loop']} times the plain loop")
    if arguments.record:
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
        arguments.record.write_text(json.dumps(report, indent=2) + "\n")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


if __name__ == "__main__":
    sys.exit(main())
