"""The published sizes and settings of Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig

CONFIGS: Mapping[str, type[PreTrainedConfig]] = {  # by `model_type` of config.json
    "qwen2_5_vl": Qwen2_5_VLConfig,
    "qwen3_vl": Qwen3VLConfig,
}
# Fields of the config -> the tokens whose ids they hold
TOKEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
ARCHITECTURES = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
# Of preprocessor_config.json of Qwen/Qwen2.5-VL-7B-Instruct and Qwen/Qwen3-VL-8B-Instruct
IMAGES: Mapping[str, Mapping[str, Any]] = {
    "qwen2_5_vl": {
        "min_pixels": 4 * 28**2,
        "max_pixels": 16384 * 28**2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "qwen3_vl": {
        "min_pixels": 64 * 32**2,
        "max_pixels": 16384 * 32**2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}
# Of generation_config.json of the same two
GENERATION: Mapping[str, Mapping[str, Any]] = {
    "qwen2_5_vl": {"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-6},
    "qwen3_vl": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
}
# Of config.json of Qwen/Qwen2.5-VL-NAME-Instruct: hidden_size, intermediate_size,
# num_hidden_layers, num_attention_heads, num_key_value_heads, tie_word_embeddings, vocab_size,
# and intermediate_size of the vision tower
QWEN2_5_VL = {
    "3B": (2048, 11008, 36, 16, 2, True, 151936, 3420),
    "7B": (3584, 18944, 28, 28, 4, False, 152064, 3420),
    "32B": (5120, 27648, 64, 40, 8, False, 152064, 3456),
    "72B": (8192, 29568, 80, 64, 8, False, 152064, 3456),
}
# Of config.json of Qwen/Qwen3-VL-NAME-Instruct: hidden_size, intermediate_size,
# num_hidden_layers, num_attention_heads, tie_word_embeddings, and the vision tower
SMALL_TOWER = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
LARGE_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}
QWEN3_VL: Mapping[str, tuple[int, int, int, int, bool, Mapping[str, Any]]] = {
    "2B": (2048, 6144, 28, 16, True, SMALL_TOWER),
    "4B": (2560, 9728, 36, 32, True, SMALL_TOWER),
    "8B": (4096, 12288, 36, 32, False, LARGE_TOWER),
    "32B": (5120, 25600, 64, 64, False, LARGE_TOWER),
}
SUFFIXES = ("-Instruct", "-Thinking")


def published_config(name: str) -> dict[str, Any]:
    """Returns the `config.json` of a published checkpoint, by its name on the hub or its folder.

    Raises:
        ValueError: the name is not one of the published ones.
    """
    base = PurePath(name).name
    for suffix in SUFFIXES:
        base = base.removesuffix(suffix)
    generation, _, size = base.rpartition("-")
    if generation == "Qwen2.5-VL" and size in QWEN2_5_VL:
        return _qwen2_5_vl(size)
    if generation == "Qwen3-VL" and size in QWEN3_VL:
        return _qwen3_vl(size)
    known = [f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in QWEN2_5_VL]
    known += [f"Qwen/Qwen3-VL-{size}-Instruct" for size in QWEN3_VL]
    raise ValueError(
        f"the size of {name} is not known: random weights need the name of a published checkpoint, "
        f"or a folder with its config.json; the names are {', '.join(known)}"
    )


def _qwen2_5_vl(size: str) -> dict[str, Any]:
    hidden, intermediate, layers, heads, groups, tied, vocabulary, tower = QWEN2_5_VL[size]
    return {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": tied,
        "text_config": {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "vocab_size": vocabulary,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        "vision_config": {
            "hidden_size": 1280,
            "intermediate_size": tower,
            "out_hidden_size": hidden,
            "tokens_per_second": 2,
        },
    }


def _qwen3_vl(size: str) -> dict[str, Any]:
    hidden, intermediate, layers, heads, tied, tower = QWEN3_VL[size]
    return {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tied,
        "text_config": {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {**tower, "out_hidden_size": hidden},
    }


def chat_template(model_type: str, *, thinks: bool) -> str:
    """Returns a chat template that writes texts and images as the published one does."""
    system = ""
    if model_type == "qwen2_5_vl":
        system = (
            "{% if loop.first and message.role != 'system' %}<|im_start|>system\n"
            "You are a helpful assistant.<|im_end|>\n{% endif %}"
        )
    start = "<|im_start|>assistant\n" + ("<think>\n" if thinks else "")
    return (
        "{% for message in messages %}" + system + "<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}"
        "{% else %}{% for part in message.content %}"
        "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif 'text' in part %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}" + start + "{% endif %}"
    )
