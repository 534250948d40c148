"""Options are as likely together, in a batch, as each alone behind its prompt; the likeliest is the answer."""

import json

import pytest
import torch
from small_network import IMAGE, image_positions, images, padded, small_network, tensor, text
from tiny import tiny_family
from toy_task import trainer

from qwenvl_lit.data.collate import Pad
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.generation.choices import option_losses
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.metrics.exact_match import ExactMatch
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.types import Conversation, DataError, Turn

OPTIONS = [[[5], [6, 8], [11, 12, 13]], [[21, 22], [23]], [[5], [6]]]


def test_options_are_as_likely_as_each_alone():
    model, seen = small_network(), images(2)
    rows = [IMAGE + text(5), text(3), IMAGE + text(9, seed=2)]
    ids, mask = padded(rows, side="left")
    inputs = {
        "input_ids": tensor(*ids),
        "attention_mask": mask,
        "pixel_values": seen,
        "vision_positions": image_positions(ids),
    }
    losses = option_losses(model, inputs, OPTIONS)
    used = 0
    for row, options, found in zip(rows, OPTIONS, losses, strict=True):
        pixels = {"pixel_values": seen[used : used + 1]} if IMAGE[0] in row else {}
        used += bool(pixels)
        expected = []
        for option in options:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row + option]), **pixels).logits[
                    0, len(row) - 1 : -1
                ]
            expected.append(torch.nn.functional.cross_entropy(logits, torch.tensor(option)).item())
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def file(folder):
    rows = [
        {
            "image": "a.png",
            "question": "Which?",
            "choices": ["red", "blue", "old"],
            "hint": None,
            "answer": 2,
            "subject": "art",
        },
        {
            "image": "b.png",
            "question": "What?",
            "choices": ["one", "two"],
            "hint": "Count.",
            "answer": 0,
            "subject": "sums",
        },
    ]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "choices.jsonl")


def test_rows_with_choices_are_asked_as_published(file):
    first, second = read_rows(file)
    assert (
        first.prompt().turns[0].parts[1]
        == "Context: N/A\nQuestion: Which?\nOptions: A. red\nB. blue\nC. old\nAnswer:"
    )
    assert (first.options, first.answer.parts, first.columns) == (
        ("A", "B", "C"),
        ("C",),
        {"subject": "art"},
    )
    assert second.turns[0].parts[1].startswith("Context: Count.\n")
    assert second.options == ("A", "B")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"choices": ["one"]}, "list of 2 to 8 texts"),
        ({"answer": 3}, "0 to 1"),
        ({"choices": [1, 2]}, "2 to 8 texts"),
    ],
)
def test_a_mistake_in_choices_is_named(read_row, change, says):
    with pytest.raises(DataError, match=says):
        read_row(
            {
                "image": "a.png",
                "question": "Which?",
                "choices": ["red", "blue"],
                "answer": 0,
                **change,
            }
        )


def test_the_likeliest_option_is_the_prediction_and_is_scored(file, tmp_path):
    task = VisionLanguageModule(
        family=tiny_family(),
        adapter=None,
        generation=Generation(max_new_tokens=2),
        metrics={"accuracy": ExactMatch()},
    )
    task.configure_model()
    data = DataModule(processor=task.processor, read=read_rows, test=file, eval_batch_size=2)
    tested = trainer(tmp_path)
    tested.test(task, data, verbose=False)
    rows = read_rows(file)
    chosen = []
    for row in rows:
        batch = Pad(pad_id=task.processor.pad_id, side="left")(
            [task.processor.encode(row, prompt=True)]
        )
        [prediction] = task.predict(batch)
        [losses] = option_losses(
            task.model, task.family.inputs(batch, generate=True), [task.processor.option_ids(row)]
        )
        assert prediction.text == row.options[losses.index(min(losses))]
        chosen.append(prediction.text)
    expected = sum(text == row.answer.parts[0] for text, row in zip(chosen, rows, strict=True)) / 2
    assert tested.callback_metrics["test/accuracy"] == expected


def test_options_follow_a_raw_prompt_with_a_space():
    chat, raw = tiny_family().processor(), tiny_family()
    raw.prompting["template"] = "raw"
    row = Conversation(id="1", turns=(Turn(role="user", parts=("Answer:",)),), options=("A", "B"))
    assert [
        [chat.text(ids) for ids in processor.option_ids(row)]
        for processor in (chat, raw.processor())
    ] == [["A", "B"], [" A", " B"]]


def test_rows_with_and_without_options_are_not_answered_together(tmp_path):
    task = VisionLanguageModule(
        family=tiny_family(), adapter=None, generation=Generation(max_new_tokens=2), metrics={}
    )
    task.configure_model()
    rows = [
        Conversation(
            id=str(n), turns=(Turn(role="user", parts=("?",)),), options=("A", "B") if n else ()
        )
        for n in range(2)
    ]
    batch = Pad(pad_id=task.processor.pad_id, side="left")(
        [task.processor.encode(row, prompt=True) for row in rows]
    )
    with pytest.raises(DataError, match="row '0' has no options"):
        task.predict(batch)
