"""One number for the same answers: validated while training, tested, read from a file of predictions; by one process and by two."""

import json
import os
import socket
from datetime import timedelta
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from small_run import family
from toy_task import trainer

from qwenvl_lit.callbacks.predictions import PredictionWriter
from qwenvl_lit.data.collate import Pad
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.metrics.anls import ANLS
from qwenvl_lit.metrics.captions import Bleu, CIDEr
from qwenvl_lit.metrics.exact_match import ExactMatch
from qwenvl_lit.metrics.sample_mean import SampleMean
from qwenvl_lit.reports.scores import answers, score
from qwenvl_lit.training.adapters.methods import Full
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.optim import AdamW

ROWS = 7


class Letters(SampleMean):
    """Every letter of an answer changes it."""

    needs = "answer"

    def score(self, prediction):
        return sum(map(ord, prediction.text)) % 997 / 997


def metrics() -> dict:
    return {
        "exact": ExactMatch(),
        "cider": CIDEr(),
        "bleu": Bleu(2),
        "anls": ANLS(),
        "letters": Letters(),
    }


def task() -> VisionLanguageModule:
    made = VisionLanguageModule(
        family=family(),
        adapter=Full(),
        generation=Generation(max_new_tokens=6),
        metrics=metrics(),
        optim=AdamW(lr=0.0),
        config={"seed": 1},
    )
    made.configure_model()
    return made


def data(made: VisionLanguageModule, file: Path) -> DataModule:
    return DataModule(
        processor=made.processor,
        read=read_rows,
        train=str(file),
        validation=str(file),
        batch_size=2,
        eval_batch_size=2,
        generated_validation_rows=ROWS,
    )


class Kept(lightning.Callback):
    """What was logged at the end of each validation and test, as rank 0 knows it."""

    def __init__(self):
        self.scores = {}

    def on_validation_end(self, trainer, pl_module):
        self._keep(trainer, "val/")

    def on_test_end(self, trainer, pl_module):
        self._keep(trainer, "validation/")

    def _keep(self, trainer, prefix):
        logged = {
            name.removeprefix(prefix): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(prefix)
        }
        self.scores = {name: value for name, value in logged.items() if name in metrics()}


def everywhere(folder: Path, file: Path, **options) -> None:
    """Train with a rate of 0, test and predict; `scores.json` holds what was logged."""
    found = {}
    for name in ("fit", "test", "predict"):
        made, kept = task(), Kept()
        rows = data(made, file)
        chosen = {key: make() if callable(make) else make for key, make in options.items()}
        run = trainer(
            folder / name,
            kept,
            *([PredictionWriter()] if name != "fit" else []),
            max_steps=2,
            val_check_interval=1,
            **chosen,
        )
        if name == "predict":
            run.predict(made, rows, return_predictions=False)
        else:
            getattr(run, name)(made, rows)
            found[name] = kept.scores
        if name == "test" and run.is_global_zero:  # alone, while the other process is there
            [answered] = answers(
                folder / "test/predictions.jsonl", rows.test, made.processor
            ).values()
            found["file"] = score("validation", answered, metrics()).totals
    if run.is_global_zero:
        (folder / "scores.json").write_text(json.dumps(found))


def run_rank(rank: int, folder: Path, file: Path, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    everywhere(
        folder,
        file,
        devices=2,
        strategy=lambda: DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Folders of one process and of two; half of the answers of the rows are what the model says, some nearly."""
    home = tmp_path_factory.mktemp("home")
    file = home / "rows.jsonl"
    questions = [
        {"id": f"row {place}", "query": "word " * (place + 1), "response": "?"}
        for place in range(ROWS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in questions))
    made = task()
    pad = Pad(pad_id=made.processor.pad_id, side="left")
    said = [
        made.predict(pad([made.processor.encode(row, prompt=True)]))[0].text
        for row in read_rows(str(file))
    ]
    assert all(said)
    for place, row in enumerate(questions):
        row["response"] = [said[place], "nothing of it", said[place] + " x"][place % 3]
    file.write_text("".join(json.dumps(row) + "\n" for row in questions))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    everywhere(home / "one", file)
    torch.multiprocessing.spawn(run_rank, args=(home / "two", file, port), nprocs=2)
    return {"one": home / "one", "two": home / "two", "rows": file}


@pytest.mark.parametrize("processes", ["one", "two"])
def test_validation_test_and_a_file_of_answers_give_one_score(runs, processes):
    logged = json.loads((runs[processes] / "scores.json").read_text())
    alone = json.loads((runs["one"] / "scores.json").read_text())["test"]
    assert logged["fit"].keys() == metrics().keys()
    assert logged["fit"] == logged["test"] == logged["file"] == alone
    assert 0 < alone["exact"] < alone["anls"] < 1
    assert 0 < alone["cider"] < 10
    rows = {"validation": read_rows(str(runs["rows"]))}
    for verb in ("test", "predict"):
        [found] = answers(
            runs[processes] / verb / "predictions.jsonl", rows, family().processor()
        ).values()
        assert score("validation", found, metrics(), rows=ROWS).totals == alone
