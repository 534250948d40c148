"""Whether compiling the decoder pays for a number of answers that is known before the first."""

from __future__ import annotations

from collections.abc import Iterable

# Seconds that compiled kernels save, from benchmarks/generate.json (H100): a decoding step takes
# 0.6 ms less at 1 row (7.2 without compilation), 1.1 at 8, 1.2 at 32 and 1.4 at 128 rows.
SAVED_PER_STEP = 1.3e-3
# A prompt of 300 tokens takes 1.6 to 1.8 ms less, at 8 to 128 rows.
SAVED_PER_PROMPT_TOKEN = 5.7e-6
# What compiling takes: the first batch of a prediction, 128 rows, took 14.2 s on an H100 and 19 s
# on an H200, of which the answers are 2.5 and 3 s. There the kernels were on disk already; kernels
# that are not take a few seconds more.
COMPILE_SECONDS = 20.0


def seconds_saved(
    prompt_tokens: int, answer_tokens: Iterable[int], *, min_new_tokens: int, max_new_tokens: int
) -> float:
    """Returns the seconds that compiled kernels save on a set, without the cost of compiling.

    Args:
        prompt_tokens: tokens of all prompts.
        answer_tokens: tokens to expect of the longest answer of each batch; 0 if none is generated.

    >>> round(seconds_saved(300_000, [20] * 8, min_new_tokens=0, max_new_tokens=512), 2)
    1.92
    """
    steps = 0
    for tokens in answer_tokens:
        if tokens:
            steps += max(min_new_tokens, min(tokens, max_new_tokens))
    return steps * SAVED_PER_STEP + prompt_tokens * SAVED_PER_PROMPT_TOKEN
