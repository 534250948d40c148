"""Two processes share the rows of one run, even if all rows of a batch of one are dropped."""

import io
import json
from pathlib import Path

import lightning
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lightning.pytorch.strategies import DDPStrategy, Strategy
from PIL import Image
from tiny import read_letters, tiny_task
from toy_task import trainer
from two_ranks import GLOO, on_two_ranks

from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.training.adapters.methods import Full
from qwenvl_lit.training.strategies import FSDP2Strategy

ONE = {0: "p"}  # index and id of the row of the test set


def rows_of(batches) -> str:
    return "".join(row.id for batch in batches for row in batch.conversations)


class RecordRows(lightning.Callback):
    """Records the rows of each batch by loop."""

    def __init__(self):
        self.seen = {"train": [], "validation": [], "test": [], "predict": []}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen["train"].append(rows_of([batch]))

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self.seen["validation"].append(rows_of(batch))

    def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self.seen["test"].append(rows_of(batch))

    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self.seen["predict"].append(rows_of(batch))


def use_few_rows(strategy: type[Strategy], adapter) -> dict[str, list[str]]:
    """Trains and validates one row after each step, scores one row, answers one and then none."""
    seen = {}
    for stage, answered in (("fit", {}), ("test", {}), ("predict", {}), ("none", {"test": ONE})):
        task, recorder = tiny_task(adapter), RecordRows()
        data = DataModule(
            processor=task.processor,
            read=read_letters,
            train="abcd",
            validation="k" if stage == "fit" else (),
            test="p",
            generated_validation_rows=1,
            answered=answered,
        )
        options = {"strategy": strategy(**GLOO), "devices": 2, "max_epochs": 1}
        made = trainer(None, recorder, val_check_interval=1, **options)
        if stage == "fit":
            made.fit(task, data)
            seen["fit"] = recorder.seen["validation"]
        elif stage == "test":
            made.test(task, data, verbose=False)
            seen["test"] = recorder.seen["test"]
        else:
            made.predict(task, data, return_predictions=False)
            seen[stage] = recorder.seen["predict"]
    return seen


def read_parquet_rows(folder: Path) -> list[str]:
    """Trains on the file that `ranks` writes; returns the rows of each batch of this rank."""
    task, recorder = tiny_task(Full()), RecordRows()
    data = DataModule(
        processor=task.processor,
        read=read_rows,
        root=folder,
        cache=folder / "cache",
        train="rows.parquet",
        validation=None,
        batch_size=2,
    )
    trainer(None, recorder, strategy=DDPStrategy(**GLOO), devices=2, max_epochs=1).fit(task, data)
    return recorder.seen["train"]


def run_rank(rank: int, folder: Path) -> None:
    task, recorder = tiny_task(Full()), RecordRows()
    data = DataModule(
        processor=task.processor,
        read=read_letters,
        train="abcdefghiJ",
        validation="klmno",
        test="pqr",
        on_bad_image="drop",
        max_bad_fraction=0.5,
        group_by_length=True,
    )

    def two_ranks() -> lightning.Trainer:
        strategy = DDPStrategy(**GLOO)
        return trainer(folder, recorder, strategy=strategy, devices=2, max_epochs=1)

    two_ranks().fit(task, data)
    two_ranks().test(task, data, verbose=False)
    weights = float(sum(parameter.double().sum() for parameter in task.parameters()))
    few = {"ddp": use_few_rows(DDPStrategy, Full()), "fsdp": use_few_rows(FSDP2Strategy, Full())}
    parquet = read_parquet_rows(folder)
    seen = {**recorder.seen, "weights": weights, "few": few, "parquet": parquet}
    (folder / f"seen{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    Image.new("RGB", (9, 9)).save(image := io.BytesIO(), "PNG")
    ids = list("abcdefgh")
    table = pa.table({"id": ids, "query": ids, "response": ids, "image": [image.getvalue()] * 8})
    pq.write_table(table, folder / "rows.parquet", row_group_size=3)
    on_two_ranks(run_rank, folder)
    findings = []
    for file in folder.glob("findings*.jsonl"):
        findings += map(json.loads, file.read_text().splitlines())
    seen = [json.loads((folder / f"seen{rank}.json").read_text()) for rank in range(2)]
    return [*seen, findings]


def test_each_row_is_used_once_by_one_rank(ranks):
    one, other, _ = ranks
    for name, rows in (("train", "abcdefghi"), ("validation", "klmno"), ("test", "pqr")):
        assert sorted("".join(one[name] + other[name])) == sorted(rows)
    assert len(one["train"]) == len(other["train"]) == 5
    assert (len(one["validation"]), len(other["validation"])) == (3, 2)


def test_each_row_of_a_parquet_file_is_read_by_one_rank(ranks):
    one, other, _ = ranks
    assert len(one["parquet"]) == len(other["parquet"]) == 2
    assert sorted("".join(one["parquet"] + other["parquet"])) == list("abcdefgh")


def test_no_rank_loses_a_step_to_a_dropped_row_which_is_listed_once(ranks):
    one, other, findings = ranks
    assert "" in one["train"] + other["train"]
    assert one["weights"] == other["weights"]
    assert [(finding["set"], finding["kind"]) for finding in findings] == [("train", "dropped")]
    assert "row 'J': image <bytes> cannot be read" in findings[0]["message"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_without_rows_takes_part_in_every_loop(ranks, strategy):
    one, other, _ = ranks
    few, without = one["few"][strategy], other["few"][strategy]
    assert few == {"fit": ["k"] * 4, "test": ["p"], "predict": ["p"], "none": [""]}
    assert without == {"fit": [""] * 4, "test": [""], "predict": [""], "none": [""]}
