import pytest
import torch
from PIL import Image

from qwenvl_lit.data.collate import Pack, Pad, target_positions
from qwenvl_lit.families.qwen_vl import QwenVL
from qwenvl_lit.types import Conversation, Dropped, Picture, Sample, Turn

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "intermediate_size": 64,
    "visual": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2, "mlp_ratio": 2.0, "output_dim": 32, "n_queries": 4},
}
SIZES["visual"]["resampler_heads"] = 2


def talk(*answers: str, pictures: int) -> Conversation:
    shown = tuple(Picture(Image.new("RGB", (20, 30), (40 * k, 99, 7))) for k in range(pictures))
    turns = [turn for one in answers for turn in (Turn(role="user", parts=("What?",)), Turn(role="assistant", parts=(one,)))]
    return Conversation(id=answers[0], turns=(Turn(role="user", parts=(*shown, "What?")), *turns[1:]))


def sample(ids: list[int], labels: list[int], picture_at: list[int] = ()) -> Sample:
    return Sample(
        conversation=Conversation(id=str(ids), turns=()),
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        vision_positions=torch.tensor(picture_at, dtype=torch.int64),
        vision={"pixel_values": torch.full((1 if picture_at else 0, 2), float(ids[0]))},
    )


SHORT = sample([1, 2], [-100, 2])
LONG = sample([3, 4, 5, 6], [-100, -100, 5, 6], picture_at=[1, 2])


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


def test_pictures_are_joined_in_order_and_rows_may_have_none():
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
    batch = Pack(pad_id=9)([LONG, SHORT, LONG])
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 1, 2, 3, 4, 5, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3]]
    assert batch.attention_mask is None
    assert batch.vision_positions.tolist() == [1, 2, 7, 8]
    assert batch.target_positions.tolist() == [1, 2, 4, 7, 8]
    assert batch.vision["pixel_values"].tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_no_packed_sample_learns_to_predict_the_next_one():
    learned_from_the_start = sample([7, 8], [7, 8])
    batch = Pack(pad_id=9)([SHORT, learned_from_the_start])
    assert batch.labels.tolist() == [[-100, 2, -100, 8]]
    assert batch.target_positions.tolist() == [0, 2]


@pytest.mark.parametrize("collate", [Pad(pad_id=9), Pack(pad_id=9)], ids=["pad", "pack"])
def test_dropped_rows_are_left_out_and_named(collate):
    batch = collate([SHORT, Dropped("a.jsonl:3: broken"), LONG])
    whole = collate([SHORT, LONG])
    assert batch.dropped == ("a.jsonl:3: broken",)
    assert whole.dropped == ()
    assert batch.input_ids.tolist() == whole.input_ids.tolist()
    assert batch.target_positions.tolist() == whole.target_positions.tolist()


@pytest.mark.parametrize("collate", [Pad(pad_id=9), Pad(pad_id=9, side="left"), Pack(pad_id=9)], ids=["right", "left", "pack"])
def test_of_a_batch_without_rows_two_pad_tokens_are_left(collate):
    batch = collate([Dropped("one"), Dropped("two")])
    assert batch.input_ids.tolist() == [[9, 9]]
    assert batch.conversations == ()
    assert batch.dropped == ("one", "two")
    assert not len(batch.target_positions)
    assert not len(batch.vision_positions)


@pytest.mark.parametrize("supervise", ["answers", "official"])
def test_packing_gives_the_same_loss_as_padding(supervise):
    """The mean over all supervised tokens; float32 sums in another order, 2e-7 apart at most."""
    family = QwenVL(config=SIZES, vocabulary="tiny", supervise=supervise)
    processor, model = family.processor(), family.load().train()
    samples = [processor.encode(talk(*answers, pictures=count)) for count, answers in enumerate([("a car",), ("2", "a tree"), ("no",)])]
    losses = {}
    for collate in (Pad(pad_id=processor.pad_id), Pack(pad_id=processor.pad_id)):
        batch = collate(samples)
        losses[type(collate)] = model(**family.inputs(batch)).loss
        gradient = torch.autograd.grad(losses[type(collate)], model.transformer.wte.weight)[0]
        losses[f"gradient of {type(collate)}"] = gradient.norm()
    padded, padded_gradient, packed, packed_gradient = losses.values()
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=0)
    torch.testing.assert_close(packed_gradient, padded_gradient, rtol=1e-5, atol=0)
    alone = [
        model(**family.inputs(Pack(pad_id=processor.pad_id)([one]))).loss * len(Pack(pad_id=0)([one]).target_positions) for one in samples
    ]
    torch.testing.assert_close(packed, sum(alone) / len(batch.target_positions), rtol=1e-5, atol=0)
