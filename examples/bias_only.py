"""An adapter of your own: BitFit (arXiv:2106.10199), which trains the biases alone."""

from __future__ import annotations

from torch import nn

from qwenvl_lit.models.protocols import Family


class BiasOnly:
    """Trains the biases of one component of the model.

    Args:
        component: "language", "vision" or another key of `Family.components`.
    """

    trains_base_weights = True  # so that 4-bit weights are refused
    quantization = None

    def __init__(self, component: str = "language"):
        self.component = component

    def apply(self, model: nn.Module, family: Family) -> nn.Module:
        """Leaves gradients to exactly the tensors to train: these are what a checkpoint holds."""
        if self.component not in family.components:
            raise ValueError(f"adapter.component is one of {', '.join(family.components)}")
        model.requires_grad_(False)
        for name, tensor in model.get_submodule(
            family.components[self.component]
        ).named_parameters():
            if name.endswith("bias"):
                tensor.requires_grad_(True)
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        """Returns the model without the adapter: nothing was added to it."""
        return model
