"""Finds the placeholder tokens of images in token ids, and replaces their embeddings."""

# B batch size, T tokens, D width, N images, Q tokens of an image, M = N * Q

from __future__ import annotations

import torch

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig


def find_image_tokens(
    input_ids: torch.Tensor | None, images: int, config: QwenVLConfig
) -> torch.Tensor:
    """Finds the tokens between `<img>` and `</img>` in `input_ids` (B, T).

    Returns their flat indices (M,) into B * T, in reading order. Synchronizes.

    Raises:
        ValueError: `input_ids` does not have a span of `config.n_queries` tokens for each image.
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
            f"an image has {config.n_queries} tokens, "
            f"but the numbers of tokens between <img> and </img> are {lengths.tolist()}"
        )
    return (starts[:, None] + torch.arange(1, config.n_queries + 1, device=starts.device)).flatten()


def write_image_tokens(
    x_BTD: torch.Tensor, features_NQD: torch.Tensor, positions_M: torch.Tensor
) -> torch.Tensor:
    """Returns `x_BTD` with the tokens at the flat indices `positions_M` replaced by `features_NQD`.

    Raises:
        ValueError: the numbers of positions and features differ.
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
    """Returns the positions of image tokens after each row of `length` tokens was repeated.

    The copies of row r are the rows r * copies, r * copies + 1, and so on. The result has the
    positions in the first copies of all rows, then those in the second copies, and so on.
    """
    copy = torch.arange(copies, device=positions_M.device)[:, None]
    rows = positions_M // length * copies + copy
    return (rows * length + positions_M % length).flatten()
