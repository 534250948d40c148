"""Answers multiple-choice prompts by the likelihood of each option, without decoding."""

# B batch size, T tokens of a padded prompt, L tokens of a padded option, V vocabulary size

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from qwenvl_lit.generation.sampling import require_finite

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Processor
    from qwenvl_lit.types import Conversation, Prediction


def choose(
    model: nn.Module,
    processor: Processor,
    inputs: Mapping[str, Any],
    conversations: Sequence[Conversation],
) -> list[Prediction]:
    """Answers multiple-choice prompts with the option that has the lowest mean loss per token.

    Args:
        inputs: the prompts of `conversations`, which all have options, see `option_losses`.
    """
    options = [processor.option_ids(conversation) for conversation in conversations]
    losses_of_rows = option_losses(model, inputs, options)
    predictions = []
    for conversation, losses in zip(conversations, losses_of_rows, strict=True):
        best = losses.index(min(losses))
        predictions.append(processor.read(conversation.options[best], conversation))
    return predictions


@torch.inference_mode()
def option_losses(
    model: nn.Module, inputs: Mapping[str, Any], options: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """Returns the mean negative log-likelihood, in nats, of each option of each row.

    The network reads the prompts once. The last logits of the prompts give the loss of the first
    token of each option. The other tokens are passed to the network with the prompts' KV cache.

    Args:
        inputs: B left-padded prompts, as for `model.generate`.
        options: for each row of the batch, the token ids of each of its options, without
            end-of-turn token. Rows may have different numbers of options.

    Raises:
        DataError: a loss is not finite.
    """
    outputs = model(**inputs, use_cache=True, logits_to_keep=1)
    cache, mask_BT = outputs.past_key_values, inputs["attention_mask"]
    losses: list[list[float]] = [[] for _ in options]
    for option_index in range(max(map(len, options))):
        ids = []
        for row_options in options:
            # For a row with fewer options, its first option is computed again and ignored.
            index = option_index if option_index < len(row_options) else 0
            ids.append(torch.tensor(row_options[index], device=mask_BT.device))
        ids_BL = pad_sequence(ids, batch_first=True, padding_value=-100)
        logits_BLV = outputs.logits
        if ids_BL.shape[1] > 1:
            # Padding is on the right, and attention is causal: no option token attends to it.
            all_but_last = ids_BL[:, :-1].clamp(min=0)
            mask = torch.cat([mask_BT, torch.ones_like(all_but_last)], dim=1)
            continued = model(
                input_ids=all_but_last, attention_mask=mask, past_key_values=cache, use_cache=True
            )
            logits_BLV = torch.cat([logits_BLV, continued.logits], dim=1)
            cache.crop(-all_but_last.shape[1])
        token_losses_BL = cross_entropy(
            logits_BLV.float().mT, ids_BL, ignore_index=-100, reduction="none"
        )
        means = token_losses_BL.sum(1) / (ids_BL != -100).sum(1)
        require_finite(means, "losses of an option")
        for row_options, row_losses, mean in zip(options, losses, means.tolist(), strict=True):
            if option_index < len(row_options):
                row_losses.append(mean)
    return losses
