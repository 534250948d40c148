"""The tokens of a text that stand for images: where they are, and what is written over them."""

# B rows, T tokens, D width, N images, Q tokens of an image, M = N * Q

from __future__ import annotations

import torch

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig


def find_image_tokens(
    input_ids: torch.Tensor | None, images: int, config: QwenVLConfig
) -> torch.Tensor:
    """Returns the flat indices (M,) into `input_ids` (B, T) of the tokens between `<img>` and
    `</img>`, in reading order. Synchronizes.

    Raises:
        ValueError: the text does not have one span of `config.n_queries` tokens for each image.
    """
    if input_ids is None:
        raise ValueError(
            "inputs_embeds with images need vision_positions: "
            "without input_ids the image tokens cannot be located"
        )
    start_id = config.visual["image_start_id"]
    ids = input_ids.flatten()
    starts = (ids == start_id).nonzero().squeeze(1)
    ends = (ids == start_id + 1).nonzero().squeeze(1)
    if not len(starts) == len(ends) == images:
        raise ValueError(
            f"{images} images, but the text has {len(starts)} <img> and {len(ends)} </img>"
        )
    lengths = ends - starts - 1
    if (lengths != config.n_queries).any():
        raise ValueError(
            f"an image takes {config.n_queries} tokens, "
            f"but those between <img> and </img> are {lengths.tolist()}"
        )
    return (starts[:, None] + torch.arange(1, config.n_queries + 1, device=starts.device)).flatten()


def write_image_tokens(
    x_BTD: torch.Tensor, features_NQD: torch.Tensor, positions_M: torch.Tensor
) -> torch.Tensor:
    """Returns `x_BTD` with the tokens at the flat indices `positions_M` replaced by `features_NQD`.

    Raises:
        ValueError: there are not as many positions as features.
    """
    images, queries = features_NQD.shape[:2]
    if images * queries != len(positions_M):
        raise ValueError(
            f"vision_positions has {len(positions_M)} entries, "
            f"but {images} images have {queries} tokens each"
        )
    features_MD = features_NQD.flatten(0, 1).to(x_BTD.dtype)
    return x_BTD.flatten(0, 1).index_copy(0, positions_M, features_MD).view_as(x_BTD)


def repeat_positions(positions_M: torch.Tensor, copies: int, length: int) -> torch.Tensor:
    """Returns the positions of all images after every row of `length` tokens is repeated.

    The copies of row r are the rows r * copies, r * copies + 1, ...; all images of the first
    copies come before those of the second.
    """
    copy = torch.arange(copies, device=positions_M.device)[:, None]
    rows = positions_M // length * copies + copy
    return (rows * length + positions_M % length).flatten()
