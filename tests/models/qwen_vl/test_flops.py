import pytest

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
from qwenvl_lit.models.qwen_vl.flops import forward_flops, training_flops, training_passes

FULL_SIZE = QwenVLConfig()
PARTS = ("vision", "resampler", "embeddings", "language", "head")


def test_a_token_costs_two_operations_a_weight():
    """32 layers of 4 x 4096 x 4096 and 3 x 4096 x 11008 weights: 6.48e9."""
    assert forward_flops(FULL_SIZE, tokens=1, squares=0, images=0, targets=0)[
        "language"
    ] == 2 * 32 * (67_108_864 + 135_266_304)


def test_attention_of_a_sample_costs_half_of_its_square():
    """Queries times keys and weights times values, 4096 wide, two operations each, for half of the pairs."""
    assert (
        forward_flops(FULL_SIZE, tokens=0, squares=100**2, images=0, targets=0)["language"]
        == 32 * 2 * 2 * 4096 * 100**2 / 2
    )


def test_a_image_costs_4_1_teraflop():
    work = forward_flops(FULL_SIZE, tokens=0, squares=0, images=1, targets=0)
    assert work["vision"] == pytest.approx(4.1e12, rel=0.005)
    assert work["resampler"] == pytest.approx(0.11e12, rel=0.05)


def test_a_logit_costs_two_operations_a_weight_of_the_head():
    assert (
        forward_flops(FULL_SIZE, tokens=0, squares=0, images=0, targets=3)["head"]
        == 3 * 2 * 4096 * 151_936
    )


@pytest.mark.parametrize(
    ("trained", "passes"),
    [
        (
            {"language": 0.001},
            (1, 0, 1, 2, 2),
        ),  # lora: gradients flow through the language model, and not into its weights
        ({"vision": 0.01, "resampler": 0.01, "language": 0.001}, (2, 2, 1, 2, 2)),  # lora_all
        (dict.fromkeys(PARTS, 1.0), (3, 3, 3, 3, 3)),  # full
        (
            {"resampler": 1.0, "embeddings": 1.0, "language": 1.0, "head": 1.0},
            (1, 3, 3, 3, 3),
        ),  # official full: the tower is frozen
        ({"resampler": 1.0}, (1, 3, 1, 2, 2)),
        ({"head": 1.0}, (1, 0, 1, 1, 3)),
    ],
)
def test_work_is_counted_once_more_for_gradients_and_once_more_for_weights(trained, passes):
    assert tuple(training_passes(trained)[part] for part in PARTS) == passes


def test_a_sample_of_320_tokens_and_a_image_is_12_5_teraflop_with_lora():
    counts = {"lengths": [320], "targets": 20, "trained": {"language": 0.001}}
    assert training_flops(FULL_SIZE, images=1, **counts) == pytest.approx(12.5e12, rel=0.001)
    assert training_flops(FULL_SIZE, images=0, **counts) == pytest.approx(8.4e12, rel=0.002)


def test_a_step_costs_what_its_samples_cost():
    counts = {"images": 0, "targets": 0, "trained": {"language": 1.0}}
    alone = [training_flops(FULL_SIZE, lengths=[length], **counts) for length in (3, 5)]
    assert (
        training_flops(FULL_SIZE, lengths=(3, 5), **counts)
        == sum(alone)
        < training_flops(FULL_SIZE, lengths=[8], **counts)
    )
