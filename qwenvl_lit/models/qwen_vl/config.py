"""The sizes of a Qwen or Qwen-VL network, in the layout of the published `config.json`."""

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
# Options of ours, for small networks. `config.json` holds them only if they were given.
VISUAL_OPTIONS = ("n_queries", "resampler_heads", "spatial_start")
# Settings of the published files for which the network supports one value only.
FIXED_SETTINGS = {
    "attn_dropout_prob": 0,
    "emb_dropout_prob": 0,
    "no_bias": True,
    "rotary_pct": 1,
    "scale_attn_weights": True,
}
# Sizes count something; `mlp_ratio` and `spatial_start` are the numbers that do not.
LANGUAGE_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_channels",
    "intermediate_size",
    "seq_length",
    "max_position_embeddings",
)
RATIOS = ("mlp_ratio", "spatial_start")
MAX_SIZE = 2**31  # beyond it a file is damaged
MAX_RATIO = 10_000
MAX_LAYERS = 1000  # more would take minutes to create, even without weights


class QwenVLConfig(PreTrainedConfig):
    """The configuration of a Qwen-VL network, or without `visual` of its language model alone.

    With `visual=QWEN_VL_VISUAL`, the defaults are the published Qwen-VL of 9.66 B parameters.
    `intermediate_size` counts both branches of the language MLP, as in the published files.
    `visual` holds the sizes of the vision tower, `image_size` in pixels, and `image_start_id`, the
    token id of `<img>`. The ids of `</img>` and `<imgpad>` follow it. Qwen, the language model
    alone, has no `visual`.

    >>> QwenVLConfig(visual=QWEN_VL_VISUAL).n_queries
    256

    Raises:
        ValueError: sizes do not fit together, or the network does not support a setting.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    intermediate_size: int = 22016
    seq_length: int = 2048  # of training; dynamic NTK and log-n scaling begin above it
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
        if self.visual is not None:
            self.visual = dict(self.visual)
        super().__post_init__(**kwargs)
        self._check_language()
        if self.visual is not None:
            self._check_visual()

    @property
    def tower(self) -> dict[str, Any]:
        """The arguments of `VisionTower`: the sizes in `visual`, and defaults for our options."""
        assert self.visual is not None
        heads = max(self.visual["output_dim"] // 128, 1)
        tower = {"n_queries": 256, "resampler_heads": heads, "spatial_start": None}
        for key, value in self.visual.items():
            if key not in ("image_size", "image_start_id") and value is not None:
                tower[key] = value
        return tower

    @property
    def n_queries(self) -> int:
        """Tokens of an image between `<img>` and `</img>`; 0 without a vision tower."""
        return 0 if self.visual is None else self.tower["n_queries"]

    def _check_language(self) -> None:
        for key in LANGUAGE_SIZES:
            _require_size(key, getattr(self, key))
        _require_size("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS)
        deviation = self.initializer_range
        _require(
            _is_number(deviation) and 0 <= deviation < MAX_RATIO,
            f"initializer_range must be a number from 0 to {MAX_RATIO}, got {deviation!r:.100}",
        )
        heads, head_dim = self.num_attention_heads, self.kv_channels
        _require(
            head_dim * heads == self.hidden_size,
            f"hidden_size={self.hidden_size} must be num_attention_heads * kv_channels = "
            f"{heads} * {head_dim}",
        )
        _require(
            head_dim % 2 == 0 and head_dim > 2,
            f"kv_channels={head_dim} must be even and above 2: rotary positions rotate pairs of "
            "channels",
        )
        _require(
            self.intermediate_size % 2 == 0,
            f"intermediate_size={self.intermediate_size} must be even: it counts both branches of "
            "the MLP",
        )
        for key, expected in FIXED_SETTINGS.items():
            value = getattr(self, key, expected)
            _require(
                value == expected,
                f"{key}={value} is not supported; the network is the published one, where it is "
                f"{expected}",
            )

    def _check_visual(self) -> None:
        visual, known = self.visual, (*QWEN_VL_VISUAL, *VISUAL_OPTIONS)
        missing = [key for key in QWEN_VL_VISUAL if key not in visual]
        unknown = [key for key in visual if key not in known]
        _require(not missing, f"visual lacks {', '.join(missing)}")
        _require(
            not unknown,
            f"visual has unknown keys {', '.join(unknown)}; known are {', '.join(known)}",
        )
        for key, value in visual.items():
            if value is None and key in VISUAL_OPTIONS:
                continue
            if key in RATIOS:
                _require(
                    _is_number(value) and 0 < value < MAX_RATIO,
                    f"visual.{key} must be above 0 and below {MAX_RATIO}, got {value!r:.100}",
                )
            else:
                _require_size(f"visual.{key}", value)
        _require_size("visual.layers", visual["layers"], MAX_LAYERS)
        self._require_multiple("image_size", "patch_size")
        self._require_multiple("width", "heads")
        dim, last_id = visual["output_dim"], visual["image_start_id"] + 2
        _require(
            dim == self.hidden_size,
            f"visual.output_dim={dim} must be hidden_size={self.hidden_size}",
        )
        self._require_multiple("output_dim", "resampler_heads")
        _require(
            dim % 4 == 0,
            f"visual.output_dim={dim} must be a multiple of 4: sine and cosine of two coordinates",
        )
        _require(
            math.isqrt(self.n_queries) ** 2 == self.n_queries,
            f"visual.n_queries={self.n_queries} must be a square number: 16, 256, ...",
        )
        _require(
            last_id < self.vocab_size,
            f"visual.image_start_id={last_id - 2} leaves no room for </img>, <imgpad> in "
            f"vocab_size={self.vocab_size}",
        )

    def _require_multiple(self, size_key: str, divisor_key: str) -> None:
        sizes = self.visual | self.tower
        size, divisor = sizes[size_key], sizes[divisor_key]
        _require(
            size % divisor == 0,
            f"visual.{size_key}={size} must be a multiple of visual.{divisor_key}={divisor}",
        )


def _require_size(key: str, value: Any, largest: int = MAX_SIZE) -> None:
    _require(
        isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest,
        f"{key} must be a whole number from 1 to {largest}, got {value!r:.100}",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"Qwen-VL config: {message}")
