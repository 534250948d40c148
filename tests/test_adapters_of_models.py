"""What each file of conf/adapter trains of each kind of model. No weights."""

import pytest
from commands import compose_config
from hydra.utils import instantiate

from qwenvl_lit.models.components import network_of
from qwenvl_lit.runs.config_folder import config_folder

MODELS = ("qwen_vl_tiny", "qwen2_5_vl_tiny", "qwen3_vl_tiny")
ADAPTERS = {path.stem for path in (config_folder() / "adapter").glob("*.yaml")}
OF_QWEN_VL = "lora_swift26"
ATTENTION = {"lora", "dora", "rslora", "qlora"}
LANGUAGE = {"lora_language", "lora_official"}
# Layers of a block of the language model that are adapted
ATTENTION_LAYERS = {
    "qwen_vl_tiny": {"c_attn"},
    "qwen2_5_vl_tiny": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "qwen3_vl_tiny": {"q_proj", "k_proj", "v_proj", "o_proj"},
}
FURTHER_LAYERS = {
    "qwen_vl_tiny": {"c_proj", "w1", "w2"},
    "qwen2_5_vl_tiny": {"gate_proj", "up_proj", "down_proj"},
    "qwen3_vl_tiny": {"gate_proj", "up_proj", "down_proj"},
}


def trained_names(model: str, adapter: str) -> tuple[set[str], dict[str, str]]:
    """The names of trained tensors, and the components of the family."""
    config = compose_config("train", f"model={model}", f"adapter={adapter}")
    family = instantiate(config.model, _convert_="all")
    method = instantiate(config.adapter, _convert_="all")
    network = network_of(method.apply(family.meta_model(), family))
    names = {name for name, tensor in network.named_parameters() if tensor.requires_grad}
    return names, dict(family.components)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("adapter", sorted(ATTENTION | LANGUAGE))
def test_an_adapter_on_a_group_means_the_same_of_every_model(model, adapter):
    names, components = trained_names(model, adapter)
    assert all(name.startswith(components["language"]) for name in names)
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in names}
    further = FURTHER_LAYERS[model] if adapter in LANGUAGE else set()
    assert layers == ATTENTION_LAYERS[model] | further


@pytest.mark.parametrize("model", MODELS)
def test_an_adapter_on_all_linear_layers_reaches_the_tower_and_spares_the_head(model):
    names, components = trained_names(model, "lora_all")
    for component in ("vision", "resampler", "language"):
        assert any(name.startswith(f"{components[component]}.") for name in names), component
    assert not any(name.startswith(components["head"]) for name in names)


@pytest.mark.parametrize("model", MODELS)
def test_components_are_frozen_by_name(model):
    names, components = trained_names(model, "resampler_only")
    assert names
    assert all(name.startswith(components["resampler"]) for name in names)
    names, components = trained_names(model, "freeze_vision")
    in_vision = {name for name in names if name.startswith(components["vision"])}
    assert all(name.startswith(components["resampler"]) for name in in_vision)
    assert any(name.startswith(components["language"]) for name in names)


@pytest.mark.parametrize("model", MODELS[1:])
def test_paths_of_another_model_match_nothing_and_the_error_names_the_groups(model):
    groups = "choose attention, language, all-linear, or some of the linear layers"
    with pytest.raises(ValueError, match=rf"^adapter\.targets=.* matches no module; {groups}"):
        trained_names(model, OF_QWEN_VL)


def test_every_adapter_is_tested():
    assert (
        ATTENTION
        | LANGUAGE
        | {
            "lora_all",
            "resampler_only",
            "freeze_vision",
            "full",
            OF_QWEN_VL,
        }
        == ADAPTERS
    )
