"""Multiple choice without generating: how likely each option is after the prompt, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

# B rows, T tokens of the prompts, L tokens of an option


@torch.inference_mode()
def option_losses(
    model: nn.Module, inputs: Mapping[str, Any], options: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """The mean negative log-likelihood of the tokens of each option of each row, in nats.

    The prompts go through the network once. It then goes on from them with each option in turn, where that has more than one token.

    Args:
        inputs: B left-padded prompts, as for `model.generate`.
        options: ids, without an end mark: for each row, of each of its options. Rows may have different numbers of them.
    """
    outputs = model(**inputs, use_cache=True, logits_to_keep=1)
    cache, mask_BT = outputs.past_key_values, inputs["attention_mask"]
    losses: list[list[float]] = [[] for _ in options]
    for number in range(max(map(len, options))):
        # a row with fewer options takes part with its first one
        ids = [
            torch.tensor(own[number if number < len(own) else 0], device=mask_BT.device)
            for own in options
        ]
        ids_BL = pad_sequence(ids, batch_first=True, padding_value=-100)
        logits = outputs.logits
        if ids_BL.shape[1] > 1:
            inside = ids_BL[:, :-1].clamp(
                min=0
            )  # what is padding stands behind all that counts, and is seen by nothing
            mask = torch.cat([mask_BT, torch.ones_like(inside)], dim=1)
            rest = model(
                input_ids=inside, attention_mask=mask, past_key_values=cache, use_cache=True
            )
            logits = torch.cat([logits, rest.logits], dim=1)
            cache.crop(-inside.shape[1])
        of_tokens = cross_entropy(logits.float().mT, ids_BL, ignore_index=-100, reduction="none")
        means = of_tokens.sum(1) / (ids_BL != -100).sum(1)
        for own, row, mean in zip(options, losses, means.tolist(), strict=True):
            if number < len(own):
                row.append(mean)
    return losses
