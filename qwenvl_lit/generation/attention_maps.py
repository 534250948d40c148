"""Where answer tokens attend to in images: maps from the weights of the network's attention."""

# A tokens of the answer, L layers, H heads, G heads of keys, T tokens of the prompt, S tokens that
# are attended to, Q tokens of an image, h x w cells of an image, K head width

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from qwenvl_lit.generation.answer import Answer
from qwenvl_lit.generation.decoders import decoder_of
from qwenvl_lit.models.components import network_of
from qwenvl_lit.types import ImageSource

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Decoder, Family
    from qwenvl_lit.types import Batch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageAttention:
    """Attention to one image of h x w cells in reading order; float32, on the CPU.

    Cells are the patches of the vision tower. Of a family without resampler they are the tokens of
    the image: Q = h * w.
    """

    source: ImageSource
    layer_weights: torch.Tensor
    """(L, H, A, Q): the weights of the answer's tokens on the image's tokens, as the network has
    them. Their sum over Q is the share of the attention that the image gets."""
    query_maps: torch.Tensor | None
    """(Q, h, w): the weights of the resampler's queries on the patches, averaged over its heads.
    Each map has the sum 1. None without resampler."""
    answer_maps: torch.Tensor
    """(A, h, w): `layer_weights`, averaged over layers and heads, times `query_maps`. The sum of a
    map is the share of the attention that the image gets."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AttentionMaps:
    """An answer, and how each of its tokens attends to the images while it is chosen.

    The token at index a is chosen from the output of the token before it, the last one of the
    prompt if a is 0. Its attention is that of this token before it.
    """

    answer: Answer
    tokens: tuple[str, ...]
    """The texts of the A tokens `answer.ids`."""
    layers: tuple[int, ...]
    """The L layers that `layer_weights` are of."""
    heads: tuple[int, ...]
    """The H heads of each layer."""
    images: tuple[ImageAttention, ...]

    def relative_to(self, other: AttentionMaps) -> AttentionMaps:
        """Divides the answer maps by that of the first token of another answer.

        This is the relative attention of arXiv 2502.17422, if `other` is about the same images with
        the question "Write a general description of the image.": what the question makes the model
        look at, without what it looks at anyway. The sum of a map then has no meaning.

        Raises:
            ValueError: the images differ in number or grid, or the other answer is empty.
        """
        shapes = [image.answer_maps.shape[1:] for image in self.images]
        if shapes != [image.answer_maps.shape[1:] for image in other.images] or not other.tokens:
            raise ValueError(
                "relative_to takes the maps of an answer, not an empty one, about the same images"
            )
        images = []
        for own, general in zip(self.images, other.images, strict=True):
            usual = general.answer_maps[:1].clamp(min=torch.finfo(torch.float32).tiny)
            images.append(replace(own, answer_maps=own.answer_maps / usual))
        return replace(self, images=tuple(images))

    def titled(
        self, image: int, tokens: Sequence[int] | None, queries: Sequence[int] | None
    ) -> tuple[ImageSource, torch.Tensor, list[str]]:
        """Returns an image, maps (n, h, w) over it and their titles; see `QwenVL.draw_attention`.

        Raises:
            ValueError: an index is out of range, or there are no maps.
        """
        [index] = chosen("image", [image], len(self.images))
        shown = self.images[index]
        if queries is None:
            if not self.tokens:
                raise ValueError("the answer is empty: there is nothing to draw")
            numbers = chosen("tokens", tokens, len(self.tokens))
            titles = [self.tokens[number] for number in numbers]
            return shown.source, shown.answer_maps[list(numbers)], titles
        if shown.query_maps is None:
            raise ValueError("queries are those of a resampler, which this model does not have")
        numbers = chosen("queries", queries, len(shown.query_maps))
        titles = [f"query {number}" for number in numbers]
        return shown.source, shown.query_maps[list(numbers)], titles


class _Weights:
    """Keeps the attention of some layers and heads to some tokens of the prompt.

    Args:
        columns: (M,), the tokens of the prompt whose weights are kept.
    """

    def __init__(self, layers: Collection[int], heads: Sequence[int], columns: torch.Tensor):
        self.heads = list(heads)
        self.columns = columns
        self.kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

    def show_last(
        self, layer: int, q_1HTK: torch.Tensor, k_1GTK: torch.Tensor, mask: torch.Tensor | None
    ) -> None:
        """Keeps the weights of the last token; see `models.passes.ShowHeads`."""
        self.show_all(layer, q_1HTK[:, :, -1:], k_1GTK, None if mask is None else mask[:, :, -1:])

    def show_all(
        self, layer: int, q_1HtK: torch.Tensor, k_1GSK: torch.Tensor, mask: torch.Tensor | None
    ) -> None:
        """Keeps the weights of all tokens."""
        if layer not in self.kept:
            return
        shared_by = q_1HtK.shape[1] // k_1GSK.shape[1]  # heads of queries
        q_HtK = q_1HtK[0, self.heads].float()
        k_HSK = k_1GSK[0, [head // shared_by for head in self.heads]].float()
        scores_HtS = q_HtK @ k_HSK.mT * q_HtK.shape[-1] ** -0.5
        if mask is not None:
            scores_HtS = scores_HtS + mask[0]
        self.kept[layer].append(scores_HtS.softmax(-1)[:, :, self.columns].cpu())

    def all(self) -> torch.Tensor:
        """Returns the kept weights (L, H, A, M)."""
        return torch.stack([torch.cat(pieces, dim=1) for pieces in self.kept.values()])


class Reading:
    """Reads an answer once more, for its attention to the images of its prompt.

    The weights, positions and precision are those of decoding.

    Args:
        layers, heads: those to keep, from 0; negative numbers count from the end; None: all.

    Raises:
        ValueError: there is no such layer or head; or transformers' `generate` has to decode.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        *,
        layers: Sequence[int] | None,
        heads: Sequence[int] | None,
    ):
        self.network = network_of(model)
        self.family = family
        config = self.network.config.get_text_config()
        self.layers = chosen("layers", layers, config.num_hidden_layers)
        self.heads = chosen("heads", heads, config.num_attention_heads)
        decoder = decoder_of(model)
        if decoder is None:
            raise ValueError(
                "attend needs a network on a single device; load it without device_map"
            )
        self.decoder: Decoder = decoder

    @torch.inference_mode()
    def maps(self, batch: Batch, answer: Answer, tokens: Sequence[str]) -> AttentionMaps:
        """Returns the maps of an answer.

        Args:
            batch: its prompt with images, on the device of the network.
            tokens: the texts of its tokens.

        Raises:
            ValueError: the prompt has no images.
        """
        if not batch.images:
            raise ValueError("attend takes one or more images, got none")
        weights_LHAM = self._weights(batch, answer.ids)
        grids = self.family.image_grids(batch.vision)
        queries = self.family.query_attention(self.network, batch.vision)
        lengths = [height * width for height, width in grids]
        if queries is not None:
            lengths = [len(query_attention) for query_attention in queries]
        images = []
        for index, weights_LHAQ in enumerate(weights_LHAM.split(lengths, dim=-1)):
            answer_maps, query_maps = weights_LHAQ.mean((0, 1)), None
            if queries is not None:
                query_attention = queries[index].cpu()
                answer_maps = answer_maps @ query_attention
                query_maps = query_attention.unflatten(-1, grids[index])
            image = ImageAttention(
                source=batch.images[index],
                layer_weights=weights_LHAQ.clone(),  # not a part of the tensor of all images
                query_maps=query_maps,
                answer_maps=answer_maps.unflatten(-1, grids[index]),
            )
            images.append(image)
        return AttentionMaps(
            answer=answer,
            tokens=tuple(tokens),
            layers=self.layers,
            heads=self.heads,
            images=tuple(images),
        )

    def _weights(self, batch: Batch, ids: Sequence[int]) -> torch.Tensor:
        """Returns the weights (L, H, A, M) of an answer on the M image tokens of its prompt."""
        columns = batch.vision_positions
        if not ids:
            return torch.empty(len(self.layers), len(self.heads), 0, len(columns))
        weights = _Weights(self.layers, self.heads, columns)
        self.decoder.start(
            self.family.inputs(batch, generate=True),
            new_tokens=len(ids),
            image_keys=[image.key for image in batch.images],
            show_heads=weights.show_last,
        )
        if len(ids) > 1:
            all_but_last = torch.tensor([ids[:-1]], device=self.decoder.device)
            self.decoder.append(all_but_last, show_heads=weights.show_all)
        return weights.all()


def chosen(name: str, indices: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Returns indices, of which negative ones count from the end, as numbers from 0; None: all.

    Raises:
        ValueError: there are none, or one is out of range or given twice.

    >>> chosen("layers", [0, -1], 32)
    (0, 31)
    """
    if indices is None:
        return tuple(range(count))
    wrong = isinstance(indices, str) or not isinstance(indices, Sequence) or not indices
    found = [] if wrong else [index for index in indices if index in range(-count, count)]
    numbers = tuple(index % count for index in found)
    if wrong or len(found) < len(indices) or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"{name} is a list of different numbers from 0 to {count - 1}, got {indices!r:.100}"
        )
    return numbers
