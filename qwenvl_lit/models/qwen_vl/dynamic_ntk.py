"""Dynamic NTK: increases the rotary base for texts that are longer than those of training."""

from __future__ import annotations

import math

import torch
from transformers.cache_utils import Cache


def ntk_alpha(length: int, seq_length: int) -> int:
    """Returns alpha, which scales the rotary base, for `length` tokens.

    `seq_length` is the maximum length of texts in training.

    >>> [ntk_alpha(length, 2048) for length in (1, 2048, 2049, 4096, 4097)]
    [1, 1, 3, 3, 7]
    """
    return max(2 ** math.ceil(math.log2(length / seq_length) + 1) - 1, 1)


def alpha_after(cache: Cache | None, length: int, seq_length: int) -> int:
    """Returns alpha for `length` tokens that follow those in `cache`.

    The length of the prompt determines alpha. The tokens decoded after it use the same alpha,
    because the keys in the cache are already rotated. Each generation has its own cache, so alpha
    is stored in the cache and does not affect other texts. It is an attribute that is added to the
    cache: a subclass of `DynamicCache` would not be enough, because `generate` also creates static
    caches and callers may pass any cache of transformers.
    """
    if cache is None:
        return ntk_alpha(length, seq_length)
    past = cache.get_seq_length()
    # A static cache counts its tokens in a tensor. Reading the tensor would synchronize, which a
    # decoding step must not do. Decoding steps are recognized by their length of one token.
    can_read = isinstance(past, int) or (length > 1 and not torch.compiler.is_compiling())
    if not hasattr(cache, "ntk_alpha") or (can_read and past == 0):
        cache.ntk_alpha = ntk_alpha(length, seq_length)
    return cache.ntk_alpha


def forget_alpha(cache: Cache) -> None:
    """Removes the alpha of the previous prompt from an empty cache.

    `generate` reuses its static cache for the next prompt. A prompt of a single token looks like a
    decoding step to `alpha_after`, which would use the previous alpha.
    """
    if hasattr(cache, "ntk_alpha") and cache.get_seq_length() == 0:
        del cache.ntk_alpha
