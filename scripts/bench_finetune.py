"""Memory and speed of fine-tuning at full size, each case a run of `python -m qwenvl_lit.train` on pictures from disk.

    python scripts/make_checkpoint.py /tmp/random-qwen-vl --size full --device cuda
    python scripts/bench_finetune.py --checkpoint /tmp/random-qwen-vl --cases lora qlora lora_all --record benchmarks/finetune.json
    python scripts/bench_finetune.py --checkpoint /tmp/random-qwen-vl --cases ddp ddp_2 fsdp_2 --record benchmarks/finetune.json

A case that is measured again takes the place of its older result in the record.
Rows are one JPEG of 640 x 480 and 320 tokens, 16 of them learned. Speed and memory are those of the run's `logging.jsonl`, from the first
steps on left out as warm-up; what a case prints is kept beside the record only if it fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from qwenvl_lit.families.qwen_vl import QwenVL
from qwenvl_lit.types import Conversation, Picture, Turn

TOKENS, LEARNED, ROWS = 320, 16, 512
LOW = ["data.batch_size=1", "trainer.accumulate_grad_batches=16", "model.checkpointing=true"]  # the settings of ms-swift
WIDE = ["data.batch_size=8", "trainer.accumulate_grad_batches=2", "model.checkpointing=true"]
CASES: dict[str, tuple[str, list[str], int]] = {  # what it is, its arguments, its optimizer steps
    "lora": ("LoRA on c_attn, batch 1 x 16, checkpointing", ["adapter=lora", *LOW], 12),
    "qlora": ("QLoRA (4 bit) on c_attn, batch 1 x 16, checkpointing", ["adapter=qlora", *LOW], 6),
    "lora_all": ("LoRA on every linear layer, batch 1 x 16, checkpointing", ["adapter=lora_all", *LOW], 6),
    "ddp": ("one card: LoRA on c_attn, batch 8 x 2, checkpointing", ["adapter=lora", *WIDE], 20),
    "ddp_2": (
        "two cards, DDP: LoRA on c_attn, batch 8 x 2 a card, checkpointing",
        ["adapter=lora", "strategy=ddp", *WIDE],
        20,
    ),
    "fsdp_2": (
        "two cards, FSDP2: all parts trained, batch 1 x 8 a card, checkpointing",
        # a checkpoint would be 58 GB with the optimizer's states
        [
            "adapter=full",
            "strategy=fsdp",
            *LOW[:1],
            "trainer.accumulate_grad_batches=8",
            "model.checkpointing=true",
            "~callbacks.checkpoint",
        ],
        12,
    ),
}


def write_rows(folder: Path, checkpoint: Path) -> Path:
    """Pictures and rows of exactly `TOKENS` and `LEARNED` tokens."""
    processor = QwenVL(path=str(checkpoint), weights="random").processor()
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    answer, question = "1" * (LEARNED - 1), ""  # a digit is a token in every vocabulary; an end mark is learned too
    question = "1" * (TOKENS - measured(processor, question, answer)[0])
    assert measured(processor, question, answer) == (TOKENS, LEARNED), measured(processor, question, answer)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(ROWS):
            coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
            file.write(json.dumps({"query": f"Picture 1: <img>{i}.jpg</img>\n{question}", "response": answer}) + "\n")
    return folder / "rows.jsonl"


def measured(processor, question: str, answer: str) -> tuple[int, int]:
    picture = Picture(Image.new("RGB", (8, 8)))
    turns = (Turn(role="user", parts=("Picture 1: ", picture, "\n" + question)), Turn(role="assistant", parts=(answer,)))
    return processor.length(Conversation(id="row", turns=turns))


def run(name: str, rows: Path, checkpoint: Path, work: Path, extra: list[str]) -> dict:
    """One case, and what its run logged."""
    what, arguments, steps = CASES[name]
    folder = work / name
    command = [sys.executable, "-m", "qwenvl_lit.train", "model=qwen_vl_chat", f"model.path={checkpoint}", "data=jsonl", *arguments]
    command += [f"data.train={rows}", "data.validation=null", "data.num_workers=4", f"trainer.max_steps={steps}"]
    command += ["trainer.log_every_n_steps=1", f"hydra.run.dir={folder}", "~callbacks.samples", "~callbacks.curves", *extra]
    start = time.perf_counter()
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wall = time.perf_counter() - start
    shown = [argument.replace(str(checkpoint), "CHECKPOINT").replace(str(rows), "ROWS") for argument in command[1:]]
    shown = [argument for argument in shown if not argument.startswith("hydra.run.dir")]
    record = {"case": name, "what": what, "command": " ".join(["python", *shown]), "wall_s": round(wall, 1)}
    if result.returncode:
        print(result.stdout[-4000:])
        return record | {"failed": result.stdout.strip().splitlines()[-1][:500] if result.stdout.strip() else f"exit {result.returncode}"}
    log = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    steps_logged = [line for line in log if "loss" in line]
    steady = steps_logged[len(steps_logged) // 3 :]
    spent = steady[-1]["elapsed_s"] - steady[0]["elapsed_s"]
    samples_a_step = steps_in(arguments, "data.batch_size") * steps_in(arguments, "trainer.accumulate_grad_batches")
    samples_a_step *= 2 if name.endswith("_2") else 1
    record |= {
        "samples_per_second": round(samples_a_step * (len(steady) - 1) / spent, 2),
        "peak_memory_gib": max(line["memory_gib"] for line in steps_logged) if "memory_gib" in steps_logged[0] else None,
        "losses": [line["loss"] for line in steps_logged],
        "last_line": steps_logged[-1],
        "seconds_before_the_first_step": round(wall - steps_logged[-1]["elapsed_s"], 1),
    }
    checkpoints = folder / "checkpoints"
    sizes = (
        {str(p.relative_to(checkpoints)): p.stat().st_size for p in checkpoints.rglob("*") if p.is_file()} if checkpoints.exists() else {}
    )
    record["checkpoint_mb"] = {name: round(size / 1e6, 1) for name, size in sizes.items()}
    shutil.rmtree(folder)  # full fine-tuning leaves tens of gigabytes
    return record


def steps_in(arguments: list[str], key: str) -> int:
    return next((int(argument.split("=")[1]) for argument in reversed(arguments) if argument.startswith(key + "=")), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder of scripts/make_checkpoint.py")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=["lora", "qlora", "lora_all"])
    parser.add_argument("--add", nargs="*", type=Path, default=[], help="records of other runs of this script to take results from")
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench_finetune"))
    parser.add_argument("--record", type=Path)
    parser.add_argument("extra", nargs="*", help="further arguments for every run, say strategy=cpu")
    arguments = parser.parse_args()

    import torch
    import transformers

    os.environ.setdefault("QWENVL_LIT_CACHE", str(arguments.work / "cache"))
    rows = write_rows(arguments.work / "rows", arguments.checkpoint) if arguments.cases else None
    records = [file for file in (arguments.record, *arguments.add) if file and file.exists()]
    results = {}
    for record in (json.loads(file.read_text()) for file in records):
        machine = {key: record[key] for key in ("device", "versions") if key in record}
        results |= {one["case"]: {**machine, **one} for one in record["results"] if one["case"] in CASES}
    for name in arguments.cases or [None]:
        if name:
            found = run(name, rows, arguments.checkpoint, arguments.work, arguments.extra)
            found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
            found["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
            results[name] = found
            print(json.dumps({key: value for key, value in found.items() if key not in ("losses", "last_line")}), flush=True)
        if arguments.record:
            record = {
                "command": "python scripts/bench_finetune.py --checkpoint CHECKPOINT --cases ...",
                "rows": f"{ROWS} JPEGs of 640 x 480, {TOKENS} tokens a row, {LEARNED} learned",
                "results": [results[case] for case in CASES if case in results],
            }
            arguments.record.parent.mkdir(exist_ok=True)
            arguments.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
