import pytest
import torch
from small_qwen3_vl import KINDS, PROMPTS, packed, small_network, with_targets
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qwenvl_lit.models.qwen3_vl.flops import forward_flops, training_flops


@pytest.mark.parametrize("kind", KINDS)
def test_the_flops_are_those_that_torch_counts(kind):
    network = small_network(kind)
    inputs = with_targets(packed(PROMPTS, network.config, padding=0))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        network(**inputs)
    flops = forward_flops(
        network.config,
        lengths=[len(one.ids) for one in PROMPTS],
        image_sizes=inputs["image_sizes"],
        targets=len(inputs["target_positions"]),
    )
    counted = counter.get_flop_counts()
    name = type(network).__name__
    merger = sum(counted[f"{name}.model.visual.merger"].values())
    assert flops["resampler"] == merger
    assert flops["vision"] == sum(counted[f"{name}.model.visual"].values()) - merger
    assert flops["head"] == sum(counted[f"{name}.lm_head"].values())
    language = 0
    for index in range(3):
        for operator, count in counted[f"{name}.model.language_model.layers.{index}"].items():
            is_attention = operator is torch.ops.aten.bmm
            language += count / 2 if is_attention else count  # torch counts all pairs of tokens
    assert flops["language"] == language


def test_a_step_counts_gradients_and_features_cost_nothing():
    config = small_network("qwen3_vl").config
    counts = {"lengths": [30], "image_sizes": [(4, 4)], "targets": 2}
    forward = forward_flops(config, **counts)
    assert training_flops(config, **counts, trained={}) == sum(forward.values())
    lora = {"language": 0.01}
    expected = sum(forward.values()) + forward["language"] + forward["head"]
    assert training_flops(config, **counts, trained=lora) == expected
    cached = training_flops(config, **counts | {"image_sizes": []}, trained=lora)
    assert cached == expected - forward["vision"] - forward["resampler"]
