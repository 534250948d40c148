"""What a run prints before its first step."""

import pytest
from PIL import Image
from tiny import tiny_task
from toy_task import trainer

from qwenvl_lit.callbacks.overview import Overview, _batches, _speed, _validation, marked
from qwenvl_lit.callbacks.validation import ValidationSchedule
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.micro_batches import ActivationCosts
from qwenvl_lit.models.components import blocks_of
from qwenvl_lit.training.adapters.methods import LoRA
from qwenvl_lit.training.speed import Speed, checkpoint_blocks
from qwenvl_lit.types import Conversation, Dropped, ImageSource, Turn


def read(source: str, read_options) -> list[Conversation]:
    """Makes each letter a row with an image; x is a row that is left out, y one without image."""
    rows = []
    for index, letter in enumerate(source):
        image = ImageSource(Image.new("RGB", (9, 9)))
        parts = (letter,) if letter == "y" else (image, letter)
        answer = Turn(role="assistant", parts=("\x1b[2J" if letter == "z" else "no",))
        turns = (Turn(role="user", parts=parts), answer)
        where = f"rows.jsonl:{index + 1}"
        rows.append(Conversation(id=letter, turns=turns, index=index, where=where))
    return Rows(rows)


class Rows(list):
    def __getitem__(self, index):
        row = super().__getitem__(index)
        if row.id == "x":
            raise Dropped("x is left out")
        return row


def overview(folder, capsys, *, data: dict, **options) -> str:
    module = tiny_task(LoRA(rank=2, alpha=4, dropout=0.0, targets="attention"))
    rows = DataModule(processor=module.processor, read=read, **data)
    options = {"max_steps": 1, "limit_val_batches": 0, **options}
    trainer(folder, Overview(), **options).fit(module, rows)
    return capsys.readouterr().out


def test_rows_steps_device_folder_and_a_row_are_printed(tmp_path, capsys):
    data = {"train": ["xabc", "dyfg"], "validation": "hx", "order": "staged", "batch_size": 2}
    printed = overview(tmp_path, capsys, data=data, accumulate_grad_batches=3, max_steps=2)
    facts, _, row = printed.partition("First row   ")
    assert facts.splitlines() == [
        f"Run folder  {tmp_path}",
        "Device      CPU, 1 thread, precision 32-true",
        "Rows        7 training with 6 images, 1 validation, 2 left out (findings.jsonl says why)",
        "Steps       2 optimizer steps in 1 epoch",
        "Batches     6 rows per optimizer step = batch of 2 x 3 accumulated x 1 rank",
        "Speed       not compiled, 0 workers for data",
        "Optimizer   learning rate 0.001, no warm-up (0.05 of all steps is less than one), cosine",
        "Validation  none, as trainer.limit_val_batches=0; the command test computes exact_match",
    ]
    assert row.startswith("rows.jsonl:2, ")
    assert "35 tokens, 3 supervised, marked ⟦...⟧:\n<|im_start|>system\n" in row
    assert "Picture 1: <img></img>\na<|im_end|>\n" in row
    assert row.endswith("<|im_start|>assistant\n⟦no<|im_end|>⟧\n")


def test_batches_limited_by_tokens_are_described_by_them(tmp_path, capsys):
    data = {"train": "abcdefgh", "max_tokens": 100}
    printed = overview(tmp_path, capsys, data=data)
    assert "rows per step: batches of up to 100 tokens x 1 accumulated x 1 rank" in printed
    assert "8 training with 8 images, 0 validation, 0 left out\n" in printed


@pytest.mark.parametrize(
    ("data", "schedule", "text"),
    [
        (
            {"generated_validation_rows": 2},
            ValidationSchedule(50),
            "every 50 optimizer steps and at the end, 1 row answered "
            "(data.generated_validation_rows) and scored by exact_match",
        ),
        (
            {},
            ValidationSchedule(0.25),
            "every 0.25 epochs and at the end, loss only "
            "(data.generated_validation_rows=0); the command test computes exact_match",
        ),
        (
            {"validation": None},
            ValidationSchedule(None),
            "none, as data.validation gives no rows; the command test computes exact_match",
        ),
    ],
)
def test_it_says_when_a_run_validates_and_what_the_metrics_score(data, schedule, text, tmp_path):
    module = tiny_task(LoRA(rank=2, alpha=4, dropout=0.0, targets="attention"))
    run = trainer(tmp_path, schedule, **schedule.trainer_options)
    data = {"train": "ab", "validation": "h", **data}
    run.datamodule = rows = DataModule(processor=module.processor, read=read, **data)
    rows.setup("fit")
    assert _validation(run, rows, list(module.metrics)) == text


def test_the_batches_of_validation_are_printed_with_their_reason(tmp_path, capsys):
    data = {"train": "ab", "validation": "cdefg", "eval_batch_size": "auto"}
    printed = overview(tmp_path, capsys, data=data, limit_val_batches=1.0)
    assert "Validation  batches of 5 rows (all rows of a process), loss only" in printed


def test_compiled_and_recomputed_blocks_are_printed():
    module = tiny_task(LoRA(rank=2, alpha=4, dropout=0.0, targets="attention"))
    module.speed = Speed()
    checkpoint_blocks(module.model)
    rows = DataModule(processor=module.processor, read=read, train="abc")
    count = len(blocks_of(module.model))
    recomputed = f"{count} of {count} blocks recomputed, 0 workers for data"
    assert _speed(module, rows) == f"not compiled, {recomputed}"
    module.speed.compiled = True
    assert _speed(module, rows) == f"compiled blocks, {recomputed}"


@pytest.mark.parametrize(
    ("rows_per_step", "limits", "text"),
    [
        (2, {}, "2 rows per optimizer step, padded in one micro-batch per rank"),
        (50, {}, "4 rows per optimizer step, padded in one micro-batch per rank"),
        (2, {"most_tokens": 1200}, "padded in micro-batches of up to 1,200 tokens"),
        (2, {"packed": True, "count": 1}, "packed in one micro-batch per rank"),
        (2, {"packed": True, "count": 3}, "packed in 3 micro-batches per rank"),
    ],
)
def test_the_micro_batches_of_a_step_are_printed(rows_per_step, limits, text, tmp_path):
    module = tiny_task(LoRA(rank=2, alpha=4, dropout=0.0, targets="attention"))
    run = trainer(tmp_path)
    sizes = {"batch_size": "auto", "rows_per_step": rows_per_step}
    rows = DataModule(processor=module.processor, read=read, train="abde", **sizes)
    run.datamodule = rows
    rows.setup("fit")
    options = {"packed": False, "count": None, "most_tokens": None, **limits}
    rows.cut_steps(ActivationCosts(), 1e9, **options)
    assert _batches(run, rows).endswith(text)


def test_a_row_cannot_control_the_terminal():
    module = tiny_task(LoRA(rank=2, alpha=4, dropout=0.0, targets="attention"))
    sample = module.processor.encode(read("z", None)[0])
    assert "⟦\\x1b[2J<|im_end|>⟧" in marked(sample, module.processor).plain


@pytest.mark.parametrize("length", [10, 5000])
def test_a_long_text_is_cut_in_its_middle(length):
    module = tiny_task(LoRA(rank=2, alpha=4, dropout=0.0, targets="attention"))
    words = " ".join(f"w{number}" for number in range(length))
    turns = (Turn(role="user", parts=(words,)), Turn(role="assistant", parts=("no",)))
    sample = module.processor.encode(Conversation(id="long", turns=turns))
    text = marked(sample, module.processor).plain
    assert "w5 w6" in text
    assert f"w{length - 1}" in text
    assert len(text) < 900
