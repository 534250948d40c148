"""A tiny full model, and a network with scripted answers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tiny
import torch
from make_checkpoint import write_checkpoint

from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily

TAGS = ("<ref>", "</ref>", "<box>", "</box>")
CONFIG = {**tiny.CONFIG, "max_position_embeddings": 2048}


def tiny_checkpoint(folder: Path) -> Path:
    model = QwenVLFamily(config=CONFIG, vocabulary="tiny").load()
    write_checkpoint(model, TINY_VOCABULARY, folder, kind="safetensors")
    return folder


@contextmanager
def says(model, *answers: str, ends: bool = True) -> Iterator[list[list[int]]]:
    """Makes the network of an `api.QwenVL` answer with these texts, one prompt after the other.

    Further prompts get the last text again. Yields a list that receives the ids of each prompt.

    Args:
        ends: whether an end-of-turn token follows each text. Otherwise its last token is repeated.
    """
    tokenizer, network = model.processor.tokenizer, model.model
    end = [model.processor.stop_ids[0]] if ends else []
    scripts = [tokenizer.encode(text, allowed_special=TAGS) + end for text in answers]
    prompts: list[list[int]] = []
    position = 0

    def note_prompt(embeddings, ids: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        nonlocal position
        if ids[0].dim() == 2:  # prompts; in a decoding step there is one token per row
            prompts.append(ids[0][-1].tolist())
            position = 0

    def follow_script(head, hidden, logits: torch.Tensor) -> torch.Tensor:
        nonlocal position
        script = scripts[min(len(prompts), len(scripts)) - 1]
        token_id = script[min(position, len(script) - 1)]
        position += 1
        return torch.full_like(logits, -100).index_fill(-1, torch.tensor([token_id]), 100)

    hooks = (
        network.transformer.wte.register_forward_hook(note_prompt),
        network.lm_head.register_forward_hook(follow_script),
    )
    try:
        yield prompts
    finally:
        for hook in hooks:
            hook.remove()
