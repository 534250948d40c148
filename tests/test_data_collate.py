import torch

from qwenvl_lit.data.collate import Pad, target_positions
from qwenvl_lit.types import Conversation, Sample


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
