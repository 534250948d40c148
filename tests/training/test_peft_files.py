"""Adapter folders that others wrote: their settings, and those that cannot be used."""

import json

import pytest
import torch
from safetensors.torch import save_file
from small_network import small_network

from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.adapters.merging import read_trained_state
from qwenvl_lit.training.adapters.methods import LoRA
from qwenvl_lit.training.adapters.peft_files import adapter_node, read_peft_config, weights_file
from qwenvl_lit.types import DataError

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["c_attn"]}


@pytest.fixture
def folder(tmp_path):
    """Returns a function that writes an adapter folder with tensors of these names.

    `changes` replace settings; None removes one.
    """

    def write(names=(), **changes):
        config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        if names:
            tensors = {name: torch.zeros(2, 2) for name in names}
            save_file(tensors, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return write


def test_settings_become_arguments_of_lora_and_defaults_are_left_out(folder):
    path = folder(
        use_rslora=True,
        bias="none",
        lora_dtype="fp32",
        megatron_core="megatron.core",
        use_qa_lora=False,
        rank_pattern={"w1": 8},
    )
    assert adapter_node(path) == {
        "_target_": "qwenvl_lit.training.adapters.methods.LoRA",
        "rank": 4,
        "alpha": 16,
        "dropout": 0.0,
        "targets": ["c_attn"],
        "options": {"use_rslora": True, "rank_pattern": {"w1": 8}},
        "quantization": None,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3; only LORA"),
        ({"peft_type": None}, "peft_type None"),
        ({"target_modules": None}, "lacks target_modules"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights=pissa_niter_4 has changed the base weights too",
        ),
        ({"use_magic": True}, "has use_magic=True, which the installed peft does not know"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(folder, changes, message):
    with pytest.raises(DataError, match=message):
        adapter_node(folder(**changes))


def test_broken_and_missing_files_are_named(folder):
    path = folder()
    with pytest.raises(DataError, match=r"no adapter_model\.safetensors or adapter_model\.bin"):
        weights_file(path)
    (path / "adapter_model.bin").write_bytes(b"half")
    with pytest.raises(DataError, match=r"adapter_model\.bin cannot be read"):
        weights_file(path)
    (path / "adapter_config.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        read_peft_config(path)


def test_an_adapter_on_the_resamplers_attention_as_one_module_is_refused(folder):
    path = folder(["base_model.model.transformer.visual.attn_pool.attn.lora_A.weight"])
    with pytest.raises(DataError, match="adapts the resampler's attention as one module"):
        weights_file(path)


def test_tensors_that_the_model_does_not_have_are_named(folder):
    adapter = LoRA(rank=2, alpha=4, dropout=0.0, targets=["c_attn"])
    adapted = adapter.apply(small_network(), QwenVLFamily)
    file = weights_file(folder(["base_model.model.transformer.h.7.attn.c_attn.lora_A.weight"]))
    message = r"1 tensors that this model does not have \(.*h\.7.*is it the base"
    with pytest.raises(DataError, match=message):
        read_trained_state(file, adapted)


def test_a_target_that_is_not_a_linear_layer_is_named():
    adapter = LoRA(rank=2, alpha=4, dropout=0.0, targets=r".*visual.*\.attn")
    message = (
        r"matches transformer\.visual.*attn, which is not a linear, embedding or convolution layer"
    )
    with pytest.raises(ValueError, match=message):
        adapter.apply(small_network(), QwenVLFamily)
