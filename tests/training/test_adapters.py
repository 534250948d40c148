"""Fine-tuning methods, and checkpoints merged into the weights."""

import re

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from small_network import QUERIES, images, small_config, small_network, tensor, text

from qwenvl_lit.models.qwen_vl.config import QWEN_VL_VISUAL, QwenVLConfig
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.training.adapters.merging import MergedWeights, StartingCheckpoint, fingerprint
from qwenvl_lit.training.adapters.methods import Full, LoRA, warn_of_few_layers
from qwenvl_lit.training.optim import AdamW
from qwenvl_lit.types import DataError

# Merged weights give float32 sums in another order; logits go up to 6.
MERGED = {"atol": 1e-3, "rtol": 0}


def lora(targets="all-linear", *, rank: int = 2, **options) -> LoRA:
    return LoRA(rank=rank, alpha=4, dropout=0.0, targets=targets, **options)


ALL_LINEAR = lora()


def adapted(adapter, model=None):
    return adapter.apply(model or small_network(), QwenVLFamily)


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def disturb(model) -> None:
    """Adds noise to all trained tensors."""
    names = trained(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                draw = torch.Generator().manual_seed(len(name))
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)


def test_full_trains_every_parameter():
    model = adapted(Full())
    assert trained(model) == {name for name, _ in model.named_parameters()}


def test_a_component_inside_a_frozen_one_can_be_trained():
    names = trained(adapted(Full(freeze=["vision"], train=["resampler"])))
    assert "transformer.h.0.attn.c_attn.weight" in names
    assert "transformer.visual.attn_pool.kv_proj.weight" in names
    assert not any(name.startswith("transformer.visual.transformer") for name in names)


def test_an_unknown_component_is_named_with_the_known_ones():
    expected = r"no component vison; its components are vision, resampler"
    with pytest.raises(ValueError, match=expected):
        adapted(Full(freeze=["vison"]))


def test_lora_starts_as_the_base_model_and_trains_only_its_adapters():
    ids = tensor(text(9))
    expected = small_network()(input_ids=ids).logits
    model = adapted(lora("attention"))
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=0, rtol=0)
    assert {name.split(".")[-3] for name in trained(model)} == {"lora_A", "lora_B"}
    assert len(trained(model)) == 2 * 2  # A and B in two blocks


@pytest.mark.parametrize("group", QwenVLFamily.lora_targets)
def test_a_group_of_the_family_is_its_pattern(group):
    named, pattern = adapted(lora(group)), adapted(lora(QwenVLFamily.lora_targets[group]))
    assert trained(named) == trained(pattern)
    assert named.peft_config["default"].target_modules == QwenVLFamily.lora_targets[group]


def test_merged_adapters_compute_the_same():
    model = adapted(ALL_LINEAR).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    ids = tensor(text(9))
    expected = model(input_ids=ids).logits
    merged = ALL_LINEAR.merge(model)
    assert isinstance(merged, QwenVLForCausalLM)
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, **MERGED)


@pytest.mark.parametrize("targets", ["gate_proj", ["gate_proj"], ["c_attn", "gate_proj"]])
def test_a_target_that_matches_nothing_is_an_error_with_the_layers_there_are(targets):
    layers = r"linear layers lm_head, transformer\.h\.N\.attn\.c_attn"
    choices = rf"gate_proj matches no module; choose attention, language, all-linear, .* {layers}"
    with pytest.raises(ValueError, match=choices):
        adapted(lora(targets))


SIZES = {
    "lora": 4_194_304,
    "lora_language": 14_024_704,
    "lora_all": 29_602_816,
    "lora_official": 112_197_632,
    "lora_swift26": 17_891_328,
    "dora": 4_587_520,
    "rslora": 33_554_432,
    "qlora": 4_194_304,
    "full": 9_655_886_592,
    "freeze_vision": 7_796_330_496,
    "resampler_only": 75_005_952,
}


def choice(name: str, *overrides: str):
    """The adapter that `adapter=NAME` gives for the published models."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", ["model=qwen_vl_chat", f"adapter={name}", *overrides])
    return instantiate(config.adapter, _convert_="all")


@pytest.mark.parametrize("name", SIZES)
def test_each_adapter_config_trains_its_number_of_parameters_at_full_size(name):
    with torch.device("meta"):
        model = QwenVLForCausalLM(QwenVLConfig(visual=QWEN_VL_VISUAL))
    model = adapted(choice(name), model)
    sizes = [tensor.numel() for tensor in model.parameters() if tensor.requires_grad]
    assert sum(sizes) == SIZES[name]


def test_every_adapter_config_has_its_size_here():
    assert set(SIZES) == {file.stem for file in (config_folder() / "adapter").glob("*.yaml")}


def test_all_linear_means_every_linear_layer_but_the_head():
    model = small_network()
    linear = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            linear.add(name)
    with_adapter = set()
    for name in trained(adapted(choice("lora_all"), model)):
        if ".lora_A" in name:
            with_adapter.add(name.rpartition(".lora_A")[0].removeprefix("base_model.model."))
    assert with_adapter == linear - {"lm_head"}


def test_the_resampler_can_be_trained_alone():
    names = {name for name, _ in small_network().named_parameters()}
    resampler = {name for name in names if name.startswith("transformer.visual.attn_pool.")}
    assert trained(adapted(choice("resampler_only"))) == resampler


@pytest.mark.parametrize("name", ["lora", "lora_all", "lora_official", "dora", "rslora"])
def test_adapters_and_their_optimizer_states_are_float32_on_bfloat16_base_weights(name):
    model = adapted(choice(name, "adapter.rank=2"), small_network().bfloat16())
    frozen = {tensor.dtype for tensor in model.parameters() if not tensor.requires_grad}
    assert frozen == {torch.bfloat16}
    optimizer, _ = AdamW(lr=1e-3).build(model, 2)
    ids = tensor(text(9))
    with torch.autocast("cpu", torch.bfloat16):
        model(
            input_ids=ids,
            labels=ids,
            pixel_values=images(1),
            vision_positions=torch.arange(1, 1 + QUERIES),
        ).loss.backward()
    optimizer.step()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            states = optimizer.state[parameter].values()
            assert {state.dtype for state in states} == {torch.float32}


def test_options_are_passed_to_peft_and_unknown_ones_named():
    model = adapted(lora(options={"bias": "all"}))
    assert any(name.endswith("bias") for name in trained(model))
    with pytest.raises(ValueError, match=r"adapter\.options has use_dorra"):
        adapted(lora(options={"use_dorra": True}))


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "x"])
def test_initializations_that_change_the_base_weights_are_refused_by_name(name):
    message = rf"init_lora_weights='{name}' is not supported: .* choose true, false, gaussian, orth"
    with pytest.raises(ValueError, match=message):
        lora(options={"init_lora_weights": name})


@pytest.mark.parametrize("name", [True, False, "gaussian", "orthogonal"])
def test_other_initializations_work_on_the_outline_too(name):
    model = lora("attention", options={"init_lora_weights": name}).apply(
        SmallFamily.meta_model(), QwenVLFamily
    )
    assert len(trained(model)) == 4


def test_an_adapter_on_few_layers_is_named_with_what_it_covers(caplog):
    with torch.device("meta"):
        model = QwenVLForCausalLM(QwenVLConfig(num_hidden_layers=4, visual=QWEN_VL_VISUAL))
    warn_of_few_layers(adapted(lora("attention"), model), QwenVLFamily)
    assert not caplog.messages
    for targets in (["q_proj", "v_proj"], ["out_proj"], r"transformer\.h\.3\.attn\.c_proj"):
        with torch.device("meta"):
            model = QwenVLForCausalLM(QwenVLConfig(num_hidden_layers=4, visual=QWEN_VL_VISUAL))
        warn_of_few_layers(adapted(lora(targets), model), QwenVLFamily)
    llama, vision, block = caplog.messages
    assert (
        "covers only 1.0 % of the weights of all linear layers, none of them in the lang" in llama
    )
    assert re.search(r"transformer\.visual\.attn_pool\.attn\.q_proj +1  16,777,216\n", llama)
    assert llama.endswith("choose adapter.targets=attention, language or all-linear")
    assert re.search(r"resblocks\.N\.attn\.out_proj +48  132,907,008\n", vision)
    assert "none of them" not in block


def run_of(adapter, folder, init=None) -> tuple[StartingCheckpoint, torch.nn.Module]:
    """A checkpoint in `folder` of a run with `adapter` that trained noise, and its model."""
    model = small_network()
    if init:
        model = init.merge_into(model, QwenVLFamily)
    model = adapted(adapter, model).eval()
    disturb(model)
    names, state = trained(model), model.state_dict()
    tensors = {f"model.{name}": state[name] for name in state if name in names}
    file = folder / f"{len(list(folder.iterdir()))}.ckpt"
    torch.save({"state_dict": tensors}, file)
    start = StartingCheckpoint(
        checkpoint=str(file), sha256=fingerprint(file), adapter=adapter, init=init
    )
    return start, model


@pytest.mark.parametrize(
    "adapter",
    [Full(), Full(freeze=["vision"], train=["resampler"]), ALL_LINEAR],
    ids=["full", "frozen", "lora"],
)
def test_a_merged_checkpoint_computes_the_same_and_all_is_trainable_again(adapter, tmp_path):
    start, model = run_of(adapter, tmp_path)
    merged = start.merge_into(small_network(), QwenVLFamily)
    assert isinstance(merged, QwenVLForCausalLM)
    ids = tensor(text(9))
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, **MERGED)
    assert trained(merged) == trained(small_network())


def test_a_run_can_start_from_a_run_that_started_from_a_run(tmp_path):
    first, _ = run_of(Full(), tmp_path)
    second, model = run_of(ALL_LINEAR, tmp_path, first)
    third = adapted(ALL_LINEAR, second.merge_into(small_network(), QwenVLFamily))
    ids = tensor(text(9))
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(third(input_ids=ids).logits, expected, **MERGED)


def test_a_starting_checkpoint_of_another_model_or_that_has_changed_is_named(tmp_path):
    start, _ = run_of(ALL_LINEAR, tmp_path)
    file = str(start.checkpoint)
    other = StartingCheckpoint(checkpoint=file, sha256=start.sha256, adapter=Full())
    different_tensors = r"0\.ckpt belongs to another model or adapter: .* lacks trained tensors"
    with pytest.raises(DataError, match=different_tensors):
        other.merge_into(small_network(), QwenVLFamily)
    wider = StartingCheckpoint(checkpoint=file, sha256=start.sha256, adapter=lora(rank=3))
    different_shapes = r"0\.ckpt belongs to another model .* has shape \(2, 32\), expected"
    with pytest.raises(DataError, match=different_shapes):
        wider.merge_into(small_network(), QwenVLFamily)
    start.checkpoint.write_bytes(start.checkpoint.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"0\.ckpt is not the checkpoint that the run started from"):
        start.merge_into(small_network(), QwenVLFamily)
    start.checkpoint.unlink()
    missing = r"0\.ckpt is missing, and the run started from it.*init\.checkpoint=PATH"
    with pytest.raises(DataError, match=missing):
        start.merge_into(small_network(), QwenVLFamily)


class SmallFamily:
    """The family of `small_network`."""

    components = QwenVLFamily.components
    lora_targets = QwenVLFamily.lora_targets

    @staticmethod
    def meta_model() -> QwenVLForCausalLM:
        with torch.device("meta"):
            return QwenVLForCausalLM(small_config())


@pytest.mark.parametrize(
    "adapter",
    [
        Full(),
        Full(freeze=["vision"]),
        ALL_LINEAR,
        lora(options={"use_dora": True}),
        lora(options={"bias": "all"}),
        lora("attention", options={"modules_to_save": ["lm_head"]}),
    ],
    ids=["full", "frozen", "lora", "dora", "biases", "whole layers"],
)
def test_weights_merged_one_by_one_are_those_merged_at_once(adapter, tmp_path):
    """`MergedWeights` depends on the layers of peft; this fails if they change."""
    start, _ = run_of(adapter, tmp_path)
    base = small_network().state_dict()
    merged = MergedWeights(
        base.__getitem__, family=SmallFamily, adapter=adapter, checkpoint=start.checkpoint
    )
    expected = start.merge_into(small_network(), SmallFamily).state_dict()
    for _ in range(2):  # layers can be merged again
        for name in base:
            assert torch.equal(merged(name), expected[name]), name
