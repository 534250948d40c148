"""A tiny checkpoint in the published layout, and a network that says what a test has written for it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from make_checkpoint import write_checkpoint

from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.tokenizer import TINY_VOCABULARY

TAGS = ("<ref>", "</ref>", "<box>", "</box>")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 2048,
}
VISUAL = {
    "image_size": 16,
    "patch_size": 8,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "mlp_ratio": 2.0,
    "output_dim": 32,
    "n_queries": 4,
}
CONFIG = {**SIZES, "visual": {**VISUAL, "resampler_heads": 2}}


def tiny_checkpoint(folder: Path) -> Path:
    write_checkpoint(
        QwenVLFamily(config=CONFIG, vocabulary="tiny").load(),
        TINY_VOCABULARY,
        folder,
        kind="safetensors",
    )
    return folder


@contextmanager
def says(model, *answers: str, ends: bool = True) -> Iterator[list[list[int]]]:
    """The network of an `api.QwenVL` answers with these texts, one prompt after the other, the last for ever; what it is asked is listed.

    Args:
        ends: with the end mark after each text; else with its last token without end.
    """
    tokenizer, network = model.processor.tokenizer, model.model
    end = [model.processor.stop_ids[0]] if ends else []
    scripts = [tokenizer.encode(text, allowed_special=TAGS) + end for text in answers]
    asked: list[list[int]] = []
    place = 0

    def starts(embeddings, ids: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        nonlocal place
        if ids[0].dim() == 2:  # prompts; a step has one token a row
            asked.append(ids[0][-1].tolist())
            place = 0

    def speaks(head, hidden, logits: torch.Tensor) -> torch.Tensor:
        nonlocal place
        script = scripts[min(len(asked), len(scripts)) - 1]
        wanted = script[min(place, len(script) - 1)]
        place += 1
        return torch.full_like(logits, -100).index_fill(-1, torch.tensor([wanted]), 100)

    hooks = (
        network.transformer.wte.register_forward_hook(starts),
        network.lm_head.register_forward_hook(speaks),
    )
    try:
        yield asked
    finally:
        for hook in hooks:
            hook.remove()
