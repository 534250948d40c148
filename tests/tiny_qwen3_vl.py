"""The smallest Qwen2.5-VL and Qwen3-VL, conversations for them, and their published vocabulary."""

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from qwenvl_lit.models.qwen3_vl.family import Qwen3VLFamily
from qwenvl_lit.models.qwen3_vl.processor import Qwen3VLProcessor
from qwenvl_lit.models.qwen3_vl.tokenizer import Qwen2Tokenizer, tokenizer_json
from qwenvl_lit.types import Box, Conversation, GroundedObject, ImageSource, Turn

KINDS = ("qwen2_5_vl", "qwen3_vl")
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "initializer_range": 0.2,
}
CONFIGS = {
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "text_config": {**TEXT, "rope_parameters": ROPE},
        "vision_config": {**VISION, "window_size": 56, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": {
            **TEXT,
            "head_dim": 8,
            "rope_parameters": {**ROPE, "mrope_interleaved": True},
        },
        "vision_config": {
            **VISION,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
}
LIMITS = {"min_pixels": 1024, "max_pixels": 16384}


def tiny_qwen3_vl(kind: str, **options) -> Qwen3VLFamily:
    settings = {"config": CONFIGS[kind], "vocabulary": "tiny", **LIMITS, **options}
    return Qwen3VLFamily(**settings)


def tiny_processor(kind: str, **options) -> Qwen3VLProcessor:
    return tiny_qwen3_vl(kind, **options).processor()


def published_size(kind: str, *, thinking: bool = False, **options) -> Qwen3VLFamily:
    """A family of published size with the published vocabulary; its network is not for tests."""
    names = {"qwen2_5_vl": "Qwen/Qwen2.5-VL-3B-Instruct", "qwen3_vl": "Qwen/Qwen3-VL-2B-Instruct"}
    path = "Qwen/Qwen3-VL-2B-Thinking" if thinking else names[kind]
    vocabulary = str(published_ranks())
    return Qwen3VLFamily(path=path, weights="random", vocabulary=vocabulary, **options)


def published_ranks() -> Path:
    """`qwen.tiktoken` of the package dashscope, from which all vocabularies of Qwen2 follow."""
    package = find_spec("dashscope")
    if package is None:
        pytest.skip("needs the published vocabulary: pip install dashscope (extra `test`)")
    return Path(package.origin).parent / "resources" / "qwen.tiktoken"


@cache
def published_tokenizer_json(think: bool = True) -> str:
    """The `tokenizer.json` of the published vocabulary, with the tags of thoughts or without."""
    vocabulary = Qwen2Tokenizer(published_ranks(), think=think).vocabulary
    if think:
        return json.dumps(tokenizer_json(vocabulary))
    content = json.loads(published_tokenizer_json())  # merging all tokens again takes seconds
    content["added_tokens"] = tokenizer_json(vocabulary._replace(ranks={}))["added_tokens"]
    return json.dumps(content)


def image(width: int, height: int, color: str = "red") -> ImageSource:
    return ImageSource(Image.new("RGB", (width, height), color))


def box(x0: float, y0: float, x1: float, y1: float, frame: str = "pixel") -> Box:
    return Box(x0=x0, y0=y0, x1=x1, y1=y1, frame=frame)


def cat(*corners: float, label: str | None = "cat", image: int = 0) -> GroundedObject:
    return GroundedObject(label=label, boxes=(box(*corners),), image=image)


def talk(*turns, system: str | None = None) -> Conversation:
    """A conversation of turns of the user and the assistant in turn; a turn is parts or text."""
    made = [] if system is None else [Turn(role="system", parts=(system,))]
    for number, parts in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        made.append(Turn(role=role, parts=(parts,) if isinstance(parts, str) else tuple(parts)))
    return Conversation(id="row-7", turns=tuple(made), where="rows.jsonl:7")
