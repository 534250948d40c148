"""A Qwen-VL network small enough for tests, with random texts and images for it."""

from typing import Any

import torch

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM

IMG, IMG_END, IMG_PAD = 60, 61, 62
QUERIES = 4
SIDE = 16  # of an image, in pixels
IMAGE = [IMG, *[IMG_PAD] * QUERIES, IMG_END]

# Float32 sums in another order: logits go up to 6, and the largest difference seen is 1.3e-5.
CLOSE = {"atol": 1e-4, "rtol": 0}
LOSS = {"rtol": 1e-5, "atol": 0}

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


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
    """Random ids of ordinary tokens; 0 is padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, IMG, (length,), generator=generator).tolist()


def images(count: int, seed: int = 0) -> torch.Tensor:
    """Random normalized pixels (count, 3, SIDE, SIDE)."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def image_positions(rows: list[list[int]]) -> torch.Tensor:
    """Flat indices of the tokens between the image tags of padded rows."""
    ids = torch.tensor(rows)
    return (ids.flatten() == IMG_PAD).nonzero().squeeze(1)


def tensor(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def padded(rows: list[list[int]], side: str) -> tuple[list[list[int]], torch.Tensor]:
    """Pads rows to one length; returns them and their mask."""
    length = max(map(len, rows))
    blanks = [[0] * (length - len(row)) for row in rows]
    masks = [[0] * len(blank) + [1] * len(row) for blank, row in zip(blanks, rows, strict=True)]
    if side == "left":
        return [blank + row for blank, row in zip(blanks, rows, strict=True)], tensor(*masks)
    return [row + blank for blank, row in zip(blanks, rows, strict=True)], tensor(*masks).flip(1)


def talk_of_two() -> dict[str, torch.Tensor]:
    """Arguments for two left-padded rows with three images."""
    rows, mask = padded(
        [text(3) + IMAGE + text(5), IMAGE + text(2) + IMAGE + text(4, seed=1)], side="left"
    )
    return {
        "input_ids": tensor(*rows),
        "attention_mask": mask,
        "pixel_values": images(3),
        "vision_positions": image_positions(rows),
    }
