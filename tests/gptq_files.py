"""Folders whose language model GPTQ quantized, written without the code that reads them.

Values are packed bit by bit into Python's integers, as AutoGPTQ documents the format.
"""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwenvl_lit.models.qwen_vl.family import QwenVLFamily

LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
SETTINGS = {"bits": 4, "group_size": 16, "desc_act": False, "sym": True, "quant_method": "gptq"}


def pack(values: list[int], bits: int) -> list[int]:
    """Packs values into signed words of 32 bits, the first value in the lowest bits."""
    words = []
    for start in range(0, len(values), 32 // bits):
        word = 0
        for place, value in enumerate(values[start : start + 32 // bits]):
            for bit in range(bits):
                if value & 1 << bit:
                    word |= 1 << (place * bits + bit)
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


def random_layer(inputs: int, outputs: int, settings: dict, seed: int = 0) -> tuple[dict, list]:
    """Returns the parts of a random layer, and its weight as rows of numbers."""
    rng = random.Random(seed)
    bits, size = settings["bits"], settings["group_size"]
    size = inputs if size == -1 else size
    groups = [row // size for row in range(inputs)]
    if settings["desc_act"]:
        rng.shuffle(groups)
    count = max(groups) + 1
    values = [[rng.randrange(2**bits) for _ in range(outputs)] for _ in range(inputs)]
    scales = (torch.rand(count, outputs) * 0.02).half()
    zeros = [[2 ** (bits - 1)] * outputs for _ in range(count)]
    if not settings["sym"]:
        zeros = [[rng.randrange(2**bits) for _ in range(outputs)] for _ in range(count)]
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    stored_zeros = []
    for row in zeros:
        stored_zeros.append(pack([(zero - offset) % 2**bits for zero in row], bits))
    columns = [pack([row[output] for row in values], bits) for output in range(outputs)]
    parts = {
        "qweight": torch.tensor(columns, dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor(stored_zeros, dtype=torch.int32),
        "scales": scales,
        "g_idx": torch.tensor(groups, dtype=torch.int32),
    }
    numbers = scales.tolist()
    weight = []
    for output in range(outputs):
        row = []
        for number, group in enumerate(groups):
            row.append((values[number][output] - zeros[group][output]) * numbers[group][output])
        weight.append(row)
    return parts, weight


def quantize(network: torch.nn.Module, settings: dict) -> dict[str, torch.Tensor]:
    """Returns the tensors of a folder in which the layers of the blocks are random 4-bit ones.

    The network gets their weights. Other tensors are rounded to float16, as published.
    """
    tensors = {}
    state = network.state_dict()
    for name, tensor in state.items():
        tensor.copy_(tensor.half())
        layer, _, kind = name.rpartition(".")
        in_blocks = name.startswith("transformer.h.")
        if in_blocks and kind == "weight" and layer.endswith(LAYERS):
            parts, weight = random_layer(*reversed(tensor.shape), settings, seed=len(tensors))
            tensor.copy_(torch.tensor(weight))
            tensors |= {f"{layer}.{part}": value for part, value in parts.items()}
            if f"{layer}.bias" not in state:  # as AutoGPTQ writes it
                tensors[f"{layer}.bias"] = torch.zeros(tensor.shape[0]).half()
        else:
            tensors[name] = tensor.half()
    for kind in ("weight", "bias"):  # the published files have these three as one tensor
        names = [f"transformer.visual.attn_pool.attn.{letter}_proj.{kind}" for letter in "qkv"]
        joined = torch.cat([tensors.pop(name) for name in names])
        tensors[f"transformer.visual.attn_pool.attn.in_proj_{kind}"] = joined
    return tensors


def write_gptq(
    plain: Path, folder: Path, settings: dict, *, weights: str = "shards", beside: bool = False
) -> torch.nn.Module:
    """Writes a quantized folder from a plain one; returns the network with the same weights.

    Args:
        weights: "shards", or the name of a single file.
        beside: write the settings to quantize_config.json, not to config.json.
    """
    network = QwenVLFamily(path=str(plain)).load()
    with torch.no_grad():
        tensors = quantize(network, settings)
    folder.mkdir()
    for file in plain.iterdir():
        if file.suffix == ".tiktoken" or file.name in ("config.json", "generation_config.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    if beside:
        (folder / "quantize_config.json").write_text(json.dumps(settings))
    else:
        change_config(folder, quantization_config=settings)
    if weights == "shards":
        names = sorted(tensors)
        shards = {"model-00001-of-00002.safetensors": names[::2]}
        shards["model-00002-of-00002.safetensors"] = names[1::2]
        weight_map = {}
        for file, shard in shards.items():
            save_file({name: tensors[name] for name in shard}, folder / file)
            weight_map |= dict.fromkeys(shard, file)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    elif weights.endswith(".bin"):
        torch.save(tensors, folder / weights)
    else:
        save_file(tensors, folder / weights)
    return network


def change_config(folder: Path, **changes) -> None:
    """Changes settings of `config.json`."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
