from dataclasses import replace

import pytest
import torch
from PIL import Image

from qwenvl_lit.data.collate import Pack, Pad, target_positions
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.types import Conversation, Dropped, ImageSource, Sample, Turn

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "intermediate_size": 64,
    "visual": {
        "image_size": 16,
        "patch_size": 8,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "mlp_ratio": 2.0,
        "output_dim": 32,
        "n_queries": 4,
    },
}
SIZES["visual"]["resampler_heads"] = 2


def talk(*answers: str, images: int) -> Conversation:
    shown = tuple(ImageSource(Image.new("RGB", (20, 30), (40 * k, 99, 7))) for k in range(images))
    turns = [
        turn
        for one in answers
        for turn in (Turn(role="user", parts=("What?",)), Turn(role="assistant", parts=(one,)))
    ]
    return Conversation(
        id=answers[0], turns=(Turn(role="user", parts=(*shown, "What?")), *turns[1:])
    )


def sample(ids: list[int], labels: list[int], image_at: list[int] = ()) -> Sample:
    return Sample(
        conversation=Conversation(id=str(ids), turns=()),
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        vision_positions=torch.tensor(image_at, dtype=torch.int64),
        vision={"pixel_values": torch.full((1 if image_at else 0, 2), float(ids[0]))},
    )


SHORT = sample([1, 2], [-100, 2])
LONG = sample([3, 4, 5, 6], [-100, -100, 5, 6], image_at=[1, 2])
PACK = Pack(pad_id=9, max_tokens=12, max_rows=3, longest=4)


def test_training_rows_are_padded_on_the_right():
    batch = Pad(pad_id=9)([SHORT, LONG])
    assert batch.input_ids.tolist() == [[1, 2, 9, 9], [3, 4, 5, 6]]
    assert batch.labels.tolist() == [[-100, 2, -100, -100], [-100, -100, 5, 6]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.vision_positions.tolist() == [5, 6]
    assert batch.target_positions.tolist() == [0, 5, 6]


def test_prompts_are_padded_on_the_left():
    batch = Pad(pad_id=9, side="left")([LONG, SHORT])
    assert batch.input_ids.tolist() == [[3, 4, 5, 6], [9, 9, 1, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch.vision_positions.tolist() == [1, 2]


def test_positions_point_at_what_they_name():
    batch = Pad(pad_id=9, side="left")([SHORT, LONG, SHORT])
    assert batch.input_ids.flatten()[batch.vision_positions].tolist() == [4, 5]
    successors = batch.labels.flatten()[batch.target_positions + 1]
    assert successors.tolist() == [2, 5, 6, 2]


def test_images_are_joined_in_order_and_rows_may_have_none():
    batch = Pad(pad_id=9)([SHORT, LONG, LONG])
    assert batch.vision["pixel_values"].tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_the_first_token_of_a_row_is_never_a_target():
    assert target_positions(torch.tensor([[5, -100], [6, 7]])).tolist() == [2]


def test_a_batch_moves_as_a_whole():
    batch = Pad(pad_id=9)([SHORT, LONG]).to("meta")
    assert batch.input_ids.is_meta
    assert batch.vision["pixel_values"].is_meta
    assert batch.position_ids is None
    assert batch.conversations[0].id == "[1, 2]"


def test_packed_samples_follow_each_other_and_their_positions_restart():
    batch = PACK([LONG, SHORT, LONG])
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 9, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 5, 6, -100, 2, -100, -100, 5, 6, -100, -100]]
    assert batch.attention_mask is None
    assert batch.vision_positions.tolist() == [1, 2, 7, 8]
    assert batch.target_positions.tolist() == [1, 2, 4, 7, 8]
    assert batch.vision["pixel_values"].tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert batch.lengths == (4, 2, 4)


@pytest.mark.parametrize(
    ("samples", "bounds"),
    [
        ([LONG, SHORT, LONG], [0, 4, 6, 10, 12, 12, 12, 12]),
        ([LONG, LONG, LONG], [0, 4, 8, 12, 12, 12, 12, 12]),  # without padding
        (
            [SHORT],
            [0, 2, 6, 10, 12, 12, 12, 12],
        ),  # no segment of padding is longer than the longest sample may be
        ([], [0, 4, 8, 12, 12, 12, 12, 12]),
    ],
)
def test_bounds_of_packed_samples_have_one_shape_whatever_their_number(samples, bounds):
    batch = PACK(samples)
    assert batch.segment_bounds.tolist() == bounds
    assert batch.segment_bounds.dtype == torch.int32
    assert batch.longest_segment == 4
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (1, 12)


@pytest.mark.parametrize(
    "samples",
    [[SHORT] * 4, [LONG, LONG, LONG, LONG], [sample([1] * 5, [1] * 5)]],
    ids=["many", "much", "long"],
)
def test_samples_that_do_not_fit_into_a_row_are_refused(samples):
    with pytest.raises(
        ValueError, match=r"do not fit into Pack\(pad_id=9, max_tokens=12, max_rows=3, longest=4\)"
    ):
        PACK(samples)


def test_no_packed_sample_learns_to_predict_the_next_one():
    learned_from_the_start = sample([7, 8], [7, 8])
    batch = PACK([SHORT, learned_from_the_start])
    assert batch.labels.tolist() == [[-100, 2, -100, 8, *[-100] * 8]]
    assert batch.target_positions.tolist() == [0, 2]


@pytest.mark.parametrize("collate", [Pad(pad_id=9), PACK], ids=["pad", "pack"])
def test_dropped_rows_are_left_out_and_named(collate):
    batch = collate([SHORT, Dropped("a.jsonl:3: broken"), LONG])
    whole = collate([SHORT, LONG])
    assert batch.dropped == ("a.jsonl:3: broken",)
    assert whole.dropped == ()
    assert batch.input_ids.tolist() == whole.input_ids.tolist()
    assert batch.target_positions.tolist() == whole.target_positions.tolist()
    assert batch.lengths == whole.lengths == (2, 4)


@pytest.mark.parametrize(
    ("collate", "tokens"),
    [(Pad(pad_id=9), 2), (Pad(pad_id=9, side="left"), 2), (PACK, 12)],
    ids=["right", "left", "pack"],
)
def test_of_a_batch_without_rows_padding_is_left(collate, tokens):
    batch = collate([Dropped("one"), Dropped("two")])
    assert batch.input_ids.tolist() == [[9] * tokens]
    assert batch.conversations == batch.lengths == ()
    assert batch.dropped == ("one", "two")
    assert not len(batch.target_positions)
    assert not len(batch.vision_positions)


@pytest.mark.parametrize("supervise", ["answers", "official"])
def test_packing_gives_the_same_loss_as_padding(supervise):
    """The mean over all supervised tokens; float32 sums in another order, 2e-7 apart at most."""
    family = QwenVLFamily(config=SIZES, vocabulary="tiny", supervise=supervise)
    processor, model = family.processor(), family.load().train()
    samples = [
        processor.encode(talk(*answers, images=count))
        for count, answers in enumerate([("a car",), ("2", "a tree"), ("no",)])
    ]
    lengths = [len(one.input_ids) for one in samples]
    limits = {"pad_id": processor.pad_id, "max_rows": 3, "longest": max(lengths)}
    full, filled = (
        Pack(**limits, max_tokens=sum(lengths) + padding) for padding in (0, max(lengths) + 7)
    )
    padded, gradients = loss_of(model, family, batch := Pad(pad_id=processor.pad_id)(samples))
    for pack in (full, filled):
        packed, found = loss_of(model, family, pack(samples))
        torch.testing.assert_close(packed, padded, rtol=1e-5, atol=0)
        torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-6)
    alone = [
        loss_of(model, family, one)[0] * len(one.target_positions)
        for one in (filled([sample]) for sample in samples)
    ]
    torch.testing.assert_close(sum(alone) / len(batch.target_positions), padded, rtol=1e-5, atol=0)


def loss_of(model, family, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**family.inputs(batch)).loss
    loss.backward()
    return loss.detach(), {name: tensor.grad.clone() for name, tensor in model.named_parameters()}


def test_no_packed_sample_sees_another():
    """Ids and images of one sample are changed: what the others learn from stays as it was, to the last bit."""
    family = QwenVLFamily(config=SIZES, vocabulary="tiny")
    processor, model = family.processor(), family.load().train()
    first, middle, last = (
        processor.encode(talk(answer, images=1)) for answer in ("a car", "a tree", "no")
    )
    vision = {"pixel_values": 255 - middle.vision["pixel_values"]}
    other = replace(
        middle, input_ids=middle.input_ids.where(middle.labels == -100, 7), vision=vision
    )
    pack = Pack(pad_id=processor.pad_id, max_tokens=150, max_rows=3, longest=50)
    one, two = (pack([first, changed, last]) for changed in (middle, other))
    logits = [
        model(**family.inputs(batch) | {"labels": None, "target_positions": None}).logits[0]
        for batch in (one, two)
    ]
    start, stop = len(first.input_ids), len(first.input_ids) + len(middle.input_ids)
    changed = (logits[0] != logits[1]).any(-1)
    assert changed[start:stop].any()
    assert not changed[:start].any()
    assert not changed[stop:].any()


def test_a_row_of_padding_makes_a_step_with_gradients_of_zero():
    family = QwenVLFamily(config=SIZES, vocabulary="tiny")
    model = family.load().train()
    output = model(**family.inputs(Pack(pad_id=0, max_tokens=50, max_rows=3, longest=20)([])))
    assert output.logits.shape[1] == 1
    (output.logits.sum() * 0).backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in model.parameters())


def test_packed_rows_have_their_bounds_under_the_names_of_transformers_kernels():
    inputs = QwenVLFamily(config=SIZES, vocabulary="tiny").inputs(PACK([SHORT, SHORT]))
    assert (
        inputs["cu_seq_lens_q"].tolist()
        == inputs["cu_seq_lens_k"].tolist()
        == [0, 2, 4, 8, 12, 12, 12, 12]
    )
    assert inputs["max_length_q"] == inputs["max_length_k"] == 4
    assert "attention_mask" not in inputs
