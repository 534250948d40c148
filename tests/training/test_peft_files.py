"""Adapter folders that others wrote: their settings, and those that cannot be used."""

import json
import re

import pytest
import torch
from hydra.utils import instantiate
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from small_network import small_network

from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.adapters.merging import apply_trained, read_trained_state
from qwenvl_lit.training.adapters.methods import LoRA
from qwenvl_lit.training.adapters.peft_files import (
    KNOWN_SINCE_0_9,
    adapter_node,
    newer_settings,
    pattern_of,
    read_peft_config,
    weights_file,
    write_peft_folder,
)
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


def layer(path: str, *, kinds: str = "AB") -> list[str]:
    return [f"base_model.model.{path}.lora_{kind}.weight" for kind in kinds]


def test_settings_become_arguments_of_lora_and_defaults_are_left_out(folder):
    path = folder(
        layer("transformer.h.0.attn.c_attn"),
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
        "targets": r"transformer\.h\.(0)\.(attn\.c_attn)",
        "options": {"use_rslora": True, "rank_pattern": {"w1": 8}},
        "quantization": None,
    }


# What ms-swift 2.6.1 writes as `target_modules`: its default, and ALL
SWIFT_DEFAULT = r"^(transformer.h)(?!.*(lm_head|output|emb|wte|shared)).*"
SWIFT_ALL = ["w1", "c_fc", "w2", "out_proj", "kv_proj", "in_proj", "c_proj", "c_attn"]
LANGUAGE = ("attn.c_attn", "attn.c_proj", "mlp.c_proj", "mlp.w1", "mlp.w2")
VISION = ("attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")


def written_adapter(path, model, layers, target_modules, **changes):
    """Writes an adapter folder with noise for these layers of `model`; returns its tensors."""
    draw, tensors = torch.Generator().manual_seed(0), {}
    for name in layers:
        weight = model.get_submodule(name).weight
        for kind, shape in {"A": (4, weight.shape[1]), "B": (weight.shape[0], 4)}.items():
            key = f"base_model.model.{name}.lora_{kind}.weight"
            tensors[key] = torch.randn(shape, generator=draw)
    config = {**CONFIG, "target_modules": target_modules, **changes}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    return tensors


def language_layers() -> list[str]:
    layers = []
    for block in range(2):
        layers += [f"transformer.h.{block}.{name}" for name in LANGUAGE]
    return layers


def all_layers() -> list[str]:
    """The linear layers that ms-swift adapts with ALL: not the resampler's attention."""
    layers = [*language_layers(), "transformer.visual.attn_pool.kv_proj"]
    for block in range(2):
        prefix = f"transformer.visual.transformer.resblocks.{block}"
        layers += [f"{prefix}.{name}" for name in VISION]
    return layers


def loaded(path):
    """The network with the adapter of a folder."""
    adapter, model = instantiate(adapter_node(path), _convert_="all"), small_network()
    return apply_trained(adapter, model, QwenVLFamily, weights_file(path))


@pytest.mark.parametrize(
    ("layers", "targets", "changes", "ignored"),
    [
        (language_layers(), SWIFT_DEFAULT, {}, None),
        (all_layers(), SWIFT_ALL, {}, "transformer.visual.attn_pool.attn.out_proj"),
        (language_layers()[:1], ["c_attn"], {"layers_to_transform": [0]}, None),
        (language_layers()[:1], ["c_attn"], {}, "transformer.h.N.attn.c_attn"),
        (language_layers()[:1], ["h.0.attn.c_attn", "gate_proj"], {}, "gate_proj"),
        (language_layers(), "all-linear", {}, None),
    ],
    ids=["swift", "swift ALL", "some blocks", "fewer blocks", "unknown target", "all-linear"],
)
def test_the_tensors_of_a_file_say_which_layers_are_adapted(
    layers, targets, changes, ignored, tmp_path, caplog
):
    tensors = written_adapter(tmp_path, small_network(), layers, targets, **changes)
    adapted = loaded(tmp_path)
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor), name
    loaded(tmp_path)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("qwenvl")]
    assert len(said) == (ignored is not None), "said once"
    if ignored:
        assert f"adapter_model.safetensors has no tensors for {ignored}" in said[0]


def test_an_adapter_for_another_network_is_named(tmp_path):
    model = torch.nn.Module()
    model.add_module("layers", torch.nn.Linear(4, 4))
    written_adapter(tmp_path, model, ["layers"], ["layers"])
    message = r"adapter_model\.safetensors does not fit this model; is it the base model that the"
    with pytest.raises(DataError, match=message):
        loaded(tmp_path)


def test_tensors_of_another_rank_than_the_settings_say_are_named(tmp_path):
    written_adapter(tmp_path, small_network(), language_layers(), ["c_attn"], r=8)
    message = r"belongs to another model or adapter: .* has shape \(4, 32\), expected \(8, 32\)"
    with pytest.raises(DataError, match=message):
        loaded(tmp_path)


def test_an_adapter_that_is_not_finite_is_named(tmp_path):
    tensors = written_adapter(tmp_path, small_network(), language_layers(), ["c_attn"])
    tensors[layer("transformer.h.1.mlp.w1")[0]][0, 0] = torch.nan
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(DataError, match=r"safetensors: .*h\.1\.mlp\.w1\.lora_A.* is not finite"):
        loaded(tmp_path)


def test_a_pattern_matches_exactly_the_given_layers():
    given = ["h.0.c_attn", "h.11.c_attn", "h.1.mlp.w1", "h.0.mlp.w1", "kv_proj", "a.2.b.3.c"]
    pattern = pattern_of(given)
    for path in given:
        assert re.fullmatch(pattern, path), path
    for other in (
        "h.1.c_attn",
        "h.10.c_attn",
        "h.11.mlp.w1",
        "xkv_proj",
        "a.2.b.4.c",
        "hx0.c_attn",
    ):
        assert not re.fullmatch(pattern, other), other


def test_a_written_folder_has_only_settings_that_peft_0_9_knows(tmp_path):
    adapter = LoRA(
        rank=2,
        alpha=4,
        dropout=0.1,
        targets="all-linear",
        options={"use_rslora": True, "init_lora_weights": "orthogonal"},
    )
    adapted = adapter.apply(small_network(), QwenVLFamily)
    write_peft_folder(adapted, tmp_path, adapted.state_dict(), base="F")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config) <= set(KNOWN_SINCE_0_9)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 4, 0.1)
    assert (config["use_rslora"], config["init_lora_weights"]) == (True, True)
    assert (config["task_type"], config["auto_mapping"]) == ("CAUSAL_LM", None)
    assert config["base_model_name_or_path"] == "F"
    assert config["target_modules"] == sorted(config["target_modules"])
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes["adapter_model.safetensors"] == modes["adapter_config.json"]
    assert newer_settings(tmp_path) == []


def test_a_setting_that_the_adapter_needs_is_kept_although_peft_0_9_does_not_know_it(tmp_path):
    adapter = LoRA(rank=2, alpha=4, dropout=0.0, targets="attention", options={"lora_bias": True})
    adapted = adapter.apply(small_network(), QwenVLFamily)
    write_peft_folder(adapted, tmp_path, adapted.state_dict())
    assert newer_settings(tmp_path) == ["lora_bias"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3; only LORA"),
        ({"peft_type": None}, "peft_type None"),
        ({"swift_type": "LORA"}, "tuner_backend swift; convert it: swift export --ckpt_dir /"),
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
    message = r"1 tensor that this model does not have \(.*h\.7.*is it the base"
    with pytest.raises(DataError, match=message):
        read_trained_state(file, adapted)


def test_a_target_that_is_not_a_linear_layer_is_named():
    adapter = LoRA(rank=2, alpha=4, dropout=0.0, targets=r".*visual.*\.attn")
    message = (
        r"matches transformer\.visual.*attn, which is not a linear, embedding or convolution layer"
    )
    with pytest.raises(ValueError, match=message):
        adapter.apply(small_network(), QwenVLFamily)
