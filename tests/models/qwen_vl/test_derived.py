"""Folders of models that others trained from Qwen-VL-Chat, in the layouts that they publish."""

import json
from pathlib import Path

import pytest
import torch
from scripted import CONFIG, tiny_checkpoint
from small_network import text

from qwenvl_lit import QwenVL
from qwenvl_lit.cli.command import prepare
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.types import DataError
from scripts.make_checkpoint import write_checkpoint

IDS = torch.tensor([text(9)])
# As trl's and Qwen-VL's own scripts write it with peft 0.4 to 0.7, for example of Silkie's DPO
DPO = {
    "auto_mapping": None,
    "base_model_name_or_path": "/mnt/petrelfs/them/Qwen-VL-Chat-sft",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 64,
    "revision": None,
    "target_modules": ["c_attn", "attn.c_proj", "w1", "w2"],
    "task_type": "CAUSAL_LM",
}
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "Qwen-VL-Chat")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def write_adapter(folder: Path, *, name: str = "", saved=(), **changes) -> dict[str, torch.Tensor]:
    """Writes an adapter folder with noise; returns the weights of the merged network by name.

    Args:
        name: what follows lora_A and lora_B: "" in peft's files, ".default" in saved state dicts.
        saved: modules of `modules_to_save`.
    """
    folder.mkdir()
    state = {key: value.clone() for key, value in tiny_base().state_dict().items()}
    draw, tensors = torch.Generator().manual_seed(0), {}
    for layer in LAYERS:
        path = f"transformer.h.0.{layer}"
        rows, columns = state[f"{path}.weight"].shape
        down = torch.randn(64, columns, generator=draw) * 0.1
        up = torch.randn(rows, 64, generator=draw) * 0.1
        tensors[f"base_model.model.{path}.lora_A{name}.weight"] = down
        tensors[f"base_model.model.{path}.lora_B{name}.weight"] = up
        state[f"{path}.weight"] += up @ down * 16 / 64
    for path in saved:
        state[f"{path}.weight"] = state[f"{path}.weight"] + 0.1
        tensors[f"base_model.model.{path}.weight"] = state[f"{path}.weight"]
    (folder / "adapter_config.json").write_text(json.dumps(DPO | changes))
    torch.save(tensors, folder / "adapter_model.bin")
    return state


def tiny_base() -> torch.nn.Module:
    return QwenVLFamily(config=CONFIG, vocabulary="tiny").load()


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        ({"name": ".default"}, {}),
        (
            {"saved": ("transformer.wte", "lm_head")},  # finetune.py on the base model
            {"modules_to_save": ["wte", "lm_head"]},
        ),
        (
            {},  # peft 0.2
            {"enable_lora": None, "merge_weights": False},
        ),
        (
            {},  # peft 0.7 and later
            {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
        ),
    ],
    ids=["peft", "state dict", "modules_to_save", "old", "new"],
)
def test_an_adapter_of_dpo_computes_what_peft_merges(base, tmp_path, options, changes):
    state = write_adapter(tmp_path / "dpo", **options, **changes)
    merged = tiny_base()
    merged.load_state_dict(state)
    model = QwenVL.load(tmp_path / "dpo", base_model=base, dtype="float32").model
    torch.testing.assert_close(logits(model), logits(merged), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model), logits(tiny_base()), atol=1e-3)


def test_a_base_model_that_is_elsewhere_is_asked_for(base, tmp_path):
    write_adapter(tmp_path / "dpo")
    message = (
        r"^/mnt/petrelfs/them/Qwen-VL-Chat-sft is no folder.*base model of an adapter, with mod"
    )
    with pytest.raises(DataError, match=message) as raised:
        QwenVL.load(tmp_path / "dpo")
    assert "\n" not in str(raised.value)
    groups = prepare("chat", [f"ckpt={tmp_path}/dpo", f"model.path={base}"], run="needed")
    [note] = groups.notes
    assert note.endswith(
        f"adapter for {DPO['base_model_name_or_path']}; the base model here is {base}"
    )


def test_merged_weights_in_two_bin_files_load(tmp_path):
    """Silkie on the hub: the vocabulary, but no code of the model."""
    model, folder = tiny_base(), tmp_path / "Silkie"
    write_checkpoint(model, TINY_VOCABULARY, folder, kind="bin", shard_bytes=200_000)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"_name_or_path": "/home/them/output", "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(settings))
    loaded = QwenVL.load(folder, dtype="float32").model
    assert torch.equal(logits(loaded), logits(model))


def test_a_folder_without_vocabulary_takes_one_from_elsewhere(tmp_path, base):
    """As SeeClick: weights, config.json and code, with the tokenizer of Qwen-VL-Chat."""
    folder = tmp_path / "derived"
    write_checkpoint(tiny_base(), TINY_VOCABULARY, folder, kind="safetensors", shard_bytes=200_000)
    (folder / "qwen.tiktoken").unlink()
    (folder / "modeling_qwen.py").write_text("raise SystemExit\n")
    with pytest.raises(DataError, match=r"lacks qwen\.tiktoken; .*Qwen-VL-Chat.*vocabulary=FILE$"):
        QwenVL.load(folder)
    family = QwenVLFamily(path=str(folder), vocabulary=str(base / "qwen.tiktoken"))
    assert torch.equal(logits(family.load()), logits(tiny_base()))
    other = Path(__file__).parents[2] / "golden" / "tokenizer" / "synthetic.tiktoken"
    with pytest.raises(ValueError, match="choose the vocabulary of this model"):
        QwenVLFamily(path=str(folder), vocabulary=str(other)).load()


def test_adapters_inside_a_vision_tower_are_named_as_unexpected(tmp_path):
    """Monkey under the model_type of Qwen-VL."""
    folder = tmp_path / "other"
    write_checkpoint(tiny_base(), TINY_VOCABULARY, folder, kind="bin")
    [file] = folder.glob("*.bin")
    tensors = torch.load(file, weights_only=True)
    name = "transformer.visual.transformer.resblocks.0.attn.in_proj_lora.0.weight"
    torch.save({**tensors, name: torch.zeros(2)}, file)
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    index["weight_map"][name] = file.name
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=f"unexpected 1: {name}") as raised:
        QwenVL.load(folder)
    assert "\n" not in str(raised.value)
