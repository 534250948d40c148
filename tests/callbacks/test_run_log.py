import json

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from toy_task import ToyData, ToyTask, conversation, trainer

from qwenvl_lit.callbacks.checkpoint import RunCheckpoint
from qwenvl_lit.callbacks.run_log import RunLog, read_log
from qwenvl_lit.data.json_lines import append_json_lines

DATA = ToyData([conversation(i, says="yes") for i in range(8)])  # four steps an epoch


def test_each_logged_step_and_each_validation_has_a_line(tmp_path):
    trainer(tmp_path, RunLog(), max_epochs=1).fit(ToyTask(), DATA)
    *steps, validation = read_log(tmp_path / "logging.jsonl")
    progress = [(record["step"], record["total"], record["epoch"]) for record in steps]
    assert progress == [(1, 4, 0), (2, 4, 0), (3, 4, 0), (4, 4, 0)]
    assert [record["learning_rate"] for record in steps] == [0.1, 0.05, 0.025, 0.0125]
    losses = [record["loss"] for record in steps]
    assert losses[:2] == pytest.approx([1, 0.64]), "the weight is 1, then 1 - 2 * 0.1"
    assert steps[3]["remaining_s"] == 0
    assert steps[3]["elapsed_s"] >= steps[0]["elapsed_s"] >= 0
    loss = pytest.approx((0.8 * 0.9 * 0.95 * 0.975) ** 2)
    assert validation == {"step": 4, "epoch": 0, "val/loss": loss}


def test_sparse_logging_includes_the_first_and_the_last_step(tmp_path):
    options = {"max_epochs": 2, "log_every_n_steps": 3, "limit_val_batches": 0}
    trainer(tmp_path, RunLog(), **options).fit(ToyTask(), DATA)
    assert [record["step"] for record in read_log(tmp_path / "logging.jsonl")] == [1, 3, 6, 8]


def test_accumulated_batches_are_one_step(tmp_path):
    options = {"max_epochs": 1, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    trainer(tmp_path, RunLog(), **options).fit(ToyTask(), DATA)
    records = read_log(tmp_path / "logging.jsonl")
    assert [(record["step"], record["total"]) for record in records] == [(1, 2), (2, 2)]


def test_a_resumed_run_appends_to_the_file_without_repeating_steps(tmp_path):
    checkpoints = ModelCheckpoint(
        dirpath=tmp_path,
        filename="at_{step}",
        every_n_train_steps=2,
        save_top_k=-1,
        auto_insert_metric_name=False,
    )
    options = {"limit_val_batches": 0, "max_epochs": 1, "enable_checkpointing": True}
    trainer(tmp_path, RunLog(), checkpoints, **options).fit(ToyTask(), DATA)
    with (tmp_path / "logging.jsonl").open("a") as file:
        file.write('{"step": 5, "unfinis')  # as a killed run may leave it
    trainer(tmp_path, RunLog(), **options).fit(
        ToyTask(), DATA, ckpt_path=tmp_path / "at_2.ckpt", weights_only=True
    )
    records = read_log(tmp_path / "logging.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["learning_rate"] for record in records] == [0.1, 0.05, 0.025, 0.0125]


def test_a_new_run_in_the_folder_starts_a_new_file(tmp_path):
    for _ in range(2):
        trainer(tmp_path, RunLog(), max_steps=1, limit_val_batches=0).fit(ToyTask(), DATA)
    assert len(read_log(tmp_path / "logging.jsonl")) == 1


def test_values_that_are_not_finite_are_null(tmp_path):
    class Breaks(ToyTask):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/grad_norm", float("inf"))
            return loss

    trainer(tmp_path, RunLog(), max_steps=1, limit_val_batches=0).fit(Breaks(), DATA)
    assert read_log(tmp_path / "logging.jsonl")[0]["grad_norm"] is None


def test_scores_at_the_end_of_training_are_the_last_and_the_best(tmp_path):
    class Worsens(ToyTask):
        def on_validation_epoch_end(self):
            self.log("val/loss", float(self.current_epoch) + 1)

    best = ModelCheckpoint(dirpath=tmp_path / "checkpoints", filename="best", monitor="val/loss")
    trainer(tmp_path, RunLog(), best, max_epochs=3, enable_checkpointing=True).fit(Worsens(), DATA)
    fit = json.loads((tmp_path / "metrics.json").read_text())["fit"]
    assert fit["step"] == 12
    assert fit["last"] == {"step": 12, "epoch": 2, "val/loss": 3}
    assert fit["best"] == {
        "step": 4,
        "epoch": 0,
        "val/loss": 1,
        "monitor": "val/loss",
        "checkpoint": str(tmp_path / "checkpoints/best.ckpt"),
    }


def test_scores_of_a_test_are_added_to_those_of_training(tmp_path):
    trainer(tmp_path, RunLog(), max_steps=1, limit_val_batches=0).fit(ToyTask(), DATA)
    sets = {
        "easy": [conversation(i, says=text) for i, text in enumerate(("yes", "no", "yes"))],
        "hard": [conversation(0)],
    }
    trainer(tmp_path, RunLog()).test(ToyTask(), ToyData(test=sets), verbose=False)
    scores = json.loads((tmp_path / "metrics.json").read_text())
    assert scores["fit"] == {"step": 1, "last": None}
    assert scores["test"] == {
        "easy/exact_match": pytest.approx(2 / 3),
        "easy/rows": 3,
        "hard/exact_match": 0,
        "hard/rows": 1,
    }


def test_without_a_terminal_every_nth_step_is_printed(tmp_path, capsys):
    trainer(tmp_path, RunLog(print_every=2), max_epochs=1).fit(ToyTask(), DATA)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split("  ")[0] for line in lines] == ["step 1/4", "step 2/4", "step 4/4", "step 4"]
    assert "  loss 0.64  learning_rate 0.05  remaining 0:0" in lines[1]
    assert lines[3] == "step 4  val/loss 0.4448"


def test_a_component_with_its_own_learning_rate_has_it_in_the_log(tmp_path):
    class TwoRates(ToyTask):
        def __init__(self):
            super().__init__()
            self.tower = torch.nn.Parameter(torch.ones(1))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.tower.square().sum()

        def configure_optimizers(self):
            groups = [
                {"params": [self.weight], "component": None},
                {"params": [self.tower], "lr": 0.01, "component": "vision"},
            ]
            return torch.optim.SGD(groups, lr=0.1)

    trainer(tmp_path, RunLog(), max_steps=1, limit_val_batches=0).fit(TwoRates(), DATA)
    [record] = read_log(tmp_path / "logging.jsonl")
    rates = {name: record[name] for name in record if name.startswith("learning_rate")}
    assert rates == {"learning_rate": 0.1, "learning_rate_vision": 0.01}


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085"])
def test_records_are_read_whatever_the_names_of_scores_hold(tmp_path, character):
    record = {"step": 1, f"val/a{character}b": 1.0}
    append_json_lines(tmp_path / "logging.jsonl", [record, record])
    assert read_log(tmp_path / "logging.jsonl") == [record, record]


@pytest.mark.parametrize("line", ["{", "[]", '{"step": "1"}', "[" * 100_000, "\x00"])
def test_a_damaged_history_does_not_stop_a_resumed_run_and_is_kept(tmp_path, caplog, line):
    checkpoints = ModelCheckpoint(
        dirpath=tmp_path, filename="at", every_n_train_steps=3, save_top_k=-1
    )
    options = {"limit_val_batches": 0, "max_epochs": 1, "enable_checkpointing": True}
    trainer(tmp_path, RunLog(), checkpoints, **options).fit(ToyTask(), DATA)
    history = tmp_path / "logging.jsonl"
    lines = history.read_text().split("\n")
    history.write_text("\n".join([lines[0], line, *lines[2:]]))
    damaged = history.read_bytes()
    trainer(tmp_path, RunLog(), **options).fit(
        ToyTask(), DATA, ckpt_path=tmp_path / "at.ckpt", weights_only=True
    )
    assert [record["step"] for record in read_log(history)] == [1, 4]
    assert "logging.jsonl:2: " in caplog.text
    assert (tmp_path / "logging.jsonl.broken").read_bytes() == damaged


def test_a_misspelt_monitor_of_the_checkpoint_is_one_line_with_the_logged_scores(tmp_path, caplog):
    options = {"max_epochs": 2, "enable_checkpointing": True}
    checkpoint = RunCheckpoint(monitor="val/los")
    trainer(tmp_path, RunLog(), checkpoint, **options).fit(ToyTask(), DATA)
    [line] = [text for text in caplog.messages if "monitor" in text]
    assert line.startswith("callbacks.checkpoint.monitor=val/los: no such score is logged")
    assert "val/loss" in line


def test_a_misspelt_monitor_of_early_stopping_is_refused_by_name(tmp_path):
    stopping = EarlyStopping(monitor="val/los")
    message = r"^callbacks\.early_stopping\.monitor=val/los: no such score .*val/loss"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, RunLog(), stopping, max_epochs=1).fit(ToyTask(), DATA)


@pytest.mark.parametrize(("steps", "warned"), [(2, True), (3, False)])
def test_loggers_without_training_values_are_warned_about(tmp_path, caplog, steps, warned):
    options = {"max_steps": steps, "log_every_n_steps": 3, "logger": CSVLogger(tmp_path)}
    trainer(tmp_path, RunLog(), limit_val_batches=0, **options).fit(ToyTask(), DATA)
    message = f"the run has {steps} optimizer steps and trainer.log_every_n_steps=3: "
    assert any(text.startswith(message) for text in caplog.messages) == warned
