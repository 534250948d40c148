"""Batches that do not fit into memory are evaluated in parts; the decoder is decided on in time."""

import re
from types import SimpleNamespace

import lightning
import pytest
import torch
from tiny import read_letters, tiny_task
from toy_task import trainer

from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.evaluation_batches import BatchChoice, EvaluationPlan
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.training.adapters.methods import Full
from qwenvl_lit.training.answering import Answering
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.types import DataError


@pytest.fixture
def module() -> VisionLanguageModule:
    return tiny_task(Full())


def data(module, **options) -> DataModule:
    return DataModule(processor=module.processor, read=read_letters, **options)


def limit_rows(monkeypatch, module, rows: int) -> list[int]:
    """Lets memory run out with more than `rows` rows. Returns a list of the rows of each try."""
    tries: list[int] = []
    inputs = module.family.inputs

    def limited(batch, **options):
        tries.append(len(batch.conversations))
        if tries[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.\nDetails")
        return inputs(batch, **options)

    monkeypatch.setattr(module.family, "inputs", limited)
    return tries


class Outputs(lightning.Callback):
    """Records the ids and texts of all answers."""

    def __init__(self):
        self.answers: list[tuple[str, str]] = []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.answers += [(answer.conversation.id, answer.text) for answer in outputs]


def answers(tmp_path, module, **options) -> tuple[list[tuple[str, str]], dict[str, float]]:
    """The ids and texts of a test, and its scores."""
    outputs = Outputs()
    test = trainer(tmp_path, outputs)
    test.test(module, data(module, test="abcdefghijk", **options), verbose=False)
    scores = {name: float(value) for name, value in test.callback_metrics.items()}
    return outputs.answers, scores


def test_a_test_goes_on_with_half_the_rows_and_the_same_answers(
    module, monkeypatch, tmp_path, caplog
):
    expected = answers(tmp_path, module, eval_batch_size=6)
    assert [row_id for row_id, _ in expected[0]] == list("abcdefghijk")
    assert expected[1]["test/rows"] == 11
    caplog.clear()
    tries = limit_rows(monkeypatch, module, 2)
    assert answers(tmp_path, module, eval_batch_size=6) == expected
    # 6 and 3 rows are too many; the second batch of 5 begins with one at a time
    assert tries == [6, 3, *[1] * 11]
    messages = [record.message for record in caplog.records if "memory" in record.message]
    assert len(messages) == 2
    assert re.search(r"for 6 rows of up to \d+ tokens: going on with 3 at a time", messages[0])
    assert messages[1].endswith("data.eval_batch_size=1 begins so")


def test_validation_goes_on_with_half_the_rows_and_the_same_loss(module, monkeypatch, tmp_path):
    def loss(limit: int) -> float:
        limit_rows(monkeypatch, module, limit)
        rows = {"train": "a", "validation": "bcdefgh", "eval_batch_size": 7}
        fit = trainer(tmp_path, max_steps=1, limit_train_batches=1)
        # The learning rate is 0: both validations have the same weights
        module.optim.lr = 0.0
        fit.fit(module, data(module, **rows))
        return float(fit.callback_metrics["val/loss"])

    assert loss(2) == pytest.approx(loss(7), rel=1e-6)


def test_a_single_row_that_does_not_fit_is_an_error_that_names_it(module, monkeypatch, tmp_path):
    limit_rows(monkeypatch, module, 0)
    message = r"row of \d+ tokens does not fit into GPU memory \(CUDA out of memory\.\); shorten it"
    with pytest.raises(DataError, match=message):
        answers(tmp_path, module, eval_batch_size=4)


def test_auto_is_printed_and_decided_before_the_first_answer(module, monkeypatch, tmp_path, capsys):
    given: list = []

    class Recorded(Generation):
        def __call__(self, *arguments, **options):
            given.append(self.compile)
            return super().__call__(*arguments, **options)

    module.generation = Recorded(max_new_tokens=2)
    answers(tmp_path, module, eval_batch_size="auto")
    line = "Batches of 11 rows: all rows of a process (data.eval_batch_size=auto)"
    assert capsys.readouterr().out.splitlines() == [line]
    assert given == [False]  # on a CPU
    monkeypatch.setattr(module.answering, "compiled", True)  # as decided for many rows on a GPU
    monkeypatch.setattr(module.answering, "begin", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    answers(tmp_path, module, eval_batch_size=11)
    module.generation = Recorded(max_new_tokens=2, compile=False)
    answers(tmp_path, module, eval_batch_size=11)
    assert given == [False, True, False]


def test_a_number_is_used_without_a_line(module, tmp_path, capsys):
    answers(tmp_path, module, eval_batch_size=4)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("rows", "device", "precision", "compiled"),
    [
        (50_000, "cuda", "32-true", True),
        (1_000, "cuda", "32-true", False),
        (50_000, "cuda", "bf16-mixed", False),
        (50_000, "cpu", "32-true", False),
    ],
)
def test_the_decoder_is_compiled_for_many_rows_on_a_gpu(
    module, capsys, rows, device, precision, compiled
):
    plan = EvaluationPlan(
        indices=[],
        batches=BatchChoice(rows=128, reason="more are hardly faster"),
        prompt_tokens=300 * rows,
        answer_tokens=(20,) * (rows // 128),
    )
    run = SimpleNamespace(
        datamodule=SimpleNamespace(plans={"test": plan}),
        strategy=SimpleNamespace(root_device=torch.device(device)),
        precision=precision,
        is_global_zero=True,
        testing=False,
        predicting=True,
    )
    attributes = {"generation": module.generation, "model": module.model, "trainer": run}
    answering = Answering(SimpleNamespace(**attributes))
    assert answering.compiled == "auto"
    answering.begin()
    assert answering.compiled == compiled
    lines = ["Batches of 128 rows: more are hardly faster (data.eval_batch_size=auto)"]
    if compiled:
        lines.append("Decoding is compiled, which saves about 67 s of this run")
    assert capsys.readouterr().out.splitlines() == lines
