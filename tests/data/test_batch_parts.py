"""A part of a batch is the batch of its rows, padded as the whole batch."""

import dataclasses

import pytest
import torch
from PIL import Image
from tiny import tiny_family

from qwenvl_lit.data.batch_parts import split_batch
from qwenvl_lit.data.collate import Pad
from qwenvl_lit.types import Conversation, ImageSource, Turn


def samples() -> list:
    """Rows with 2, 0, 1, 0 and 3 images, and answers of different lengths."""
    processor = tiny_family().processor()
    encoded = []
    for index, images in enumerate((2, 0, 1, 0, 3)):
        pictures = [Image.new("RGB", (9, 9), (40 * index, 50 * n, 0)) for n in range(images)]
        question = Turn(role="user", parts=(*map(ImageSource, pictures), "what" * (index + 1)))
        answer = Turn(role="assistant", parts=("yes" * (5 - index),))
        row = Conversation(id=str(index), index=index, turns=(question, answer))
        encoded.append(processor.encode(row))
    return encoded


def content(batch, row: int) -> dict[str, list]:
    """What a row of a batch holds, without padding."""
    width = batch.input_ids.shape[1]
    kept = batch.attention_mask[row].bool()
    start = int(kept.int().argmax())
    content = {}
    for name in ("vision_positions", "target_positions"):
        positions = getattr(batch, name)
        mine = positions[(positions >= row * width) & (positions < (row + 1) * width)]
        content[name] = (mine - row * width - start).tolist()
    content["ids"] = batch.input_ids[row][kept].tolist()
    content["labels"] = batch.labels[row][kept].tolist()
    return content


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_parts_have_the_rows_of_the_batch_with_their_images(side, rows):
    all_samples = samples()
    pad = Pad(pad_id=0, side=side)
    batch = dataclasses.replace(pad(all_samples), dropped=("broken",))
    parts = split_batch(batch, rows)
    assert [len(part.conversations) for part in parts] == [rows] * (5 // rows) + [5 % rows] * (
        5 % rows > 0
    )
    assert [part.dropped for part in parts] == [("broken",)] + [()] * (len(parts) - 1)
    first = 0
    for part in parts:
        count = len(part.conversations)
        alone = pad(all_samples[first : first + count])
        assert part.conversations == alone.conversations
        assert part.lengths == alone.lengths
        assert part.input_ids.shape == (count, batch.input_ids.shape[1])
        for row in range(count):
            assert content(part, row) == content(alone, row)
        assert torch.equal(part.vision["pixel_values"], alone.vision["pixel_values"])
        first += count


def test_a_batch_that_is_small_enough_is_not_copied():
    batch = Pad(pad_id=0)(samples())
    assert split_batch(batch, 5) == [batch]
