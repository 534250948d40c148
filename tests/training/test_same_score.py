"""The same answers get the same scores in validation, in a test and from a predictions file.

That holds for one process and for two.
"""

import json
from pathlib import Path

import lightning
import pytest
from lightning.pytorch.strategies import DDPStrategy
from tiny import tiny_family
from toy_task import trainer
from two_ranks import GLOO, on_two_ranks

from qwenvl_lit.callbacks.predictions import PredictionWriter
from qwenvl_lit.data.collate import Pad
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.metrics.anls import ANLS
from qwenvl_lit.metrics.captions import Bleu, CIDEr
from qwenvl_lit.metrics.exact_match import ExactMatch
from qwenvl_lit.metrics.sample_mean import SampleMean
from qwenvl_lit.reports.scores import read_predictions, score_set
from qwenvl_lit.training.adapters.methods import Full
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.optim import AdamW

ROWS = 7
ROWS_FILE = "rows.jsonl"


class Letters(SampleMean):
    """A score that every letter of an answer changes."""

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


def untrained() -> VisionLanguageModule:
    module = VisionLanguageModule(
        family=tiny_family(),
        adapter=Full(),
        generation=Generation(max_new_tokens=6),
        metrics=metrics(),
        optim=AdamW(lr=0.0),
        config={"seed": 1},
    )
    module.configure_model()
    return module


def data(module: VisionLanguageModule, file: Path) -> DataModule:
    return DataModule(
        processor=module.processor,
        read=read_rows,
        train=str(file),
        validation=str(file),
        batch_size=2,
        eval_batch_size=2,
        generated_validation_rows=ROWS,
    )


class LoggedScores(lightning.Callback):
    """Keeps what was logged at the end of the last validation or test, as rank 0 has it."""

    def __init__(self):
        self.scores = {}

    def on_validation_end(self, trainer, pl_module):
        self._keep(trainer, "val/")

    def on_test_end(self, trainer, pl_module):
        self._keep(trainer, "validation/")

    def _keep(self, trainer, prefix):
        self.scores = {}
        for name in metrics():
            if prefix + name in trainer.callback_metrics:
                self.scores[name] = float(trainer.callback_metrics[prefix + name])


def run_everything(folder: Path, file: Path, strategy=None, **options) -> None:
    """Trains with a learning rate of 0, tests and predicts; writes the logged scores to a file.

    Args:
        strategy: makes a strategy for each run.
    """
    scores = {}
    for name in ("fit", "test", "predict"):
        module, logged = untrained(), LoggedScores()
        rows = data(module, file)
        callbacks = [logged, PredictionWriter()] if name != "fit" else [logged]
        if strategy:
            options["strategy"] = strategy()
        run = trainer(folder / name, *callbacks, max_steps=2, val_check_interval=1, **options)
        if name == "predict":
            run.predict(module, rows, return_predictions=False)
        else:
            getattr(run, name)(module, rows)
            scores[name] = logged.scores
        if name == "test" and run.is_global_zero:  # without the other rank, which is still there
            predictions = folder / "test/predictions.jsonl"
            [answered] = read_predictions(predictions, rows.test, module.processor).values()
            scores["file"] = score_set("validation", answered, metrics()).totals
    if run.is_global_zero:
        (folder / "scores.json").write_text(json.dumps(scores))


def gloo() -> DDPStrategy:
    return DDPStrategy(**GLOO)


def run_rank(rank: int, home: Path) -> None:
    run_everything(home / "two", home / ROWS_FILE, strategy=gloo, devices=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Folders of one process and of two.

    A third of the rows have the answer of the model as their reference, a third nearly.
    """
    home = tmp_path_factory.mktemp("home")
    file = home / ROWS_FILE
    rows = []
    for index in range(ROWS):
        rows.append({"id": f"row {index}", "query": "word " * (index + 1), "response": "?"})
    write_rows(file, rows)
    module = untrained()
    pad = Pad(
        pad_id=module.processor.pad_id, collate_vision=module.processor.collate_vision, side="left"
    )
    for index, conversation in enumerate(read_rows(str(file))):
        batch = pad([module.processor.encode(conversation, prompt=True)])
        answer = module.predict(batch)[0].text
        assert answer
        rows[index]["response"] = [answer, "nothing of it", answer + " x"][index % 3]
    write_rows(file, rows)
    run_everything(home / "one", file)
    on_two_ranks(run_rank, home)
    return {"one": home / "one", "two": home / "two", "rows": file}


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("processes", ["one", "two"])
def test_validation_test_and_predictions_file_give_the_same_scores(runs, processes):
    logged = json.loads((runs[processes] / "scores.json").read_text())
    expected = json.loads((runs["one"] / "scores.json").read_text())["test"]
    assert logged["fit"].keys() == metrics().keys()
    assert logged["fit"] == logged["test"] == logged["file"] == expected
    assert 0 < expected["exact"] < expected["anls"] < 1
    assert 0 < expected["cider"] < 10
    rows = {"validation": read_rows(str(runs["rows"]))}
    for command in ("test", "predict"):
        predictions = runs[processes] / command / "predictions.jsonl"
        [answered] = read_predictions(predictions, rows, tiny_family().processor()).values()
        assert score_set("validation", answered, metrics(), rows=ROWS).totals == expected
