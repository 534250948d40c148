"""4-bit base weights. Tests that need bitsandbytes and its GPU kernels are marked `gpu`."""

import sys

import pytest
import tiny
import torch
from gptq_files import SETTINGS, write_gptq
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from make_checkpoint import write_checkpoint

from qwenvl_lit import build
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.quantization import NF4
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.training.adapters.merging import StartingCheckpoint, fingerprint
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.loading import load_model
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.types import DataError

DEVICE = "cuda"
SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 64,
    "intermediate_size": 256,
    "visual": {**tiny.VISUAL, "width": 64, "output_dim": 128, "resampler_heads": 2},
}


def qlora(**changes):
    overrides = ["model=qwen_vl_chat", "adapter=qlora", "adapter.dropout=0"]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        node = compose("train", overrides).adapter
    return instantiate(node, **changes, _convert_="all")


def family(**options) -> QwenVLFamily:
    return QwenVLFamily(config=SIZES, vocabulary="tiny", dtype="bfloat16", **options)


def published(folder, **options) -> QwenVLFamily:
    return QwenVLFamily(path=str(folder), dtype="bfloat16", **options)


def loaded(family: QwenVLFamily, adapter=None, **options) -> VisionLanguageModule:
    """A module on the GPU, with its weights."""
    module = VisionLanguageModule(
        family=family,
        adapter=adapter,
        generation=Generation(),
        metrics={},
        load_device=DEVICE,
        **options,
    )
    module.configure_model()
    return module


def save(tensors, file):
    """Writes a checkpoint with these tensors of the network."""
    state = {f"model.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": state}, file)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"needs the package bitsandbytes.*\[quant\]"):
        family().load(quantization=qlora().quantization)


def test_an_unknown_setting_is_named():
    message = "BitsAndBytesConfig has no argument bits; it has load_in_8bit"
    with pytest.raises(ValueError, match=message):
        family().load(quantization={"bits": 4})


def test_answering_and_training_quantize_in_the_same_way():
    assert qlora().quantization == NF4 == family(load_in_4bit=True).quantization
    assert family().quantization is None


def test_a_model_that_is_quantized_to_answer_is_not_trained():
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", ["model=qwen_vl_chat", "model.load_in_4bit=true"])
    with pytest.raises(DataError, match="to train adapters on a 4-bit model: adapter=qlora"):
        build.module(config)


class FakeQuantized(QwenVLFamily):
    """A family whose "4-bit" weights are bfloat16, to test the order of loading without a GPU."""

    def load(self, device="cpu", *, quantization=None):
        model = super().load(device)
        model.quantized = quantization is not None
        return model

    def quantize(self, model, device, quantization):
        model.quantized = True
        return model


def test_trained_base_weights_are_merged_before_quantizing(tmp_path):
    fake = FakeQuantized(config=SIZES, vocabulary="tiny", load_in_4bit=True)
    trained = {name: tensor + 0.1 for name, tensor in fake.load().named_parameters()}
    save(trained, tmp_path / "run.ckpt")
    model = load_model(fake, Full(), "cpu", trained_checkpoint=tmp_path / "run.ckpt")
    assert model.quantized
    assert torch.equal(model.lm_head.weight, trained["lm_head.weight"])
    adapter = LoRA(rank=2, alpha=4, dropout=0.0, targets="attention")
    assert load_model(fake, adapter, "cpu").get_base_model().quantized


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(family().load(), TINY_VOCABULARY, tmp_path / "F")
    return tmp_path / "F"


@pytest.mark.gpu
def test_every_linear_layer_but_the_head_is_4_bit_and_adapters_on_them_are_trained(folder):
    module = loaded(published(folder), qlora(targets="all-linear"))
    base = module.model.get_base_model()
    kinds = {}
    for name, layer in base.named_modules():
        if hasattr(layer, "in_features") and "lora_" not in name:
            kinds[name] = type(layer).__name__
    assert kinds.pop("lm_head") == "Linear"
    assert set(kinds.values()) == {"Linear4bit"}
    assert any("visual.attn_pool" in name for name in kinds)
    assert base.transformer.wte.weight.dtype == base.lm_head.weight.dtype == torch.bfloat16
    ids = torch.arange(1, 12, device=DEVICE)[None]
    with torch.autocast(DEVICE, torch.bfloat16):
        module.model(
            input_ids=ids,
            labels=ids,
            pixel_values=torch.randn(1, 3, 16, 16, device=DEVICE),
            vision_positions=torch.arange(2, 6, device=DEVICE),
        ).loss.backward()
    for name, tensor in module.model.named_parameters():
        if tensor.requires_grad:
            assert tensor.dtype == torch.float32, name
            assert tensor.grad is not None, name


@pytest.mark.gpu
def test_gptq_weights_are_dequantized_before_quantizing(folder, tmp_path):
    whole = write_gptq(folder, tmp_path / "Int4", SETTINGS).to(torch.bfloat16)
    module = loaded(published(tmp_path / "Int4"), qlora())
    expected = published(folder).quantize(whole, DEVICE, NF4).train()
    ids = torch.arange(1, 12, device=DEVICE)[None]
    torch.testing.assert_close(
        module.model(input_ids=ids).logits, expected(input_ids=ids).logits, atol=0, rtol=0
    )


@pytest.mark.gpu
def test_a_starting_checkpoint_is_merged_before_quantizing(folder, tmp_path):
    family, file = published(folder), tmp_path / "run.ckpt"
    trained = {name: tensor + 0.1 for name, tensor in family.load().named_parameters()}
    save(trained, file)
    start = StartingCheckpoint(checkpoint=str(file), sha256=fingerprint(file), adapter=Full())
    module = loaded(family, qlora(targets="all-linear"), init=start)
    whole = start.merge_into(family.load(), family)
    expected = family.quantize(whole, DEVICE, qlora().quantization).train()
    ids = torch.arange(1, 12, device=DEVICE)[None]
    torch.testing.assert_close(
        module.model(input_ids=ids).logits, expected(input_ids=ids).logits, atol=0, rtol=0
    )
    assert torch.equal(expected.transformer.ln_f.weight.cpu(), trained["transformer.ln_f.weight"])


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [None, 0.1], ids=["untrained", "trained"])
def test_fully_fine_tuned_weights_are_there_before_quantizing(folder, tmp_path, shift):
    whole, checkpoint = published(folder).load(), None
    if shift:
        whole.load_state_dict({name: tensor + shift for name, tensor in whole.state_dict().items()})
        checkpoint = tmp_path / "run.ckpt"
        save(dict(whole.named_parameters()), checkpoint)
    family = published(folder, load_in_4bit=True)
    module = loaded(family, Full(), trained_checkpoint=checkpoint)
    expected = published(folder).quantize(whole, DEVICE, NF4)
    assert type(module.model.transformer.h[0].mlp.w1).__name__ == "Linear4bit"
    ids = torch.arange(1, 12, device=DEVICE)[None]
    torch.testing.assert_close(
        module.model.eval()(input_ids=ids).logits, expected(input_ids=ids).logits, atol=0, rtol=0
    )


@pytest.mark.gpu
def test_the_adapter_of_a_run_answers_with_4_bit_base_weights(folder, tmp_path):
    adapter = LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")
    family, ids = published(folder, load_in_4bit=True), torch.arange(1, 12, device=DEVICE)[None]
    untrained = loaded(family, adapter)
    state = untrained.state_dict()
    tensors = {name: state[name] + 0.1 for name in untrained.trainable_names()}
    torch.save({"state_dict": tensors}, tmp_path / "run.ckpt")
    module = loaded(family, adapter, trained_checkpoint=tmp_path / "run.ckpt")
    base = module.model.get_base_model()
    assert type(base.transformer.h[0].mlp.w1.base_layer).__name__ == "Linear4bit"
    for name, tensor in base.named_parameters():
        if "lora_" in name:
            assert tensor.dtype == torch.float32, name
    before = untrained.model.eval()(input_ids=ids).logits
    assert not torch.allclose(module.model.eval()(input_ids=ids).logits, before)
