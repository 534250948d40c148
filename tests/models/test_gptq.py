"""Weights that GPTQ quantized: how they are dequantized, and which folders are read."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from gptq_files import SETTINGS, change_config, random_layer, write_gptq
from make_checkpoint import write_checkpoint
from safetensors.torch import load_file, save_file

from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.checkpoint_files import find_checkpoint
from qwenvl_lit.models.gptq import PackedWeight
from qwenvl_lit.models.quantized_files import read_gptq
from qwenvl_lit.models.qwen_vl.checkpoint import QWEN_VL
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.stored_tensors import StoredTensor, open_shard
from qwenvl_lit.types import DataError

SINGLE = "gptq_model-4bit-16g.safetensors"
C_ATTN = "transformer.h.0.attn.c_attn"


def dequantized(folder: Path, parts: dict, settings: dict) -> torch.Tensor:
    """The weight of one layer that is stored in a file."""
    open_shard.cache_clear()  # an earlier layer may have had this file
    file = folder / "layer.safetensors"
    save_file(parts, file)
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    stored = {part: StoredTensor(file, part) for part in parts}
    return PackedWeight(stored, read_gptq(folder, "another"))[...]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sym": False},
        {"desc_act": True},
        {"desc_act": True, "sym": False, "checkpoint_format": "gptq_v2"},
        {"sym": False, "checkpoint_format": "gptq_v2"},
        {"sym": False, "group_size": -1},
        {"desc_act": True, "sym": False, "group_size": 24},  # the last group has 16 inputs
    ],
)
def test_a_weight_is_that_of_an_independent_unpacking(tmp_path, bits, changes):
    settings = {**SETTINGS, "bits": bits, **changes}
    parts, weight = random_layer(64, 32, settings)
    assert torch.equal(dequantized(tmp_path, parts, settings), torch.tensor(weight))
    if not settings["desc_act"]:  # some writers leave it out
        del parts["g_idx"]
        assert torch.equal(dequantized(tmp_path, parts, settings), torch.tensor(weight))


def test_words_hold_the_first_value_in_their_lowest_bits(tmp_path):
    parts = {
        "qweight": torch.tensor([[0x76543210] + [0] * 7], dtype=torch.int32),
        "qzeros": torch.tensor([[0x77777770]], dtype=torch.int32),
        "scales": torch.full((1, 8), 0.5).half(),
        "g_idx": torch.zeros(8, dtype=torch.int32),
    }
    settings = {**SETTINGS, "sym": False}
    weight = dequantized(tmp_path, parts, settings)
    assert weight[0].tolist() == [-0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3]  # a stored 0 is a zero point 1
    assert weight[1].tolist() == [-4.0] * 8
    parts["qzeros"] = torch.tensor([[0x7777777F]], dtype=torch.int64).to(torch.int32)
    assert dequantized(tmp_path, parts, settings)[0, 1] == 0.5  # a stored 15 is a zero point 0


def test_symmetric_weights_of_writers_that_subtract_nothing_are_recognized(tmp_path):
    parts, weight = random_layer(64, 32, {**SETTINGS, "checkpoint_format": "gptq_v2"})
    settings = {**SETTINGS, "checkpoint_format": "gptq"}
    assert torch.equal(dequantized(tmp_path, parts, settings), torch.tensor(weight))


def test_weights_of_many_inputs_are_dequantized_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("qwenvl_lit.models.gptq.CHUNK", 16)
    settings = {**SETTINGS, "desc_act": True, "sym": False}
    parts, weight = random_layer(72, 32, settings)
    assert torch.equal(dequantized(tmp_path, parts, settings), torch.tensor(weight))


# -- folders --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "F"
    family = QwenVLFamily(config={**tiny.CONFIG, "num_hidden_layers": 2}, vocabulary="tiny")
    write_checkpoint(family.load(), TINY_VOCABULARY, folder, kind="safetensors")
    return folder


@pytest.fixture(scope="module")
def unchanged(plain, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "Int4"
    write_gptq(plain, folder, SETTINGS, weights=SINGLE)
    return folder


@pytest.fixture
def quantized(unchanged, tmp_path) -> Path:
    """A folder with one file of weights, which a test may change."""
    return Path(shutil.copytree(unchanged, tmp_path / "Int4"))


def change(folder: Path, **changes) -> None:
    """Changes tensors of the single file; None removes one."""
    tensors = load_file(folder / SINGLE)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / SINGLE)


def inputs() -> dict[str, torch.Tensor]:
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(2, 6)
    return {
        "input_ids": torch.arange(1, 12)[None],
        "pixel_values": pixels,
        "vision_positions": positions,
    }


@pytest.mark.parametrize(
    ("weights", "changes", "beside"),
    [
        ("shards", {}, False),
        ("shards", {"desc_act": True, "sym": False}, True),
        (SINGLE, {"checkpoint_format": "gptq_v2", "sym": False}, False),
        ("model.safetensors", {"bits": 8, "desc_act": True}, True),
        ("gptq_model-4bit--1g.bin", {"group_size": -1}, True),
        ("pytorch_model.bin", {}, False),
    ],
)
def test_the_network_is_that_of_the_dequantized_weights(plain, tmp_path, weights, changes, beside):
    folder, settings = tmp_path / "Int4", {**SETTINGS, **changes}
    expected = write_gptq(plain, folder, settings, weights=weights, beside=beside)
    loaded = QwenVLFamily(path=str(folder)).load()
    with torch.inference_mode():
        assert torch.equal(loaded(**inputs()).logits, expected(**inputs()).logits)
    rounded = QwenVLFamily(path=str(folder), dtype="bfloat16").load().state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert torch.equal(rounded[name], tensor.bfloat16()), name


def test_a_quantized_model_can_be_distributed_and_offloaded(plain, tmp_path):
    expected = write_gptq(plain, tmp_path / "Int4", SETTINGS)
    on_cpu = ["transformer.wte", "transformer.h.0", "transformer.ln_f", "transformer.visual"]
    device_map = {**dict.fromkeys([*on_cpu, "lm_head"], "cpu"), "transformer.h.1": "disk"}
    distributed = QwenVLFamily(path=str(tmp_path / "Int4"), device_map=device_map).load()
    assert distributed.hf_device_map["transformer.h.1"] == "disk"
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(distributed(ids).logits, expected(ids).logits)


def test_loading_holds_one_dequantized_weight_per_thread(quantized, monkeypatch):
    """The tensors are read when they are moved, not before."""
    read = []
    dequantize = PackedWeight._dequantize
    monkeypatch.setattr(
        PackedWeight, "_dequantize", lambda self: read.append(self.name) or dequantize(self)
    )
    family = QwenVLFamily(path=str(quantized))
    tensors = family.checkpoint_tensors()
    assert tensors[f"{C_ATTN}.weight"].shape == (96, 32)
    assert read == []
    family.load()
    assert len(read) == len(set(read)) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {f"{C_ATTN}.scales": None},
            rf"{SINGLE}: {C_ATTN}\.qweight needs {C_ATTN}\.scales, which is missing",
        ),
        (
            {f"{C_ATTN}.qzeros": torch.zeros(2, 5, dtype=torch.int32)},
            rf"{SINGLE}: {C_ATTN}\.qzeros has the shape \(2, 5\), expected \(2, 12\) for a layer "
            r"of 32 inputs and 96 outputs with 4 bits and group_size=16; is config\.json that of",
        ),
        (
            {f"{C_ATTN}.qweight": torch.zeros(4, 96)},
            rf"{SINGLE}: {C_ATTN}\.qweight is torch\.float32, expected torch\.int32",
        ),
        (
            {f"{C_ATTN}.qweight": torch.zeros(384, dtype=torch.int32)},
            rf"{SINGLE}: {C_ATTN}\.qweight has the shape \(384,\), expected two dimensions",
        ),
        (
            {f"{C_ATTN}.g_idx": torch.full((32,), 2, dtype=torch.int32)},
            rf"{SINGLE}: {C_ATTN}\.g_idx has values from 2 to 2, expected 0 to 1",
        ),
        (
            {f"{C_ATTN}.scales": torch.full((2, 96), torch.nan).half()},
            rf"{SINGLE}: {C_ATTN}\.scales is not finite",
        ),
        (
            {"transformer.h.0.mlp.w1.bias": torch.ones(32).half()},
            rf"{SINGLE}: transformer\.h\.0\.mlp\.w1\.bias is not zero, but this layer",
        ),
        (
            {f"{C_ATTN}.{part}": None for part in ("qweight", "qzeros", "scales", "g_idx")},
            rf"missing 1: {C_ATTN}\.weight",
        ),
        ({"mine.qzeros": torch.zeros(2, 12)}, r"unexpected 1: mine\.qzeros"),
        (
            {"transformer.ln_f.weight": torch.ones(7)},
            r"of another shape 1: transformer\.ln_f\.weight \(7,\), expected \(32,\)",
        ),
    ],
)
def test_a_fault_of_a_tensor_is_named_in_one_line(quantized, changes, message):
    change(quantized, **changes)
    with pytest.raises(DataError, match=message) as caught:
        QwenVLFamily(path=str(quantized)).load()
    assert "\n" not in str(caught.value)


def test_a_layer_of_another_size_is_named(quantized):
    wide = random_layer(48, 96, SETTINGS)[0]
    change(quantized, **{f"{C_ATTN}.{part}": tensor for part, tensor in wide.items()})
    message = rf"of another shape 1: {C_ATTN}\.weight \(96, 48\), expected \(96, 32\)"
    with pytest.raises(DataError, match=message):
        QwenVLFamily(path=str(quantized)).load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, r"quantized with GPTQ to 3 bits, which is not read; take .*Qwen-VL-Chat"),
        ({"checkpoint_format": "marlin"}, r"with GPTQ in the format 'marlin', which is not read"),
        ({"pack_dtype": "int16"}, "with GPTQ and packed into 'int16', which is not read"),
        ({"dynamic": {"+:.*mlp": {"bits": 8}}}, r"other settings for some layers \(dynamic\)"),
        ({"bits": "4"}, "bits of the quantization is '4', expected a whole number"),
        ({"bits": None}, "bits of the quantization is None"),
        ({"group_size": 0}, "group_size is 0, expected -1 or a positive number"),
        ({"quant_method": "awq"}, r"quantized with AWQ \(4 bits\), which is not read"),
    ],
)
def test_settings_that_are_not_read_are_named(quantized, settings, message):
    change_config(quantized, quantization_config={**SETTINGS, **settings})
    with pytest.raises(DataError, match=rf"config\.json: .*{message}") as caught:
        find_checkpoint(str(quantized), QWEN_VL)
    assert "\n" not in str(caught.value)


def test_layers_that_gptq_skipped_are_plain(quantized):
    change_config(quantized, quantization_config={**SETTINGS, "dynamic": {"-:.*c_attn": {}}})
    gone = {f"{C_ATTN}.{part}": None for part in ("qweight", "qzeros", "scales", "g_idx")}
    weight = torch.randn(96, 32).half()
    change(quantized, **gone, **{f"{C_ATTN}.weight": weight})
    loaded = QwenVLFamily(path=str(quantized)).load()
    assert torch.equal(loaded.transformer.h[0].attn.c_attn.weight, weight.float())


def test_incomplete_settings_are_named(quantized):
    change_config(quantized, quantization_config={"quant_method": "gptq", "desc_act": False})
    with pytest.raises(DataError, match=r"settings of GPTQ lack bits and group_size; fetch"):
        QwenVLFamily(path=str(quantized)).load()
