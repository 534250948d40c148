import pytest
import torch
from small_qwen3_vl import (
    IMAGE_PAD,
    KINDS,
    PROMPTS,
    Prompt,
    for_transformers,
    original_network,
    padded,
    prompt,
    small_network,
)

from qwenvl_lit.models.qwen3_vl.positions import axis_positions

ALL_IMAGES = prompt((2, 2), (1, 4), (3, 1), 1, seed=5)  # no text between them but their borders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_those_of_transformers(kind, side):
    network = small_network(kind)
    inputs = padded([*PROMPTS, ALL_IMAGES], network.config, side=side)
    given = for_transformers(inputs)
    positions, deltas = original_network(network).model.get_rope_index(
        given["input_ids"],
        mm_token_type_ids=given["mm_token_type_ids"],
        image_grid_thw=given["image_grid_thw"],
        attention_mask=given["attention_mask"],
    )
    assert torch.equal(inputs["position_ids"], positions)
    assert deltas.flatten().tolist() == [delta_of(one) for one in (*PROMPTS, ALL_IMAGES)]


def delta_of(one: Prompt) -> int:
    """By how much the position of the next token differs from the number of tokens."""
    return int(one.positions.max()) + 1 - len(one.ids)


def test_text_is_counted_on_all_axes():
    assert torch.equal(axis_positions(4, []), torch.arange(4).expand(3, -1))


def test_text_goes_on_after_the_longer_side_of_an_image():
    one = prompt(1, (2, 5), 2)
    after = one.ids.index(IMAGE_PAD) + 10
    # One text token and <|vision_start|> come before the image, whose width is 5
    assert one.positions[:, after].tolist() == [2 + 5] * 3
