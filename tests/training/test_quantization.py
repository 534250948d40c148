"""Bases of 4 bits. What needs bitsandbytes and its GPU code is marked so."""

import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from make_checkpoint import write_checkpoint

from qwenvl_lit import build
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.quantization import NF4
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.tokenizer import TINY_VOCABULARY
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.training.adapters.merging import StartingCheckpoint, fingerprint
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.types import DataError

DEVICE = "cuda"
SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 64,
    "intermediate_size": 256,
    "visual": {
        "image_size": 16,
        "patch_size": 8,
        "width": 64,
        "layers": 1,
        "heads": 2,
        "mlp_ratio": 2.0,
        "output_dim": 128,
        "n_queries": 4,
        "resampler_heads": 2,
    },
}


def qlora(**changes):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        node = compose(
            "train", ["model=qwen_vl_chat", "adapter=qlora", "adapter.dropout=0"]
        ).adapter
    return instantiate(node, **changes, _convert_="all")


def family(**options) -> QwenVLFamily:
    return QwenVLFamily(config=SIZES, vocabulary="tiny", dtype="bfloat16", **options)


def task(base: StartingCheckpoint | None = None, **options) -> VisionLanguageModule:
    made = VisionLanguageModule(
        family=QwenVLFamily(**options),
        adapter=qlora(targets="all-linear"),
        init=base,
        generation=Generation(),
        metrics={},
    )
    made.home = torch.device(DEVICE)
    made.configure_model()
    return made


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install .*\.\[quant\]"):
        family().load(quantization=qlora().quantization)


def test_an_unknown_setting_is_named():
    with pytest.raises(ValueError, match=r"BitsAndBytesConfig has no bits, but load_in_8bit"):
        family().load(quantization={"bits": 4})


def test_four_bits_to_answer_are_those_to_train_over():
    assert qlora().quantization == NF4 == family(load_in_4bit=True).quantization
    assert family().quantization is None


def test_a_model_that_is_held_in_4_bits_to_answer_is_not_trained():
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", ["model=qwen_vl_chat", "model.load_in_4bit=true"])
    with pytest.raises(DataError, match="to train adapters over 4 bits: adapter=qlora"):
        build.module(config)


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(family().load(), TINY_VOCABULARY, tmp_path / "F")
    return tmp_path / "F"


@pytest.mark.gpu
def test_every_linear_layer_but_the_head_has_four_bits_and_adapters_over_them_learn(folder):
    made = task(path=str(folder), dtype="bfloat16")
    base = made.model.get_base_model()
    kinds = {
        name: type(module).__name__
        for name, module in base.named_modules()
        if hasattr(module, "in_features") and "lora_" not in name
    }
    assert kinds.pop("lm_head") == "Linear"
    assert set(kinds.values()) == {"Linear4bit"}
    assert any("visual.attn_pool" in name for name in kinds)
    assert base.transformer.wte.weight.dtype == base.lm_head.weight.dtype == torch.bfloat16
    ids = torch.arange(1, 12, device=DEVICE)[None]
    pixels = torch.randn(1, 3, 16, 16, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        made.model(
            input_ids=ids,
            labels=ids,
            pixel_values=pixels,
            vision_positions=torch.arange(2, 6, device=DEVICE),
        ).loss.backward()
    for name, tensor in made.model.named_parameters():
        if tensor.requires_grad:
            assert tensor.dtype == torch.float32, name
            assert tensor.grad is not None, name


@pytest.mark.gpu
def test_what_a_run_learned_is_folded_in_before_bits_are_taken(folder, tmp_path):
    published = QwenVLFamily(path=str(folder), dtype="bfloat16")
    learned = {name: tensor + 0.1 for name, tensor in published.load().named_parameters()}
    torch.save(
        {"state_dict": {f"model.{name}": tensor for name, tensor in learned.items()}},
        tmp_path / "run.ckpt",
    )
    base = StartingCheckpoint(
        checkpoint=str(tmp_path / "run.ckpt"),
        sha256=fingerprint(tmp_path / "run.ckpt"),
        adapter=Full(),
    )
    made = task(base, path=str(folder), dtype="bfloat16")
    whole = base.merge_into(published.load(), published.components)
    expected = published.quantized(whole, DEVICE, qlora().quantization)
    ids = torch.arange(1, 12, device=DEVICE)[None]
    torch.testing.assert_close(
        made.model(input_ids=ids).logits, expected.train()(input_ids=ids).logits, atol=0, rtol=0
    )
    assert torch.equal(expected.transformer.ln_f.weight.cpu(), learned["transformer.ln_f.weight"])


def answering(folder, adapter=None) -> VisionLanguageModule:
    made = VisionLanguageModule(
        family=QwenVLFamily(path=str(folder), dtype="bfloat16", load_in_4bit=True),
        adapter=adapter,
        generation=Generation(),
        metrics={},
    )
    made.home = torch.device(DEVICE)
    return made


@pytest.mark.gpu
def test_what_whole_weights_learned_is_there_before_4_bits_are_taken(folder, tmp_path):
    """Also if the model as it was has answered before."""
    published = QwenVLFamily(path=str(folder), dtype="bfloat16")
    whole = published.load()
    made, ids = answering(folder, Full()), torch.arange(1, 12, device=DEVICE)[None]
    for shift in (0.0, 0.1):
        whole.load_state_dict({name: tensor + shift for name, tensor in whole.state_dict().items()})
        if shift:
            learned = {
                f"model.{name}": tensor
                for name, tensor in whole.named_parameters()
                if tensor.requires_grad
            }
            torch.save({"state_dict": learned}, tmp_path / "run.ckpt")
            made.trained = tmp_path / "run.ckpt"
        made.configure_model()
        expected = published.quantized(whole, DEVICE, NF4)
        assert type(made.model.transformer.h[0].mlp.w1).__name__ == "Linear4bit"
        torch.testing.assert_close(
            made.model.eval()(input_ids=ids).logits, expected(input_ids=ids).logits, atol=0, rtol=0
        )


@pytest.mark.gpu
def test_an_adapter_of_a_run_answers_over_4_bits(folder, tmp_path):
    lora = LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")
    ids = torch.arange(1, 12, device=DEVICE)[None]
    made = answering(folder, lora)
    made.configure_model()
    untrained = made.model.eval()(input_ids=ids).logits
    torch.save(
        {"state_dict": {name: made.state_dict()[name] + 0.1 for name in made.trainable_names()}},
        tmp_path / "run.ckpt",
    )
    made.trained = tmp_path / "run.ckpt"
    made.configure_model()
    base = made.model.get_base_model()
    assert type(base.transformer.h[0].mlp.w1.base_layer).__name__ == "Linear4bit"
    assert all(
        tensor.dtype == torch.float32 for name, tensor in base.named_parameters() if "lora_" in name
    )
    assert not torch.allclose(made.model(input_ids=ids).logits, untrained)
