import pytest
import torch

from qwenvl_lit.adapters import Full, LoRA
from qwenvl_lit.families.qwen_vl import QwenVL
from qwenvl_lit.models import QwenVLConfig, QwenVLForCausalLM
from tests.small_network import small_network, tensor, text

LANGUAGE_C_ATTN = r"transformer\.h\.\d+\.attn\.c_attn"


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_full_trains_every_parameter():
    model = Full().apply(small_network(), QwenVL.parts)
    assert trained(model) == {name for name, _ in model.named_parameters()}


def test_a_frozen_part_stays_and_a_part_inside_it_may_learn():
    model = Full(freeze=["vision"], train=["resampler"]).apply(small_network(), QwenVL.parts)
    names = trained(model)
    assert "transformer.h.0.attn.c_attn.weight" in names
    assert "transformer.visual.attn_pool.kv_proj.weight" in names
    assert not any(name.startswith("transformer.visual.transformer") for name in names)


def test_an_unknown_part_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no part vison; its parts are vision, resampler"):
        Full(freeze=["vison"]).apply(small_network(), QwenVL.parts)


def test_lora_starts_as_the_base_model_and_trains_only_its_adapters():
    ids = tensor(text(9))
    expected = small_network()(input_ids=ids).logits
    model = LoRA(rank=2, alpha=4, dropout=0.0, targets=LANGUAGE_C_ATTN).apply(small_network(), QwenVL.parts)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=0, rtol=0)
    assert {name.split(".")[-3] for name in trained(model)} == {"lora_A", "lora_B"}
    assert len(trained(model)) == 2 * 2  # A and B in two blocks


def test_merged_adapters_compute_the_same():
    adapter = LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")
    model = adapter.apply(small_network(), QwenVL.parts).eval()
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


def test_adapters_are_float32_over_a_bf16_base():
    model = LoRA(rank=2, alpha=4, dropout=0.0, targets=LANGUAGE_C_ATTN).apply(small_network().bfloat16(), QwenVL.parts)
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_a_target_that_matches_nothing_is_an_error_with_the_layers_there_are():
    with pytest.raises(ValueError, match=r"matches no module; linear layers are lm_head, transformer\.h\.N\.attn\.c_attn"):
        LoRA(rank=2, alpha=4, dropout=0.0, targets="q_proj").apply(small_network(), QwenVL.parts)


def test_the_default_adapter_has_4_194_304_parameters_at_full_size():
    with torch.device("meta"):
        model = QwenVLForCausalLM(QwenVLConfig())
    model = LoRA(rank=8, alpha=32, dropout=0.05, targets=LANGUAGE_C_ATTN).apply(model, QwenVL.parts)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 4_194_304
