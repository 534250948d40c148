"""Dynamic NTK: the rotary base is stretched for texts longer than those of training."""

from __future__ import annotations

import math

import torch
from transformers.cache_utils import Cache


def ntk_alpha(length: int, seq_length: int) -> int:
    """Returns the stretch of the rotary base for `length` tokens, trained on `seq_length`.

    >>> [ntk_alpha(length, 2048) for length in (1, 2048, 2049, 4096, 4097)]
    [1, 1, 3, 3, 7]
    """
    return max(2 ** math.ceil(math.log2(length / seq_length) + 1) - 1, 1)


def alpha_after(cache: Cache | None, length: int, seq_length: int) -> int:
    """Returns alpha for `length` tokens that follow those in `cache`.

    The length of the prompt decides, and its alpha holds for all tokens decoded after it, because
    keys in the cache are already rotated. One generation has one cache, so alpha is stored there
    and cannot leak into another text. It is an attribute and not a subclass of `DynamicCache`,
    because `generate` also makes static caches and callers may pass any cache of transformers.
    """
    if cache is None:
        return ntk_alpha(length, seq_length)
    past = cache.get_seq_length()
    # A static cache counts tokens in a tensor, and reading it synchronizes. A decoding step must
    # not do that and need not: one token after a prompt is no prompt.
    readable = isinstance(past, int) or (length > 1 and not torch.compiler.is_compiling())
    if not hasattr(cache, "ntk_alpha") or (readable and past == 0):
        cache.ntk_alpha = ntk_alpha(length, seq_length)
    return cache.ntk_alpha


def forget_alpha(cache: Cache) -> None:
    """Removes the previous prompt's alpha from an empty cache.

    `generate` reuses its static cache for the next prompt, which may have a single token.
    """
    if hasattr(cache, "ntk_alpha") and cache.get_seq_length() == 0:
        del cache.ntk_alpha
