"""The tokenizer of Qwen-VL with the methods that vLLM calls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import BatchEncoding

from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.serving.vllm.folder import processor_of, small_files

MAX_TOKEN_CHARACTERS = 128  # of the longest token of the published vocabulary


class Tokenizer:
    """Implements vLLM's `TokenizerLike`.

    A token as a string has one character per byte, so that tokens that end within a character can
    be joined. Tags of boxes are no special tokens here: answers keep them.
    """

    is_fast = True
    truncation_side = "left"
    bos_token_id = None
    max_chars_per_token = MAX_TOKEN_CHARACTERS

    def __init__(self, processor: QwenVLProcessor):
        self.qwen = processor.tokenizer
        self.name_or_path = str(self.qwen.path.parent)
        self.vocab_size = self.qwen.vocab_size
        self.max_token_id = self.vocab_size - 1
        self.eos_token_id = processor.stop_ids[0]
        self.pad_token_id = self.qwen.pad_id
        shown = set(processor.shown_ids)
        hidden = {name: id_ for name, id_ in self.qwen.special.items() if id_ not in shown}
        self.all_special_tokens = list(hidden)
        self.all_special_ids = list(hidden.values())
        self._hidden_ids = frozenset(self.all_special_ids)

    @classmethod
    def from_pretrained(
        cls, path_or_repo_id: str | Path, *_: Any, revision: str | None = None, **__: Any
    ) -> Tokenizer:
        return cls(processor_of(small_files(str(path_or_repo_id), revision)))

    def __len__(self) -> int:
        return self.vocab_size

    def num_special_tokens_to_add(self) -> int:
        return 0

    def encode(
        self,
        text: str,
        truncation: bool | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Returns the ids of a text in which names of special tokens count.

        Such a text is a whole prompt, of the completions API. The texts of chats are encoded by the
        renderer.
        """
        ids = self.qwen.encode(text, allowed_special=self.qwen.special)
        return ids[-max_length:] if truncation and max_length else ids

    def __call__(
        self,
        text: str | list[str],
        text_pair: str | None = None,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> BatchEncoding:
        if isinstance(text, str):
            return BatchEncoding({"input_ids": self.encode(text, truncation, max_length)})
        rows = [self.encode(row, truncation, max_length) for row in text]
        return BatchEncoding({"input_ids": rows})

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return {self._token(token_id): token_id for token_id in range(self.vocab_size)}

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary

    def get_added_vocab(self) -> dict[str, int]:
        return dict(self.qwen.special)

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        if isinstance(tokens, str):
            return self._vocabulary[tokens]
        return [self._vocabulary[token] for token in tokens]

    def convert_ids_to_tokens(
        self, ids: Sequence[int], skip_special_tokens: bool = False
    ) -> list[str]:
        hidden = self._hidden_ids if skip_special_tokens else ()
        return [self._token(token_id) for token_id in ids if token_id not in hidden]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).encode("latin-1").decode("utf-8", "replace")

    def decode(self, ids: Sequence[int] | int, skip_special_tokens: bool = False) -> str:
        ids = [ids] if isinstance(ids, int) else ids
        return self.convert_tokens_to_string(self.convert_ids_to_tokens(ids, skip_special_tokens))

    def apply_chat_template(self, messages: Any, tools: Any = None, **_: Any) -> Any:
        raise NotImplementedError("the renderer of Qwen-VL encodes messages; it has no template")

    def _token(self, token_id: int) -> str:
        # Embeddings are padded beyond the vocabulary; their ids have no bytes.
        return self.qwen.token_bytes(token_id).decode("latin-1")
