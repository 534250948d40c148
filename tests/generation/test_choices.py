"""Options are as likely in a batch as each alone after its prompt; the likeliest is the answer."""

import json

import pytest
import torch
from small_network import IMAGE, image_positions, images, padded, small_network, tensor, text
from tiny import tiny_family
from toy_task import trainer

from qwenvl_lit.data.collate import Pad
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.micro_batches import BatchLimit, CutRows
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.generation.choices import option_losses
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.metrics.exact_match import ExactMatch
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.types import Conversation, DataError, Turn

OPTIONS = [[[5], [6, 8], [11, 12, 13]], [[21, 22], [23]], [[5], [6]]]


def test_options_are_as_likely_as_each_alone():
    model, pixels = small_network(), images(2)
    rows = [IMAGE + text(5), text(3), IMAGE + text(9, seed=2)]
    images_of_rows = [{"pixel_values": pixels[:1]}, {}, {"pixel_values": pixels[1:]}]
    ids, mask = padded(rows, side="left")
    inputs = {
        "input_ids": tensor(*ids),
        "attention_mask": mask,
        "pixel_values": pixels,
        "vision_positions": image_positions(ids),
    }
    losses_of_rows = option_losses(model, inputs, OPTIONS)
    for row, image, options, losses in zip(
        rows, images_of_rows, OPTIONS, losses_of_rows, strict=True
    ):
        expected = []
        for option in options:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row + option]), **image).logits
            option_logits = logits[0, len(row) - 1 : -1]
            loss = torch.nn.functional.cross_entropy(option_logits, torch.tensor(option))
            expected.append(loss.item())
        assert losses == pytest.approx(expected, abs=1e-5)


def test_losses_that_are_not_finite_are_an_error():
    model = small_network()
    model.lm_head.weight.data[6] *= torch.nan
    ids, mask = padded([text(3)], side="left")
    inputs = {"input_ids": tensor(*ids), "attention_mask": mask}
    with pytest.raises(DataError, match="losses of an option of 1 of 1 prompts are not finite"):
        option_losses(model, inputs, OPTIONS[:1])


@pytest.fixture
def file(folder) -> str:
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
    question = "Context: N/A\nQuestion: Which?\nOptions: A. red\nB. blue\nC. old\nAnswer:"
    assert first.prompt().turns[0].parts[1] == question
    assert first.options == ("A", "B", "C")
    assert first.answer.parts == ("C",)
    assert first.columns == {"subject": "art"}
    assert second.turns[0].parts[1].startswith("Context: Count.\n")
    assert second.options == ("A", "B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["one"]}, "list of 2 to 8 texts"),
        ({"answer": 3}, "0 to 1"),
        ({"choices": [1, 2]}, "2 to 8 texts"),
    ],
)
def test_a_mistake_in_choices_is_named(read_row, change, message):
    row = {"image": "a.png", "question": "Which?", "choices": ["red", "blue"], "answer": 0}
    with pytest.raises(DataError, match=message):
        read_row(row | change)


def choosing_module(**metrics) -> VisionLanguageModule:
    module = VisionLanguageModule(
        family=tiny_family(),
        adapter=None,
        generation=Generation(max_new_tokens=2),
        metrics=metrics,
    )
    module.configure_model()
    return module


def test_the_likeliest_option_is_the_prediction_and_is_scored(file, tmp_path):
    module = choosing_module(accuracy=ExactMatch())
    processor = module.processor
    data = DataModule(processor=processor, read=read_rows, test=file, eval_batch_size=2)
    tested = trainer(tmp_path)
    tested.test(module, data, verbose=False)
    pad, right = (
        Pad(pad_id=processor.pad_id, collate_vision=processor.collate_vision, side="left"),
        0,
    )
    rows = read_rows(file)
    for row in rows:
        batch = pad([processor.encode(row, prompt=True)])
        (prediction,) = module.predict(batch)
        inputs = module.family.inputs(batch, generate=True)
        (losses,) = option_losses(module.model, inputs, [processor.option_ids(row)])
        assert prediction.text == row.options[losses.index(min(losses))]
        right += prediction.text == row.answer.parts[0]
    assert tested.callback_metrics["test/accuracy"] == right / len(rows)


def test_options_follow_a_raw_prompt_with_a_space():
    chat, raw = tiny_family().processor(), tiny_family(template="raw").processor()
    row = Conversation(id="1", turns=(Turn(role="user", parts=("Answer:",)),), options=("A", "B"))
    assert [chat.text(ids) for ids in chat.option_ids(row)] == ["A", "B"]
    assert [chat.text(ids) for ids in raw.option_ids(row)] == [" A", " B"]


def test_rows_with_and_without_options_may_be_in_a_batch():
    module = choosing_module()
    rows = []
    for index in range(5):
        turns = (Turn(role="user", parts=(f"Which? {'?' * index}",)),)
        options = ("A", "B") if index in (1, 2, 4) else ()
        rows.append(Conversation(id=str(index), index=index, turns=turns, options=options))
    pad = Pad(
        pad_id=module.processor.pad_id, collate_vision=module.processor.collate_vision, side="left"
    )
    samples = [module.processor.encode(row, prompt=True) for row in rows]
    alone = [module.predict(pad([sample]))[0].text for sample in samples]
    cut = CutRows(pad=pad, limit=BatchLimit(), options_apart=True)
    batches = cut(samples)
    assert [len(batch.conversations) for batch in batches] == [1, 2, 1, 1]
    assert [answer.text for answer in module.predict(batches)] == alone
    data = DataModule(
        processor=module.processor, read=lambda *_: rows, test="rows", eval_batch_size=2
    )
    data.setup("predict")
    (loader,) = data.predict_dataloader()
    kinds = [[bool(row.options) for row in batch.conversations] for [batch] in loader]
    assert kinds == [[False, False], [True, True], [True]]
    answers = {}
    for batch in loader:
        for answer in module.predict(batch):
            answers[answer.conversation.id] = answer.text
    assert [answers[row.id] for row in rows] == alone
