"""Sizes of a Qwen-VL network, in the layout of the published `config.json`."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

QWEN_VL_VISUAL = {
    "image_size": 448,
    "patch_size": 14,
    "width": 1664,
    "layers": 48,
    "heads": 16,
    "mlp_ratio": 4.9231,
    "output_dim": 4096,
    "image_start_id": 151857,
}
# Ours, for small networks. Written to `config.json` only if they were given.
VISUAL_OPTIONS = ("n_queries", "resampler_heads", "spatial_start")
# Settings of the published files for which the network knows no other value.
FIXED = {
    "attn_dropout_prob": 0,
    "emb_dropout_prob": 0,
    "no_bias": True,
    "rotary_pct": 1,
    "scale_attn_weights": True,
}


class QwenVLConfig(PreTrainedConfig):
    """Qwen-VL's configuration; the defaults are the published 9.66 B network.

    `intermediate_size` counts both branches of the language MLP, as in the published files. `visual` holds the sizes of the tower, the
    images' `image_size` in pixels, and `image_start_id`: the id of `<img>`; those of `</img>` and `<imgpad>` follow it.

    >>> QwenVLConfig(num_hidden_layers=2).visual["layers"]
    48

    Raises:
        ValueError: sizes that do not fit together, and settings the network does not have.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    intermediate_size: int = 22016
    seq_length: int = (
        2048  # the length the network was trained on; dynamic NTK and log-n scaling begin above it
    )
    max_position_embeddings: int = 8192
    rotary_emb_base: float = 10000
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    visual: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        self.visual = dict(QWEN_VL_VISUAL if self.visual is None else self.visual)
        super().__post_init__(**kwargs)
        self._check_language()
        self._check_visual()

    @property
    def tower(self) -> dict[str, Any]:
        """Arguments of `models.vision.VisionTower`: of `visual`, what concerns the network, and defaults for our options."""
        given = {
            key: value
            for key, value in self.visual.items()
            if key not in ("image_size", "image_start_id") and value is not None
        }
        heads = max(self.visual["output_dim"] // 128, 1)
        return {"n_queries": 256, "resampler_heads": heads, "spatial_start": None} | given

    @property
    def n_queries(self) -> int:
        """Tokens of an image between `<img>` and `</img>`."""
        return self.tower["n_queries"]

    def _check_language(self):
        require(
            self.kv_channels * self.num_attention_heads == self.hidden_size,
            f"hidden_size={self.hidden_size} must be num_attention_heads * kv_channels = {self.num_attention_heads} * {self.kv_channels}",
        )
        require(
            self.kv_channels % 2 == 0 and self.kv_channels > 2,
            f"kv_channels={self.kv_channels} must be even and above 2: rotary positions turn pairs of channels",
        )
        require(
            self.intermediate_size % 2 == 0,
            f"intermediate_size={self.intermediate_size} must be even: it counts both branches of the MLP",
        )
        for key, value in FIXED.items():
            found = getattr(self, key, value)
            require(
                found == value,
                f"{key}={found} is not supported; the network is the published one, where it is {value}",
            )

    def _check_visual(self):
        visual = self.visual
        missing = [key for key in QWEN_VL_VISUAL if key not in visual]
        unknown = [key for key in visual if key not in QWEN_VL_VISUAL and key not in VISUAL_OPTIONS]
        require(not missing, f"visual lacks {', '.join(missing)}")
        require(
            not unknown,
            f"visual has unknown keys {', '.join(unknown)}; known are {', '.join((*QWEN_VL_VISUAL, *VISUAL_OPTIONS))}",
        )

        size, patch, width, dim = (
            visual[key] for key in ("image_size", "patch_size", "width", "output_dim")
        )
        heads = self.tower["resampler_heads"]
        require(
            size % patch == 0,
            f"visual.image_size={size} must be a multiple of visual.patch_size={patch}",
        )
        require(
            width % visual["heads"] == 0,
            f"visual.width={width} must be a multiple of visual.heads={visual['heads']}",
        )
        require(
            dim == self.hidden_size,
            f"visual.output_dim={dim} must be hidden_size={self.hidden_size}",
        )
        require(
            dim % heads == 0,
            f"visual.output_dim={dim} must be a multiple of visual.resampler_heads={heads}",
        )
        require(
            dim % 4 == 0,
            f"visual.output_dim={dim} must be a multiple of 4: sine and cosine of two coordinates",
        )
        require(
            math.isqrt(self.n_queries) ** 2 == self.n_queries,
            f"visual.n_queries={self.n_queries} must be a square number: 16, 256, ...",
        )
        last = visual["image_start_id"] + 2
        require(
            last < self.vocab_size,
            f"visual.image_start_id={last - 2} leaves no room for </img>, <imgpad> in vocab_size={self.vocab_size}",
        )


def require(condition: bool, message: str):
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(f"Qwen-VL config: {message}")
