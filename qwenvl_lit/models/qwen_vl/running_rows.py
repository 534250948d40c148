"""Rows that join and leave a running batch of the decoder, for continuous batching.

All rows share one slot counter: a step writes the latest token of every row to the same slot. The
prompt of a new row is read apart from them, in pieces. The row then joins in the slots just before
the counter, as if it had been left-padded. Shapes and addresses never change, so CUDA graphs stay.
"""

# B rows of the cache, b prompts that are read together, T tokens of a padded prompt, S slots,
# Q tokens of an image, D width, V vocabulary size, H heads, K head width

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qwenvl_lit.models.dynamo import CompileError
from qwenvl_lit.models.host_copy import upload
from qwenvl_lit.models.qwen_vl.kv_cache import KVCache
from qwenvl_lit.models.qwen_vl.passes import Passes
from qwenvl_lit.models.step_graphs import StepGraphs

SIZES = (1, 8, 32, 128)  # numbers of rows that steps are computed for, besides all rows
# Slots that moving the rows must free, unless the cache is full. Moving takes as long as a quarter
# of a step.
WORTH_MOVING = 64
IMAGES = (4, 2, 1)  # images that are encoded as one batch
SHORT_PIECE = 32  # tokens at the end of a prompt for which it is not worth reading another piece


class Prompts:
    """Left-padded prompts that are read in pieces, to a cache of their own.

    Args:
        inputs: as for `Decoder.start`, on the decoder's device.
        lengths: the tokens of each prompt.
        image_keys: the argument `keys` of `ImageCache`.
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
        images = len(inputs.get("pixel_values", ()))
        self.has_keys = image_keys is not None
        self.image_keys = image_keys if self.has_keys else [str(index) for index in range(images)]
        self.length = inputs["input_ids"].shape[1]
        self.frequencies = passes.frequencies(lengths)
        self.starts = upload([self.length - tokens for tokens in lengths], passes.device)[:, None]
        self.features: dict[str, torch.Tensor] = {}  # (Q, D) of the images encoded so far, by key
        self.x_bTD: torch.Tensor | None = None  # the embeddings, after all images
        self.cache: torch.Tensor | None = None  # (layers, 2, b, H, T, K)
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
        rows = len(self.lengths)
        end = min(self.columns_read + max(2, tokens // rows), self.length)
        if self.length - end < SHORT_PIECE:
            end = self.length
        x_bTD = self.passes.read_tokens(
            self.x_bTD[:, self.columns_read : end],
            self.cache,
            starts=self.starts,
            frequencies=self.frequencies,
            padded=min(self.lengths) < self.length,
            first=self.columns_read,
        )
        count = rows * (end - self.columns_read)
        self.columns_read = end
        if end == self.length:
            self.logits = self.passes.head(x_bTD[:, -1])
            self.x_bTD = None
        return count

    def _new_images(self) -> list[tuple[str, int]]:
        """Returns key and index of each image that has to be encoded."""
        known, new = self.passes.images.features, {}
        for index, key in enumerate(self.image_keys):
            if key in self.features or key in new:
                continue
            if self.has_keys and key in known:
                self.features[key] = known[key]
                known.move_to_end(key)
            else:
                new[key] = index
        return list(new.items())

    def _encode_images(self, new: Sequence[tuple[str, int]], tokens: int) -> int:
        most = max(1, min(len(new), tokens // self.passes.network.config.n_queries))
        new = new[: next(size for size in IMAGES if size <= most)]
        keys = [key for key, _ in new]
        pixel_values = self.inputs["pixel_values"]
        pixel_values = torch.cat([pixel_values[index : index + 1] for _, index in new])
        features_NQD = self.passes.images(
            pixel_values, keys if self.has_keys else None, self.passes.encode_few
        )
        self.features.update(zip(keys, features_NQD, strict=True))
        return features_NQD.shape[0] * features_NQD.shape[1]

    def _embed(self) -> None:
        inputs = {name: value for name, value in self.inputs.items() if name != "pixel_values"}
        if self.features:
            inputs["vision_features"] = torch.stack([self.features[key] for key in self.image_keys])
        passes = self.passes
        self.x_bTD = passes.embed(inputs, None)
        config = passes.network.config
        shape = (config.num_attention_heads, self.length, config.kv_channels)
        self.cache = torch.empty(
            (config.num_hidden_layers, 2, len(self.lengths), *shape),
            dtype=passes.dtype,
            device=passes.device,
        )


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
        self.cache = KVCache(passes.network.config, passes.device)
        self.cache.allocate(rows, slots, passes.dtype)
        self.graphs = StepGraphs(passes.device)
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
            self.inputs.frequencies[row].copy_(prompts.frequencies[index])
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
