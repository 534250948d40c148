"""Keeps the decoder of each network, with its cache, between answers."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.tensor import DTensor

from qwenvl_lit.models.components import network_of

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Decoder

# An entry exists as long as its network, to which a decoder must not have a strong reference.
_decoders: weakref.WeakKeyDictionary[nn.Module, Decoder] = weakref.WeakKeyDictionary()


def decoder_of(model: nn.Module) -> Decoder | None:
    """Returns the decoder of a network, with or without adapters around it.

    Returns None if transformers' `generate` has to decode: the network has no decoder of its own,
    is sharded, or is on several devices.
    """
    network = network_of(model)
    device_map = getattr(network, "hf_device_map", None) or {}
    is_sharded = any(isinstance(parameter, DTensor) for parameter in network.parameters())
    if is_sharded or len(set(device_map.values())) > 1:
        return None
    known = _decoders.get(network)
    if known is not None and known.device == network.device:
        return known
    decoder = network.decoder()
    if decoder is not None:
        _decoders[network] = decoder
    return decoder


def release(model: nn.Module) -> None:
    """Deletes the decoder of a network with its cache, CUDA graphs and encoded images."""
    _decoders.pop(network_of(model), None)
