"""Rows that join and leave a running batch of a decoder, for continuous batching.

All rows share one slot counter: a step writes the latest token of every row to the same slot. The
prompt of a new row is read apart from them, in pieces. The row then joins in the slots just before
the counter, as if it had been left-padded. Shapes and addresses never change, so CUDA graphs stay.
"""

# B rows of the cache, b prompts that are read together, T tokens of a padded prompt, G heads of
# keys and values, K head width, Q tokens of an image, D width, V vocabulary size

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qwenvl_lit.models.dynamo import CompileError
from qwenvl_lit.models.feature_cache import check_keys
from qwenvl_lit.models.passes import FEW_IMAGES, Passes

SIZES = (1, 8, 32, 128)  # numbers of rows that steps are computed for, besides all rows
# Slots that moving the rows must free, unless the cache is full. Moving takes as long as a quarter
# of a step.
WORTH_MOVING = 64
SHORT_PIECE = 32  # tokens at the end of a prompt for which it is not worth reading another piece


class Prompts:
    """Left-padded prompts that are read in pieces, to a cache of their own.

    Args:
        inputs: as for `Decoder.start`, on the decoder's device.
        lengths: the tokens of each prompt.
        image_keys: a key for each image. Images with the same key are encoded only once. With None,
            every image is encoded and none is stored.

    Raises:
        ValueError: the numbers of keys and images differ.
    """

    def __init__(
        self,
        passes: Passes,
        inputs: Mapping[str, Any],
        lengths: Sequence[int],
        image_keys: Sequence[str] | None,
    ):
        self.passes = passes
        self.inputs = inputs
        self.lengths = lengths
        self.length = inputs["input_ids"].shape[1]
        self.image_tokens = passes.image_tokens(inputs)
        if image_keys is not None and self.image_tokens:
            check_keys(image_keys, len(self.image_tokens))
        self.image_keys = image_keys
        # (Q, D) of each image, None until it is encoded
        self.features: list[torch.Tensor | None] = [None] * len(self.image_tokens)
        self.prompt_inputs = passes.prompt_inputs(inputs, lengths)
        self.x_bTD: torch.Tensor | None = None  # the embeddings, after all images
        self.cache: torch.Tensor | None = None  # (layers, 2, b, G, T, K)
        self.columns_read = 0
        self.logits: torch.Tensor | None = None
        """(b, V), of the first new tokens; None until everything is read."""

    def advance(self, tokens: int) -> bool:
        """Reads about `tokens` tokens more, and returns whether everything is read.

        Encoding an image counts as many tokens as the image has.

        Raises:
            ValueError: images and image tokens do not match.
        """
        while tokens > 0 and self.logits is None:
            try:
                tokens -= self._read_piece(tokens)
            except CompileError as error:  # for example, in a layer of another package
                self.passes.stop_compiling(error)
        return self.logits is not None

    def _read_piece(self, tokens: int) -> int:
        """Encodes images or reads some columns; returns the number of tokens that it counts."""
        if self.x_bTD is None:
            if new := self._new_images():
                return self._encode_images(new, tokens)
            self._embed()
        assert self.x_bTD is not None
        assert self.cache is not None
        rows = len(self.lengths)
        end = min(self.columns_read + max(2, tokens // rows), self.length)
        if self.length - end < SHORT_PIECE:
            end = self.length
        x_btD = self.passes.read_tokens(
            self.x_bTD[:, self.columns_read : end],
            self.cache,
            self.prompt_inputs,
            first=self.columns_read,
        )
        count = rows * (end - self.columns_read)
        self.columns_read = end
        if end == self.length:
            self.logits = self.passes.logits(x_btD[:, -1])
            self.x_bTD = None
        return count

    def _new_images(self) -> list[int]:
        """Returns the indices of the images that have to be encoded, without equal ones."""
        new: dict[str, int] = {}
        for index, features in enumerate(self.features):
            key = str(index)
            if features is None and self.image_keys is not None:
                key = self.image_keys[index]
                self.features[index] = features = self.passes.images.get(key)
            if features is None:
                new.setdefault(key, index)
        return list(new.values())

    def _encode_images(self, new: Sequence[int], tokens: int) -> int:
        """Encodes the first of some images, and returns their number of tokens."""
        for size in FEW_IMAGES:
            some = new[:size]
            count = sum(self.image_tokens[index] for index in some)
            if len(some) == size and count <= tokens:
                break
        encoded = self.passes.encode_images(self.inputs, some)
        for index, features in zip(some, encoded, strict=True):
            self.features[index] = features
            if self.image_keys is not None:
                self.features[index] = self.passes.images.add(self.image_keys[index], features)
        return count

    def _embed(self) -> None:
        features = [one for one in self.features if one is not None]
        passes = self.passes
        self.x_bTD = passes.embed(self.prompt_inputs, self.inputs, features or None)
        self.cache = passes.cache.empty(len(self.lengths), self.length, passes.dtype)


class RunningRows:
    """Rows that join, are decoded together, and leave; each as if it were alone.

    >>> prompts = running.read(inputs, lengths=[7])                             # doctest: +SKIP
    >>> while not prompts.advance(tokens=512):  # between two pieces, other rows make a step
    ...     running.step()
    >>> running.join(prompts, {0: 3}, prompts.logits.argmax(-1))
    >>> logits = running.step()[3]

    Args:
        rows: the most rows at a time.
        slots: the most tokens of a row: its prompt and the new tokens but the last.
    """

    def __init__(self, passes: Passes, *, rows: int, slots: int):
        self.passes = passes
        self.rows = rows
        self.cache = passes.cache.like()
        self.cache.allocate(rows, slots, passes.dtype)
        self.graphs = passes.new_graphs()
        self.inputs = passes.new_step_inputs(rows)
        self.slot = 0  # on the host, as in `inputs`
        self.starts: dict[int, int] = {}  # of the rows that have joined, by row
        self.sizes = sorted({*(size for size in SIZES if size < rows), rows})

    @property
    def latest(self) -> torch.Tensor:
        """(rows,), the latest token of each row. The caller writes it, in place, before a step."""
        return self.inputs.ids

    def read(
        self,
        inputs: Mapping[str, Any],
        *,
        lengths: Sequence[int],
        image_keys: Sequence[str] | None = None,
    ) -> Prompts:
        """Returns prompts that are to be read, as for `Decoder.start`. Nothing is read yet."""
        return Prompts(self.passes, inputs, lengths, image_keys)

    def join(self, prompts: Prompts, rows: Mapping[int, int], ids: torch.Tensor) -> None:
        """Adds prompts that are read.

        Args:
            rows: for the indices of the prompts that join, a free row each.
            ids: (len(rows),), the first new token of each of these.
        """
        if not self.starts:
            self.inputs.starts.zero_()  # a row that starts after the slot would attend to nothing
            self._set_slot(0)
        longest = max(prompts.lengths[index] for index in rows)
        if longest > self.slot:
            self._move(longest - self.slot)
        cache = self.cache.view(self.rows)
        for first_id, (index, row) in zip(ids, rows.items(), strict=True):
            tokens = prompts.lengths[index]
            start, padding = self.slot - tokens, prompts.length - tokens
            # What is left of an earlier row may not be finite, and attention multiplies it by 0.
            cache[:, :, row].zero_()
            cache[:, :, row, :, start : self.slot] = prompts.cache[:, :, index, :, padding:]
            self.inputs.ids[row].copy_(first_id)
            self.inputs.starts[row].fill_(start)
            self.inputs.positional[row].copy_(prompts.prompt_inputs.positional[index])
            self.starts[row] = start

    def leave(self, row: int) -> None:
        """Frees a row."""
        del self.starts[row]

    def step(self) -> torch.Tensor:
        """Appends the `latest` tokens and returns the next logits (n, V).

        They are those of the first n rows, among which are all that have joined. They are valid
        until the next step.
        """
        oldest = min(self.starts.values())
        filled, capacity = self.slot + 1, self.cache.capacity(self.rows)
        reads_less = self._slots_to_read(filled - oldest) < self._slots_to_read(filled)
        if filled > capacity or (reads_less and oldest >= WORTH_MOVING):
            self._move(-oldest)
        logits = self._run(self.size, self._slots_to_read(self.slot + 1))
        self.inputs.slot += 1
        self.slot += 1
        return logits

    @property
    def size(self) -> int:
        """The number of rows that a step computes."""
        used = max(self.starts) + 1
        return next(size for size in self.sizes if size >= used)

    def warm_up(self) -> None:
        """Compiles and captures all shapes of steps. Call it before any row joins."""
        reads = set()
        for filled in range(1, self.cache.capacity(self.rows) + 1):
            reads.add(self._slots_to_read(filled))
        for slots_read in sorted(reads):
            for size in self.sizes:
                self._run(size, slots_read)

    def _run(self, size: int, slots_read: int) -> torch.Tensor:
        cache = self.cache.view(self.rows)[:, :, :size]
        return self.passes.run_step(self.graphs, self.inputs.first(size), cache, slots_read)

    def _slots_to_read(self, filled: int) -> int:
        return self.cache.slots_to_read(self.rows, filled)

    def _move(self, by: int) -> None:
        """Moves the tokens of all rows by a number of slots, to the left if it is negative.

        Keys are rotated by positions, which are counted from the start of a row and do not change.
        """
        if self.starts:
            size, first, end = self.size, min(self.starts.values()), self.slot
            for layer in self.cache.view(self.rows)[:, :, :size]:
                layer[:, :, :, first + by : end + by] = layer[:, :, :, first:end].clone()
        for row in self.starts:
            self.starts[row] += by
        self.inputs.starts += by
        self._set_slot(self.slot + by)

    def _set_slot(self, slot: int) -> None:
        self.slot = slot
        self.inputs.slot.fill_(slot)
