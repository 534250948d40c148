"""Weights that GPTQ quantized, dequantized when they are read.

A layer of K inputs and N outputs, whose inputs are in G groups, has these tensors in files. A word
of 32 bits holds W values, the first one in its lowest bits:

    qweight  (K / W, N)  int32    the values q, packed along the inputs
    qzeros   (G, N / W)  int32    the zero points z of groups, packed along the outputs
    scales   (G, N)      float16  the scales s of groups
    g_idx    (K,)        int32    the group of each input

The weight is (q - z) * s, which is exact in float32: q - z has at most 8 bits and a sign, and s
has 11 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from qwenvl_lit.models.quantized_files import GPTQ
from qwenvl_lit.models.stored_tensors import StoredTensor
from qwenvl_lit.types import DataError

PARTS = ("qweight", "qzeros", "scales", "g_idx")
WORD = 32  # bits
# Inputs that are dequantized at a time: intermediate tensors stay in the caches of the CPU
CHUNK = 32


class PackedWeight(StoredTensor):
    """The weight (N, K) of a quantized layer, read and dequantized to float32 when it is indexed.

    Args:
        parts: the layer's tensors by the last part of their names.
        settings: of the quantization.

    Raises:
        DataError: the tensors have other types or do not fit together.
    """

    def __init__(self, parts: Mapping[str, StoredTensor], settings: GPTQ):
        super().__init__(parts["qweight"].file, parts["qweight"].name)
        self.parts = parts
        self.settings = settings
        self.word_values = WORD // settings.bits
        self.mask = (1 << settings.bits) - 1
        self._shape = self._checked_shape()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._dequantize()[index]

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def _checked_shape(self) -> tuple[int, int]:
        packed = self.parts["qweight"]
        if len(packed.shape) != 2:
            raise _fault(packed, f"has the shape {packed.shape}, expected two dimensions")
        words, outputs = packed.shape
        inputs = words * self.word_values
        size = self.settings.group_size
        groups = 1 if size == -1 else math.ceil(inputs / size)
        expected = {
            "qweight": (torch.int32, (words, outputs)),
            "qzeros": (torch.int32, (groups, math.ceil(outputs / self.word_values))),
            "scales": (torch.float16, (groups, outputs)),
            "g_idx": (torch.int32, (inputs,)),
        }
        for part, tensor in self.parts.items():
            dtype, shape = expected[part]
            if tensor.dtype != dtype and not (tensor.dtype.is_floating_point and part == "scales"):
                raise _fault(tensor, f"is {tensor.dtype}, expected {dtype}")
            if tensor.shape != shape:
                raise _fault(
                    tensor,
                    f"has the shape {tensor.shape}, expected {shape} for a layer of {inputs} "
                    f"inputs and {outputs} outputs with {self.settings.bits} bits and group_size="
                    f"{size}; is {self.settings.file.name} that of these weights?",
                )
        return outputs, inputs

    def _dequantize(self) -> torch.Tensor:
        outputs, inputs = self.shape
        words, scales = self.parts["qweight"][...], self.parts["scales"][...].float()
        zeros, groups = self._zeros(), self._groups(len(scales))
        weight = torch.empty(outputs, inputs, dtype=torch.float32, device="cpu")
        for start in range(0, inputs, CHUNK):
            end = min(start + CHUNK, inputs)
            chunk = words[start // self.word_values : end // self.word_values]
            values = self._unpack(chunk[:, None, :], dim=1).flatten(0, 1)  # (CHUNK, N)
            group = groups[start:end]
            weight[:, start:end] = ((values - zeros[group]) * scales[group]).T
        return weight

    def _zeros(self) -> torch.Tensor:
        """The zero points (G, N)."""
        stored = self._unpack(self.parts["qzeros"][...][:, :, None], dim=2).flatten(1)
        stored = stored[:, : self.shape[0]]
        middle = 1 << (self.settings.bits - 1)
        if self.settings.symmetric and (stored == middle).all():
            # Some writers call this "gptq", but have not subtracted one.
            return stored
        # A zero point of 0 is stored as the largest value. AutoGPTQ reads it in the same way.
        return (stored + self.settings.offset) & self.mask

    def _groups(self, count: int) -> torch.Tensor:
        """The group (K,) of each input."""
        inputs = self.shape[1]
        if "g_idx" not in self.parts:
            size = inputs if self.settings.group_size == -1 else self.settings.group_size
            return torch.arange(inputs) // size
        groups = self.parts["g_idx"][...].long()
        least, most = groups.aminmax()
        if least < 0 or most >= count:
            raise _fault(
                self.parts["g_idx"],
                f"has values from {least} to {most}, expected 0 to {count - 1}, the groups of "
                f"scales; fetch the file again",
            )
        return groups

    def _unpack(self, words: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns the values of words; `dim`, of size 1, becomes the values of a word."""
        shifts = torch.arange(0, WORD, self.settings.bits, dtype=torch.int32)
        sizes = [1] * words.ndim
        sizes[dim] = -1
        return (words >> shifts.view(sizes)) & self.mask


def join_packed(
    stored: Mapping[str, StoredTensor], settings: GPTQ, is_expected: Callable[[str], bool]
) -> dict[str, StoredTensor]:
    """Returns stored tensors with one weight in place of the parts of each quantized layer.

    AutoGPTQ writes a bias of zeros for layers that have none. It is left out.

    Args:
        stored: the tensors by their names in files.
        is_expected: whether the network has a tensor of a name in files.

    Raises:
        DataError: a part of a layer is missing, or of another type or shape.
    """
    joined: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        layer, _, part = name.rpartition(".")
        is_packed = f"{layer}.qweight" in stored
        if part == "qweight":
            joined[f"{layer}.weight"] = PackedWeight(_parts(stored, layer, settings), settings)
        elif is_packed and part == "bias" and not is_expected(name):
            if tensor[...].any():
                raise _fault(tensor, "is not zero, but this layer of the network has no bias")
        elif not (is_packed and part in PARTS):
            joined[name] = tensor
    return joined


def _parts(
    stored: Mapping[str, StoredTensor], layer: str, settings: GPTQ
) -> dict[str, StoredTensor]:
    parts: dict[str, StoredTensor] = {}
    for part in PARTS:
        name = f"{layer}.{part}"
        if name in stored:
            parts[part] = stored[name]
        elif part != "g_idx" or not settings.ordered:
            raise _fault(parts["qweight"], f"needs {name}, which is missing; fetch the files again")
    return parts


def _fault(tensor: StoredTensor, fault: str) -> DataError:
    return DataError(f"{tensor.file}: {tensor.name} {fault}")
