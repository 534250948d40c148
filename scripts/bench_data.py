"""Measures samples per second of the data path, beside a plain loop that prepares row by row.

    python scripts/bench_data.py                               print the results
    python scripts/bench_data.py --record benchmarks/data.json write them, too
    python scripts/bench_data.py --parquet                     compare the loader of parquet alone
    python scripts/bench_data.py --memory 1000000              memory of a large parquet file

The plain loop opens, resizes and tokenizes one row after the other in one process. Rows are
captions of JPEG images of 640 x 480 pixels, made in a temporary folder. Every figure is the median
over several rounds, in which the cases take turns.

`--parquet` reads the same rows from jsonl with a folder and from parquet with the images in its
cells, in turns, and records them beside the other results.

`--memory ROWS` opens a parquet file of that many small rows in a new process, reads 50,000 of them
in random order, and reports by how much the resident memory of the process (VmRSS) has grown at
most.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from records import write_record
from training_rows import write_images

from qwenvl_lit.cores import available_cores
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.image_processing import normalize_pixels, preprocess
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer
from qwenvl_lit.runs.versions import versions

IMAGE_SIZE = 448
TOKENS_PER_IMAGE = 256
BATCH_SIZE = 8
ROW_GROUP = 50_000
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SENTENCE = "a man in red jacket stands beside two dogs on the grass near an old stone bridge"
SYSTEM = "system\nYou are a helpful assistant."


def write_rows(folder: Path, count: int) -> None:
    """Writes `rows.jsonl` and its images."""
    words = SENTENCE.split()
    rng = np.random.default_rng(0)
    with (folder / "rows.jsonl").open("w") as stream:
        for name in write_images(folder, count):
            caption = " ".join(rng.choice(words, 12))
            question = f"Picture 1:<img>{name}</img>\nplease describe the image."
            stream.write(json.dumps({"query": question, "response": caption}) + "\n")


def write_parquet(folder: Path) -> None:
    """Writes `rows.parquet` with the rows of `rows.jsonl` and the bytes of their images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        name = row["query"].split("<img>")[1].split("</img>")[0]
        row["images"] = [{"bytes": (folder / name).read_bytes(), "path": name}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=100)


def plain_loop(folder: Path, tokenizer: QwenTokenizer) -> int:
    """Prepares batches as a short script without this package would; returns the rows in them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    all_ids: list[torch.Tensor] = []
    all_pixels: list[torch.Tensor] = []
    rows = 0
    for line in (folder / "rows.jsonl").read_text().split("\n")[:-1]:
        row = json.loads(line)
        before, rest = row["query"].split("<img>")
        name, after = rest.split("</img>")
        image = Image.open(folder / name).convert("RGB")
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
        all_pixels.append((pixels / 255 - mean) / std)
        all_ids.append(torch.tensor(plain_ids(tokenizer, before, after, row["response"])))
        if len(all_ids) == BATCH_SIZE:
            torch.nn.utils.rnn.pad_sequence(all_ids, batch_first=True)
            torch.stack(all_pixels)
            rows += len(all_ids)
            all_ids, all_pixels = [], []
    return rows


def plain_ids(tokenizer: QwenTokenizer, before: str, after: str, answer: str) -> list[int]:
    start, end = [tokenizer.im_start_id], [tokenizer.im_end_id]
    line_break = tokenizer.encode("\n")
    image_pads = [tokenizer.special["<imgpad>"]] * TOKENS_PER_IMAGE
    image = [tokenizer.special["<img>"], *image_pads, tokenizer.special["</img>"]]
    question = [*tokenizer.encode(f"user\n{before}"), *image, *tokenizer.encode(after)]
    turns = (tokenizer.encode(SYSTEM), question, tokenizer.encode(f"assistant\n{answer}"))
    ids: list[int] = []
    for turn in turns:
        ids += [*start, *turn, *end, *line_break]
    return ids[: -len(line_break)]  # none after the answer


def median_rates(rounds: int, cases: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Returns samples per second of each case; a case returns how many samples it has prepared."""
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            start = time.perf_counter()
            samples = run()
            rates[name].append(samples / (time.perf_counter() - start))
    return {name: round(statistics.median(values), 1) for name, values in rates.items()}


def load_from(folder: Path, file: str, workers: int) -> Callable[[], int]:
    """Returns the function that loads all rows of a file once; its workers have started."""
    tokenizer = QwenTokenizer(TINY_VOCABULARY)
    processor = QwenVLProcessor(tokenizer, tokens_per_image=TOKENS_PER_IMAGE, image_size=IMAGE_SIZE)
    data = DataModule(
        processor=processor,
        read=read_rows,
        root=folder,
        cache=folder / "cache",
        train=file,
        batch_size=BATCH_SIZE,
        num_workers=workers,
    )
    data.setup("fit")
    loader = data.train_dataloader()

    def load() -> int:
        return sum(len(batch.conversations) for batch in loader)

    load()
    return load


def measure_parquet(folder: Path, rounds: int, workers: int) -> dict[str, float]:
    write_parquet(folder)
    files = {"jsonl": "rows.jsonl", "parquet": "rows.parquet"}
    cases = {name: load_from(folder, file, workers) for name, file in files.items()}
    return median_rates(rounds, cases)


def record_parquet(file: Path, rates: dict[str, float], arguments: argparse.Namespace) -> None:
    """Adds the comparison to the results that `file` has."""
    options = f"--rows {arguments.rows} --rounds {arguments.rounds} --workers {arguments.workers}"
    report = json.loads(file.read_text())
    report["parquet"] = {
        "command": f"python scripts/bench_data.py --parquet {options}",
        "note": "measured in turns on a machine that other work shares: only the ratio counts",
        "loader_samples_per_second": rates,
        "parquet_to_jsonl": round(rates["parquet"] / rates["jsonl"], 2),
    }
    write_record(file, report)


def measure_memory(folder: Path, rows: int) -> dict[str, float]:
    """Returns the growth of memory in a new process, which has written no rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / "many.parquet"
    schema = pa.schema([("query", pa.string()), ("response", pa.string())])
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, rows, ROW_GROUP):
            numbers = range(start, min(start + ROW_GROUP, rows))
            queries = [f"{number}: {SENTENCE}?" for number in numbers]
            answers = [f"{SENTENCE}, {number}" for number in numbers]
            writer.write_table(pa.table([queries, answers], schema=schema))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return {"rows": rows, "rss_growth_mb": pool.apply(rss_growth_mb, (file, folder / "cache"))}


def rss_growth_mb(file: Path, cache: Path) -> float:
    """Opens a file and reads random rows of it."""
    import pyarrow.parquet  # noqa: F401  (its code is no memory of rows)

    before = most = resident_mb()
    rows = read_rows(str(file), ReadOptions(cache=cache))
    chosen = np.random.default_rng(0).integers(0, len(rows), 50_000)
    for number, index in enumerate(chosen.tolist()):
        assert rows[index].turns[0].parts[0].startswith(f"{index}: ")
        if not number % 500:
            most = max(most, resident_mb())
    return round(max(most, resident_mb()) - before, 1)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def record_memory(file: Path, memory: dict[str, float]) -> None:
    """Adds the memory of a large parquet file to the results that `file` has."""
    report = json.loads(file.read_text())
    report["memory"] = {
        "command": f"python scripts/bench_data.py --memory {memory['rows']}",
        "note": "a parquet file, opened for the first time, and 50,000 of its rows at random",
        **memory,
    }
    write_record(file, report)


def measure(folder: Path, rounds: int, workers: int) -> dict[str, float]:
    tokenizer = QwenTokenizer(TINY_VOCABULARY)
    processor = QwenVLProcessor(tokenizer, tokens_per_image=TOKENS_PER_IMAGE, image_size=IMAGE_SIZE)
    rows = read_rows("rows.jsonl", ReadOptions(root=folder))
    conversations = list(rows)
    data = DataModule(
        processor=processor,
        read=read_rows,
        root=folder,
        train="rows.jsonl",
        batch_size=BATCH_SIZE,
        num_workers=workers,
    )
    data.setup("fit")
    loader = data.train_dataloader()

    def tokenize() -> int:
        return len([processor.length(conversation) for conversation in conversations])

    def prepare_images() -> int:
        images = (conversation.images[0] for conversation in conversations)
        return len([preprocess(image.open(), IMAGE_SIZE) for image in images])

    def load() -> int:
        # On a GPU, normalizing takes almost no time.
        return sum(len(normalize_pixels(batch.vision["pixel_values"])) for batch in loader)

    load()  # starts the workers, as a run does once, and brings all files into the page cache
    return median_rates(
        rounds,
        {
            "plain loop, 1 process": lambda: plain_loop(folder, tokenizer),
            "rows read, 1 core": lambda: sum(1 for _ in rows),
            "rows tokenized, 1 core": tokenize,
            "images prepared, 1 core": prepare_images,
            f"loader, {workers} workers": load,
        },
    )


def report_of(rates: dict[str, float], rows: int, rounds: int, workers: int) -> dict[str, Any]:
    plain, *_, loader = rates.values()
    options = f"--rows {rows} --rounds {rounds} --workers {workers}"
    return {
        "command": f"python scripts/bench_data.py {options}",
        "device": f"{cpu_name()}, {available_cores()} of {os.cpu_count()} cores",
        "versions": versions(),
        "rows": (
            f"{rows} JPEG images of 640 x 480 with a caption, to {IMAGE_SIZE} x {IMAGE_SIZE} "
            f"pixels and about {TOKENS_PER_IMAGE + 60} tokens"
        ),
        "samples_per_second": rates,
        "loader_to_plain_loop": round(loader / plain, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--parquet", action="store_true")
    parser.add_argument("--memory", type=int, metavar="ROWS")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.memory:
            memory = measure_memory(folder, arguments.memory)
            print(f"{memory['rows']:,} rows: {memory['rss_growth_mb']} MB")
            if arguments.record:
                record_memory(arguments.record, memory)
            return
        write_rows(folder, arguments.rows)
        if arguments.parquet:
            rates = measure_parquet(folder, arguments.rounds, arguments.workers)
            print(f"samples/s: {rates}; parquet/jsonl {rates['parquet'] / rates['jsonl']:.2f}")
            if arguments.record:
                record_parquet(arguments.record, rates, arguments)
            return
        rates = measure(folder, arguments.rounds, arguments.workers)
    report = report_of(rates, arguments.rows, arguments.rounds, arguments.workers)
    for case, rate in rates.items():
        print(f"{case:28} {rate:10,.1f} samples/s")
    print(f"the loader is {report['loader_to_plain_loop']} times as fast as the plain loop")
    if arguments.record:
        write_record(arguments.record, report)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
