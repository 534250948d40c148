import pytest

from qwenvl_lit.models.qwen_vl.config import QWEN_VL_VISUAL, QwenVLConfig
from qwenvl_lit.models.qwen_vl.flops import forward_flops, training_flops, training_passes

FULL_SIZE = QwenVLConfig(visual=QWEN_VL_VISUAL)
COMPONENTS = ("vision", "resampler", "embeddings", "language", "head")
NOTHING = {"tokens": 0, "squares": 0, "images": 0, "targets": 0}


def test_a_token_costs_two_operations_per_weight():
    """32 layers of 4 x 4096 x 4096 and 3 x 4096 x 11008 weights: 6.48e9."""
    flops = forward_flops(FULL_SIZE, **NOTHING | {"tokens": 1})
    assert flops["language"] == 2 * 32 * (67_108_864 + 135_266_304)


def test_attention_of_a_sample_costs_half_of_its_square():
    """Queries @ keys and weights @ values, 4096 wide, two operations each, for half the pairs."""
    flops = forward_flops(FULL_SIZE, **NOTHING | {"squares": 100**2})
    assert flops["language"] == 32 * 2 * 2 * 4096 * 100**2 / 2


def test_an_image_costs_4_1_teraflop():
    flops = forward_flops(FULL_SIZE, **NOTHING | {"images": 1})
    assert flops["vision"] == pytest.approx(4.1e12, rel=0.005)
    assert flops["resampler"] == pytest.approx(0.11e12, rel=0.05)


def test_a_logit_costs_two_operations_per_weight_of_the_head():
    flops = forward_flops(FULL_SIZE, **NOTHING | {"targets": 3})
    assert flops["head"] == 3 * 2 * 4096 * 151_936


LORA = {"language": 0.001}
LORA_ALL = {"vision": 0.01, "resampler": 0.01, "language": 0.001}
FULL = dict.fromkeys(COMPONENTS, 1.0)
FROZEN_VISION = {"resampler": 1.0, "embeddings": 1.0, "language": 1.0, "head": 1.0}


@pytest.mark.parametrize(
    ("trained", "passes"),
    [
        (LORA, (1, 0, 1, 2, 2)),  # gradients flow through the language model, not into its weights
        (LORA_ALL, (2, 2, 1, 2, 2)),
        (FULL, (3, 3, 3, 3, 3)),
        (FROZEN_VISION, (1, 3, 3, 3, 3)),  # the original's full fine-tuning
        ({"resampler": 1.0}, (1, 3, 1, 2, 2)),
        ({"head": 1.0}, (1, 0, 1, 1, 3)),
    ],
)
def test_work_counts_again_for_input_gradients_and_again_for_weight_gradients(trained, passes):
    assert tuple(training_passes(trained)[name] for name in COMPONENTS) == passes


def test_a_sample_of_320_tokens_and_an_image_is_12_5_teraflop_with_lora():
    counts = {"lengths": [320], "targets": 20, "trained": LORA}
    assert training_flops(FULL_SIZE, images=1, **counts) == pytest.approx(12.5e12, rel=0.001)
    assert training_flops(FULL_SIZE, images=0, **counts) == pytest.approx(8.4e12, rel=0.002)


def test_a_step_costs_the_sum_of_its_samples():
    counts = {"images": 0, "targets": 0, "trained": {"language": 1.0}}
    alone = [training_flops(FULL_SIZE, lengths=[length], **counts) for length in (3, 5)]
    together = training_flops(FULL_SIZE, lengths=(3, 5), **counts)
    assert together == sum(alone)
    assert together < training_flops(FULL_SIZE, lengths=[8], **counts)
