"""A Qwen-VL small enough for a test: what the tests of the network share."""

from typing import Any

import torch

from qwenvl_lit.models import QwenVLConfig, QwenVLForCausalLM

IMG, IMG_END, IMG_PAD = 60, 61, 62
QUERIES = 4
SIDE = 16  # of a picture, in pixels
PICTURE = [IMG, *[IMG_PAD] * QUERIES, IMG_END]


def small_config(visual: dict[str, Any] | None = None, **changes) -> QwenVLConfig:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 8,
        "intermediate_size": 96,
        "seq_length": 32,
        "initializer_range": 0.3,  # large enough that every layer matters to the logits
    }
    tower = {
        "image_size": SIDE,
        "patch_size": 4,
        "width": 16,
        "layers": 2,
        "heads": 2,
        "mlp_ratio": 2.5,
        "output_dim": 32,
        "image_start_id": IMG,
        "n_queries": QUERIES,
        "resampler_heads": 4,
    }
    return QwenVLConfig(**sizes | changes, visual=tower | (visual or {}))


def small_network(seed: int = 0, attn_implementation: str = "sdpa", **changes) -> QwenVLForCausalLM:
    """Random weights, biases included, in evaluation mode."""
    torch.manual_seed(seed)
    config = small_config(**changes)
    config._attn_implementation = attn_implementation
    model = QwenVLForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def text(length: int, seed: int = 0) -> list[int]:
    """Random ids without special meaning."""
    return torch.randint(0, IMG, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Normalised pixels (count, 3, SIDE, SIDE)."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def picture_positions(rows: list[list[int]]) -> torch.Tensor:
    """Flat indices of the tokens between the picture tags of padded rows."""
    ids = torch.tensor(rows)
    return (ids.flatten() == IMG_PAD).nonzero().squeeze(1)
