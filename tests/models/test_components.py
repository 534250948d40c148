import pytest
from small_network import small_network
from torch import nn

from qwenvl_lit.models.components import blocks_of, network_of, replace_method
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.adapters.methods import LoRA


def test_blocks_are_those_of_the_tower_and_of_the_language_model():
    paths = list(blocks_of(small_network()))
    assert paths == [
        "transformer.h.0",
        "transformer.h.1",
        "transformer.visual.transformer.resblocks.0",
        "transformer.visual.transformer.resblocks.1",
    ]


def test_the_network_is_found_inside_an_adapter():
    network = small_network()
    adapter = LoRA(rank=2, alpha=4, dropout=0.0, targets=["c_attn"])
    assert network_of(adapter.apply(network, QwenVLFamily)) is network_of(network) is network


def test_a_replaced_method_is_called_with_the_arguments_of_forward_and_can_be_restored():
    block = blocks_of(small_network())["transformer.visual.transformer.resblocks.0"]
    names = set(block.state_dict())
    replace_method(block, "compute", lambda x: ("replaced", x))
    assert block(3) == ("replaced", 3)
    assert set(block.state_dict()) == names
    replace_method(block, "compute", None)
    replace_method(block, "compute", None)
    assert "compute" not in vars(block)


def test_a_method_that_does_not_exist_is_not_replaced():
    with pytest.raises(TypeError, match="Linear has no method `compute`"):
        replace_method(nn.Linear(2, 2), "compute", lambda x: x)
