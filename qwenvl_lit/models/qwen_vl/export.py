"""Checkpoints in the published layout, written a shard at a time: what the original code, and whatever was made for it, can load."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from qwenvl_lit.models.qwen_vl.checkpoint import (
    COMPANIONS,
    INDEX,
    VOCABULARY,
    WEIGHTS,
    StoredTensor,
    open_shard,
)
from qwenvl_lit.models.qwen_vl.config import QwenVLConfig

Read = Callable[[str], torch.Tensor]  # a tensor of the network by its name there, on the CPU

SHARD_BYTES = (
    10**9
)  # with a shard of two times this being read, less than two of those are in memory
# Settings that the published config.json has besides those of the network
PUBLISHED_CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_dropout_prob": 0.0,
    "emb_dropout_prob": 0.0,
    "no_bias": True,
    "onnx_safe": None,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "softmax_in_fp32": False,
    "tokenizer_class": "QWenTokenizer",
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
PUBLISHED_TOKENIZER = {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"}
TOKENIZER_CODE = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
FLAGS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FONT = "*.ttf"  # of the original's tokenizer, which draws with it
PROJECTION = re.compile(r"attn\.([qkv])_proj\.")  # of the resampler: files have the three as one


def reader(tensors: Mapping[str, StoredTensor | torch.Tensor], dtype: torch.dtype) -> Read:
    """The tensors of files by their names in the network; no more than one file is mapped into memory."""
    last: Path | None = None

    def read(name: str) -> torch.Tensor:
        nonlocal last
        projection = PROJECTION.search(name)
        stored = tensors[name.replace(f"{projection[1]}_proj.", "in_proj_") if projection else name]
        if isinstance(stored, StoredTensor) and stored.file != last:
            open_shard.cache_clear()
            last = stored.file
        whole = stored[...]
        return (whole.chunk(3)["qkv".index(projection[1])] if projection else whole).to(
            "cpu", dtype
        )

    return read


def packed(read: Read, name: str) -> torch.Tensor:
    """A tensor as files have it, by its name there."""
    head, joined, kind = name.rpartition(
        "attn.in_proj_"
    )  # the tower's own `attn.in_proj` is one in the network too
    return (
        torch.cat([read(f"{head}attn.{letter}_proj.{kind}") for letter in "qkv"])
        if joined
        else read(name)
    )


def write_weights(
    read: Read,
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    *,
    dtype: torch.dtype,
    kind: Literal["safetensors", "bin"] = "safetensors",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Shards and their index; what is in memory at once is a shard, or a tensor that is larger.

    Args:
        shapes: of the tensors by their names in files, in the order in which they are read and written.
    """
    name = next(name for name in WEIGHTS if name.endswith(kind))
    shards = list(shards_of(shapes, shard_bytes, dtype.itemsize))
    files = [
        name.replace(".", f"-{number:05}-of-{len(shards):05}.")
        for number in range(1, len(shards) + 1)
    ]
    for file, names in zip(files, shards, strict=True):
        tensors = {
            tensor: packed(read, tensor).to(dtype).clone(memory_format=torch.contiguous_format)
            for tensor in names
        }
        if kind == "safetensors":
            save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # safetensors lets nobody else read it
        else:
            torch.save(tensors, folder / file)
        del tensors
    index: dict[str, Any] = {"metadata": {"total_size": total_bytes(shapes, dtype)}}
    index["weight_map"] = {
        tensor: file for file, names in zip(files, shards, strict=True) for tensor in names
    }
    write_json(folder / INDEX.format(name), index)


def write_companions(
    folder: Path,
    config: QwenVLConfig,
    *,
    dtype: str,
    vocabulary: Path,
    base: Path | None,
    template: str,
) -> None:
    """Everything that the published folder has but the weights: configs, the vocabulary, and code, where `base` has it.

    Args:
        base: the checkpoint that the weights come from; None: there is none.
    """
    for pattern in (*COMPANIONS, FONT):
        for file in base.glob(pattern) if base else ():
            if not file.name.endswith(INDEX.format("")) and file.name not in (
                "config.json",
                "adapter_config.json",
            ):
                shutil.copyfile(file, folder / file.name)
    shutil.copyfile(vocabulary, folder / VOCABULARY)
    stored = json.loads((base / "config.json").read_text(encoding="utf-8")) if base else {}
    code = runnable(stored.pop("auto_map", {}), folder)
    write_json(
        folder / "config.json",
        published_config(config, stored, dtype=dtype) | ({"auto_map": code} if code else {}),
    )
    write_generation(folder / "generation_config.json", config, template)
    if not (folder / "tokenizer_config.json").exists():
        code = runnable(TOKENIZER_CODE, folder)
        write_json(
            folder / "tokenizer_config.json",
            PUBLISHED_TOKENIZER | ({"auto_map": code} if code else {}),
        )


def write_generation(file: Path, config: QwenVLConfig, template: str) -> None:
    """The published settings, unless there are others; `template` is what the weights were trained with."""
    if not file.exists():
        ids = dict.fromkeys(("eos_token_id", "pad_token_id"), end_of_text(config))
        write_json(file, {**PUBLISHED_GENERATION, "chat_format": template, **ids})
    stored = json.loads(file.read_text(encoding="utf-8"))
    if stored.get("chat_format") != template:
        write_json(file, {**stored, "chat_format": template})


def published_config(
    config: QwenVLConfig, stored: Mapping[str, Any], *, dtype: str
) -> dict[str, Any]:
    """`config.json` as the original code reads it; without `auto_map`.

    Args:
        stored: further settings, as a checkpoint has them.
    """
    kept = {
        key: value
        for key, value in {**PUBLISHED_CONFIG, **stored}.items()
        if key not in ("auto_map", "dtype", "_name_or_path")
    }
    sizes = {
        key: value for key, value in config.to_dict().items() if key in QwenVLConfig.__annotations__
    }
    flags = {flag: name == dtype for flag, name in FLAGS.items()}
    fixed = {
        "architectures": PUBLISHED_CONFIG["architectures"],
        "model_type": config.model_type,
        "torch_dtype": dtype,
    }
    return {**kept, **sizes, **flags, **fixed}


def runnable(auto_map: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Of `auto_map` those classes whose code is in `folder`, without the name of a repository in front."""
    found = {}
    for name, classes in auto_map.items():
        local = [
            one and one.rpartition("--")[2]
            for one in ([classes] if isinstance(classes, str) else classes)
        ]
        if all(one is None or (folder / f"{one.rpartition('.')[0]}.py").exists() for one in local):
            found[name] = local[0] if isinstance(classes, str) else local
    return found


def end_of_text(config: QwenVLConfig) -> int:
    """The id of `<|endoftext|>`, the first of the special tokens: 214 before `<img>`."""
    assert config.visual is not None  # the config fills it in
    return config.visual["image_start_id"] - 214


def total_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize


def shards_of(
    shapes: Mapping[str, tuple[int, ...]], limit: int, element_bytes: int
) -> Iterator[list[str]]:
    """Names of consecutive tensors that take at most `limit` bytes together; a larger tensor is alone."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        needed = torch.Size(shape).numel() * element_bytes
        if names and size + needed > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += needed
    yield names


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
