"""Write a checkpoint of random weights in the layout in which Qwen-VL is published: to try and to measure without the real one.

python scripts/make_checkpoint.py /tmp/random-qwen-vl --size full --device cuda     # 9.66 B parameters, 19.3 GB
python scripts/make_checkpoint.py /tmp/small-qwen-vl --size small                   # the sizes of model=qwen_vl_tiny
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from qwenvl_lit.command import config_folder
from qwenvl_lit.families.checkpoint import INDEX, VOCABULARY, WEIGHTS
from qwenvl_lit.families.qwen_vl import QwenVL
from qwenvl_lit.models import QwenVLConfig, QwenVLForCausalLM
from qwenvl_lit.models.qwen_vl import file_shapes
from qwenvl_lit.models.tokenizer import TINY_VOCABULARY

# Settings that the published config.json has besides those of the network
PUBLISHED_CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    "attn_dropout_prob": 0.0,
    "emb_dropout_prob": 0.0,
    "bf16": True,
    "fp16": False,
    "fp32": False,
    "no_bias": True,
    "onnx_safe": None,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "softmax_in_fp32": False,
    "tokenizer_class": "QWenTokenizer",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.31.0",
    "use_flash_attn": False,
}
PUBLISHED_GENERATION = {
    "chat_format": "chatml",
    "do_sample": True,
    "max_new_tokens": 512,
    "max_window_size": 6144,
    "top_k": 0,
    "top_p": 0.3,
    "transformers_version": "4.31.0",
}


def write_checkpoint(model: QwenVLForCausalLM, vocabulary: Path, folder: Path, *, kind: str = "bin", shard_bytes: int = 2 * 10**9) -> None:
    """Everything that the published folder has but the remote code; `kind` is "bin" or "safetensors"."""
    folder.mkdir(parents=True)
    ids = {"eos_token_id": model.config.visual["image_start_id"] - 214, "pad_token_id": model.config.visual["image_start_id"] - 214}
    sizes = {key: value for key, value in model.config.to_dict().items() if key in QwenVLConfig.__annotations__}
    (folder / "config.json").write_text(json.dumps({**sizes, **PUBLISHED_CONFIG, "model_type": "qwen"}, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({**PUBLISHED_GENERATION, **ids}, indent=2))
    shutil.copyfile(vocabulary, folder / VOCABULARY)

    name = next(name for name in WEIGHTS if name.endswith(kind))
    shards = list(shards_of(file_shapes(model), shard_bytes, next(model.parameters()).element_size()))
    files = [name.replace(".", f"-{number:05}-of-{len(shards):05}.") for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        tensors = {tensor: stored(model, tensor) for tensor in names}
        if kind == "safetensors":
            save_file(tensors, folder / file, metadata={"format": "pt"})
        else:
            torch.save(tensors, folder / file)
    index = {"metadata": {"total_size": sum(p.numel() * p.element_size() for p in model.parameters())}}
    index["weight_map"] = {tensor: file for file, names in zip(files, shards, strict=True) for tensor in names}
    (folder / INDEX.format(name)).write_text(json.dumps(index, indent=2))


def shards_of(shapes: dict[str, tuple[int, ...]], limit: int, element_bytes: int) -> Iterator[list[str]]:
    """Names of consecutive tensors that take at most `limit` bytes together; a larger tensor is alone."""
    names, size = [], 0
    for name, shape in shapes.items():
        needed = torch.Size(shape).numel() * element_bytes
        if names and size + needed > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += needed
    yield names


def stored(model: QwenVLForCausalLM, name: str) -> torch.Tensor:
    """A tensor as files have it, on the CPU: the resampler's three input projections are one."""
    head, packed, kind = name.rpartition("in_proj_")
    if not packed:
        return model.state_dict()[name].cpu().contiguous()
    return torch.cat([model.state_dict()[f"{head}{letter}_proj.{kind}"] for letter in "qkv"]).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--format", choices=("bin", "safetensors"), default="bin")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu", help="where full-size weights are drawn")
    parser.add_argument("--vocabulary", type=Path, default=TINY_VOCABULARY, help="a copy of qwen.tiktoken; default: the demo's")
    arguments = parser.parse_args()
    options = {"vocabulary": str(arguments.vocabulary), "dtype": arguments.dtype}
    if arguments.size == "full":
        family = QwenVL(path="Qwen/Qwen-VL-Chat", weights="random", **options)
    else:
        sizes = OmegaConf.to_container(OmegaConf.load(config_folder() / "model/qwen_vl_tiny.yaml").config)
        family = QwenVL(config=sizes, **options)
    write_checkpoint(family.load(arguments.device), arguments.vocabulary, arguments.folder, kind=arguments.format)


if __name__ == "__main__":
    main()
