"""Makes the arguments of the network from a batch, without synchronizing."""

from __future__ import annotations

from typing import Any

from qwenvl_lit.types import Batch


def forward_inputs(batch: Batch, *, generate: bool = False) -> dict[str, Any]:
    """Returns arguments of `forward`, for right-padded rows, or of `generate`, for left-padded.

    Those of `forward` have no attention mask: causal attention never looks at what follows a token,
    and is faster without one.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.axis_positions}
    if generate:
        inputs["attention_mask"] = batch.attention_mask
    else:
        inputs["use_cache"] = False
    # Features of no images are passed on too: without them the vision tower would run.
    if len(batch.vision_positions) or "vision_features" in batch.vision:
        inputs |= batch.vision
        inputs["vision_positions"] = batch.vision_positions
    if batch.segment_bounds is not None:
        inputs["cu_seq_lens_q"] = batch.segment_bounds
        inputs["max_length_q"] = batch.longest_segment
    if len(batch.target_positions) and not generate:
        inputs |= {"labels": batch.labels, "target_positions": batch.target_positions}
    elif not generate:
        # Without targets one position is enough; the logits of all would fill the memory.
        inputs["logits_to_keep"] = 1
    return {name: value for name, value in inputs.items() if value is not None}
