import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.training.adapters.merging import StartingCheckpoint, fingerprint
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.optim import AdamW
from qwenvl_lit.types import DataError
from tests.small_network import QUERIES, images, small_network, tensor, text

LANGUAGE_C_ATTN = r"transformer\.h\.\d+\.attn\.c_attn"


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_full_trains_every_parameter():
    model = Full().apply(small_network(), QwenVLFamily)
    assert trained(model) == {name for name, _ in model.named_parameters()}


def test_a_frozen_part_stays_and_a_part_inside_it_may_learn():
    model = Full(freeze=["vision"], train=["resampler"]).apply(
        small_network(), QwenVLFamily
    )
    names = trained(model)
    assert "transformer.h.0.attn.c_attn.weight" in names
    assert "transformer.visual.attn_pool.kv_proj.weight" in names
    assert not any(name.startswith("transformer.visual.transformer") for name in names)


def test_an_unknown_part_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no component vison; its components are vision, resampler"):
        Full(freeze=["vison"]).apply(small_network(), QwenVLFamily)


def test_lora_starts_as_the_base_model_and_trains_only_its_adapters():
    ids = tensor(text(9))
    expected = small_network()(input_ids=ids).logits
    model = LoRA(rank=2, alpha=4, dropout=0.0, targets=LANGUAGE_C_ATTN).apply(
        small_network(), QwenVLFamily
    )
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=0, rtol=0)
    assert {name.split(".")[-3] for name in trained(model)} == {"lora_A", "lora_B"}
    assert len(trained(model)) == 2 * 2  # A and B in two blocks


def test_merged_adapters_compute_the_same():
    adapter = LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")
    model = adapter.apply(small_network(), QwenVLFamily).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    ids = tensor(text(9))
    expected = model(input_ids=ids).logits
    merged = adapter.merge(model)
    assert isinstance(merged, QwenVLForCausalLM)
    # float32 sums in another order; logits go up to 6
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-3, rtol=0)


def test_a_target_that_matches_nothing_is_an_error_with_the_layers_there_are():
    with pytest.raises(
        ValueError,
        match=r"matches no module; .* layers lm_head, transformer\.h\.N\.attn\.c_attn",
    ):
        LoRA(rank=2, alpha=4, dropout=0.0, targets="q_proj").apply(
            small_network(), QwenVLFamily
        )


SIZES = {
    "lora": 4_194_304,
    "lora_all": 29_602_816,
    "lora_official": 112_197_632,
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
        return instantiate(
            compose("train", ["model=qwen_vl_chat", f"adapter={name}", *overrides]).adapter,
            _convert_="all",
        )


@pytest.mark.parametrize("name", SIZES)
def test_a_choice_trains_so_many_parameters_at_full_size(name):
    with torch.device("meta"):
        model = QwenVLForCausalLM(QwenVLConfig())
    model = choice(name).apply(model, QwenVLFamily)
    assert (
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        == SIZES[name]
    )


def test_every_choice_has_its_size_here():
    assert set(SIZES) == {file.stem for file in (config_folder() / "adapter").glob("*.yaml")}


def test_all_means_every_linear_layer_but_the_head():
    model = small_network()
    linear = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    } - {"lm_head"}
    adapted = {
        name.rpartition(".lora_A")[0].removeprefix("base_model.model.")
        for name in trained(choice("lora_all").apply(model, QwenVLFamily))
    }
    assert adapted - {""} == linear


def test_a_resampler_alone_learns():
    names = trained(choice("resampler_only").apply(small_network(), QwenVLFamily))
    assert names == {
        name
        for name, _ in small_network().named_parameters()
        if name.startswith("transformer.visual.attn_pool.")
    }


@pytest.mark.parametrize("name", ["lora", "lora_all", "lora_official", "dora", "rslora"])
def test_adapters_and_their_optimizer_states_are_float32_over_a_bf16_base(name):
    model = choice(name, "adapter.rank=2").apply(
        small_network().bfloat16(), QwenVLFamily
    )
    assert {tensor.dtype for tensor in model.parameters() if not tensor.requires_grad} == {
        torch.bfloat16
    }
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
    learned = [tensor for tensor in model.parameters() if tensor.requires_grad]
    assert {tensor.dtype for tensor in learned} == {torch.float32}
    assert {state.dtype for each in learned for state in optimizer.state[each].values()} == {
        torch.float32
    }


def test_settings_of_peft_are_passed_on_and_unknown_ones_named():
    model = LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear", options={"bias": "all"}).apply(
        small_network(), QwenVLFamily
    )
    assert any(name.endswith("bias") for name in trained(model))
    with pytest.raises(ValueError, match=r"adapter\.options has use_dorra"):
        LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear", options={"use_dorra": True}).apply(
            small_network(), QwenVLFamily
        )


ALL_LINEAR = LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")


def run_of(adapter, folder, base=None) -> tuple[StartingCheckpoint, torch.nn.Module]:
    """What a run with `adapter` learned (noise), its checkpoint in `folder`, and its model."""
    model = base.merge_into(small_network(), QwenVLFamily) if base else small_network()
    model = adapter.apply(model, QwenVLFamily).eval()
    names = trained(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.add_(
                    torch.randn(
                        parameter.shape, generator=torch.Generator().manual_seed(len(name))
                    ),
                    alpha=0.1,
                )
    file = folder / f"{len(list(folder.iterdir()))}.ckpt"
    torch.save(
        {
            "state_dict": {
                f"model.{name}": value
                for name, value in model.state_dict().items()
                if name in names
            }
        },
        file,
    )
    return StartingCheckpoint(
        checkpoint=str(file), sha256=fingerprint(file), adapter=adapter, init=base
    ), model


@pytest.mark.parametrize(
    "adapter",
    [Full(), Full(freeze=["vision"], train=["resampler"]), ALL_LINEAR],
    ids=["full", "frozen", "lora"],
)
def test_what_a_run_learned_is_folded_into_the_weights_and_all_is_open_to_training_again(
    adapter, tmp_path
):
    learned, model = run_of(adapter, tmp_path)
    folded = learned.merge_into(small_network(), QwenVLFamily)
    assert isinstance(folded, QwenVLForCausalLM)
    ids = tensor(text(9))
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(
        folded(input_ids=ids).logits, expected, atol=1e-3, rtol=0
    )  # as for merged adapters
    assert trained(folded) == trained(small_network())


def test_a_run_on_top_of_a_run_on_top_of_a_run(tmp_path):
    first, _ = run_of(Full(), tmp_path)
    second, model = run_of(ALL_LINEAR, tmp_path, first)
    third = ALL_LINEAR.apply(
        second.merge_into(small_network(), QwenVLFamily), QwenVLFamily
    )
    ids = tensor(text(9))
    torch.testing.assert_close(
        third(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-3, rtol=0
    )


def test_a_base_that_has_moved_or_changed_or_is_of_another_model_is_named(tmp_path):
    learned, _ = run_of(ALL_LINEAR, tmp_path)
    other = StartingCheckpoint(
        checkpoint=str(learned.checkpoint), sha256=learned.sha256, adapter=Full()
    )
    with pytest.raises(
        DataError, match=r"0\.ckpt belongs to another model or adapter: the checkpoint lacks"
    ):
        other.merge_into(small_network(), QwenVLFamily)
    wider = StartingCheckpoint(
        checkpoint=str(learned.checkpoint),
        sha256=learned.sha256,
        adapter=LoRA(rank=3, alpha=4, dropout=0.0, targets="all-linear"),
    )
    with pytest.raises(
        DataError, match=r"0\.ckpt belongs to another model or adapter: .*\n.*size mismatch"
    ):
        wider.merge_into(small_network(), QwenVLFamily)
    learned.checkpoint.write_bytes(learned.checkpoint.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"0\.ckpt is not the checkpoint that the run started from"):
        learned.merge_into(small_network(), QwenVLFamily)
    learned.checkpoint.unlink()
    with pytest.raises(
        DataError, match=r"0\.ckpt is missing, and the run started from it.*init\.checkpoint=PATH"
    ):
        learned.merge_into(small_network(), QwenVLFamily)
