"""Qwen-1.8B, Qwen-7B, Qwen-14B and Qwen-72B: the language model of Qwen-VL alone.

The network is that of Qwen-VL without its vision tower. It reads no images.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from qwenvl_lit.grounding import Tag, tags_from_object
from qwenvl_lit.models.protocols import FeatureSource
from qwenvl_lit.models.qwen_vl.checkpoint import QWEN, read_network_config
from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTextTokenizer
from qwenvl_lit.types import (
    Conversation,
    DataError,
    GroundedObject,
    ImageSource,
    Prediction,
    Turn,
)

# Published sizes: billions of parameters -> width, blocks, heads, width of the MLP (both branches),
# number of embeddings, length of training texts, most tokens
SIZES = {
    "1_8": (2048, 24, 16, 11008, 151936, 8192, 8192),
    "7": (4096, 32, 32, 22016, 151936, 8192, 32768),
    "14": (5120, 40, 40, 27392, 152064, 2048, 8192),
}
SIZE_IN_NAME = re.compile(r"qwen[-_](1_8|7|14)b", re.IGNORECASE)
UNUSED = 1024  # most embeddings without a token; the published checkpoints have 85 and 213


class QwenProcessor(QwenVLProcessor):
    """Converts conversations of text to ids, and generated ids to text.

    Tags of objects are plain text: the vocabulary has no special tokens for them.

    Args:
        tokenizer: a `QwenTextTokenizer`.
        settings: as for `QwenVLProcessor`, without those of images.
    """

    find_prompt = "{image}{question}"

    def __init__(self, tokenizer: Any, **settings: Any):
        super().__init__(tokenizer, tokens_per_image=0, image_size=0, **settings)

    @property
    def shown_ids(self) -> tuple[int, ...]:
        """Ids of the special tokens that the text of an answer shows."""
        return tuple(self.tokenizer.special[name] for name in self.special_tokens)

    def read(self, text: str, conversation: Conversation) -> Prediction:
        """Converts the text of an answer to a prediction, whose boxes stay text."""
        return Prediction(
            conversation=conversation,
            text=text,
            parts=(text,) if text else (),
            reference=self._reference(conversation),
        )

    def _items(
        self, turn: Turn, images_before: int, images: Sequence[ImageSource]
    ) -> Iterator[str]:
        for part in turn.parts:
            if isinstance(part, str):
                yield part
            elif isinstance(part, GroundedObject):
                for item in tags_from_object(part, images):
                    yield item.value if isinstance(item, Tag) else item
            else:
                raise DataError(
                    "there is an image, and this model reads no images: it is a language model "
                    "alone; leave the image out, or take a model that sees, such as "
                    "model=qwen_vl_chat"
                )

    def _pixels(self, images: Sequence[ImageSource]) -> dict[str, torch.Tensor]:
        return {}


class QwenFamily(QwenVLFamily):
    """Builds the network and the processor of Qwen, the language model alone.

    The arguments are those of `QwenVLFamily`. `config` has no `visual`.
    """

    components: Mapping[str, str] = {
        "language": "transformer.h",
        "embeddings": "transformer.wte",
        "head": "lm_head",
    }
    supports_vision_cache = False
    fixed_image_size = False
    fsdp_units = ("LanguageBlock",)
    published = QWEN
    tokenizer_class = QwenTextTokenizer

    @cached_property
    def config(self) -> QwenVLConfig:
        """The config of the network.

        Raises:
            ValueError: config and vocabulary do not match, or the published size is not known.
        """
        tokens = self.tokenizer.vocab_size
        if self.folder is not None:
            config = read_network_config(self.folder, self.published)
        elif self.path is not None:
            config = published_config(self.path)
        else:
            multiple_of_16 = -(-tokens // 16) * 16
            config = QwenVLConfig(**{"vocab_size": multiple_of_16, **self.sizes})
        if config.visual is not None:
            raise ValueError("model.config.visual is for Qwen-VL, such as model=qwen_vl_tiny")
        spare = config.vocab_size - tokens
        if spare < 0 or (spare > UNUSED and not self.random):
            raise ValueError(
                f"{self.tokenizer.path} has {tokens} tokens, but `vocab_size` of the model's "
                f"config is {config.vocab_size}; choose the vocabulary of this model"
            )
        return config

    def processor(self, features: FeatureSource | None = None) -> QwenProcessor:
        """Returns a processor; see `Family.processor`."""
        return QwenProcessor(self.tokenizer, **self.processor_settings())


def published_config(name: str) -> QwenVLConfig:
    """Returns the sizes of a published checkpoint by its name.

    >>> published_config("Qwen/Qwen-1_8B-Chat").num_hidden_layers
    24

    Raises:
        ValueError: the name has none of the published sizes.
    """
    size = SIZE_IN_NAME.search(name)
    if size is None:
        raise ValueError(
            f"the size of {name} is not known: random weights need the name of a published "
            f"checkpoint, such as Qwen/Qwen-7B"
        )
    width, blocks, heads, mlp, vocabulary, length, positions = SIZES[size[1]]
    return QwenVLConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        seq_length=length,
        max_position_embeddings=positions,
    )
