"""A network that adapters may be around."""

from __future__ import annotations

from torch import nn


def network_of(model: nn.Module) -> nn.Module:
    """`model` itself, or what peft has put inside of it: module paths of a family's parts count from here."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
