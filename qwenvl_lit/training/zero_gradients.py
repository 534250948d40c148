"""Detects trained tensors that nothing in the data depends on, without synchronizing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from qwenvl_lit.models.components import component_of_tensor
from qwenvl_lit.models.host_copy import HostCopy
from qwenvl_lit.training.optim import local_tensor
from qwenvl_lit.training.strategies import sum_over_ranks
from qwenvl_lit.types import Batch, DataError

# The B of a LoRA layer starts at zero, and the first step of a warm-up has a learning rate of zero:
# the gradient of A is zero in the first two steps.
STEPS = 5
SEES_IMAGES = ("vision", "resampler")  # components that text alone gives no gradient
SHOWN = 5


class ZeroGradientGuard:
    """Stops a run if the gradient of a trained tensor is exactly zero in the first steps.

    The flags of `STEPS` steps are collected on the device. One step later, the host reads them.
    After that, a step costs nothing. Steps without images say nothing about the components that
    encode images, unless no training row has an image.

    Args:
        components: component -> module path, see `Family.components`.
    """

    def __init__(self, components: Mapping[str, str]):
        self._components = components
        self._done = False
        self._steps = 0
        self._names: Sequence[str] = ()
        self._nonzero: torch.Tensor | None = None  # a flag for each tensor
        self._images = 0  # micro-batches with images
        self._result: HostCopy | None = None

    def note(
        self,
        gradients: Mapping[str, torch.Tensor],
        batches: Sequence[Batch],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Records which gradients of an optimizer step are zero; called on all ranks.

        Args:
            gradients: by tensor name.
            batches: the micro-batches of the step.
            optimizer: tensors whose peak learning rate is zero are not checked.
        """
        if self._done or self._result is not None:
            return
        skipped = _without_learning_rate(optimizer)
        checked = {name: value for name, value in gradients.items() if id(value) not in skipped}
        if not checked:
            self._done = True
            return
        nonzero = torch.stack([local_tensor(gradient).any() for gradient in checked.values()])
        self._nonzero = nonzero if self._nonzero is None else self._nonzero | nonzero
        self._names = tuple(checked)
        self._images += sum(len(batch.vision_positions) > 0 for batch in batches)
        self._steps += 1
        if self._steps == STEPS:
            self._result = self._copy()

    def check(self, *, rows_have_images: bool) -> None:
        """Reads the flags once they are complete; called before each optimizer step.

        Args:
            rows_have_images: whether any training row has an image, or that is not known.

        Raises:
            DataError: some gradients were zero in all steps. Raised on all ranks.
        """
        if self._result is None:
            return
        zero, images = self._read(self._result)
        self._result = None
        if not images and rows_have_images:
            unknown = self._of_image_components(zero)
            if unknown and len(unknown) == len(zero):
                self._steps, self._nonzero = 0, None  # more steps are needed
                return
        self._done, self._nonzero = True, None
        if zero:
            raise DataError(self._message(zero, rows_have_images=rows_have_images))

    def finish(self, *, rows_have_images: bool) -> None:
        """Checks the flags of a run that ends after fewer than `STEPS` steps.

        Raises:
            DataError: all gradients were zero in all steps.
        """
        self.check(rows_have_images=rows_have_images)
        if self._done or self._nonzero is None:
            return
        zero, images = self._read(self._copy())
        is_unknown = rows_have_images and not images and self._of_image_components(zero) == zero
        if len(zero) == len(self._names) and not is_unknown:
            raise DataError(self._message(zero, rows_have_images=rows_have_images))

    def _copy(self) -> HostCopy:
        assert self._nonzero is not None
        images = self._nonzero.new_full((1,), self._images > 0)
        return HostCopy(sum_over_ranks(torch.cat((self._nonzero, images)).float()))

    def _read(self, copy: HostCopy) -> tuple[list[str], bool]:
        """Returns the names of tensors with zero gradients, and whether images occurred."""
        *flags, images = copy.read().tolist()
        zero = [name for name, flag in zip(self._names, flags, strict=True) if not flag]
        return zero, images > 0

    def _of_image_components(self, names: Collection[str]) -> list[str]:
        return [name for name in names if self._component(name) in SEES_IMAGES]

    def _component(self, name: str) -> str | None:
        return component_of_tensor(name, self._components)

    def _message(self, zero: Sequence[str], *, rows_have_images: bool) -> str:
        named = ", ".join(zero[:SHOWN])
        more = f" and {len(zero) - SHOWN} more" if len(zero) > SHOWN else ""
        components = sorted({self._component(name) or "other" for name in zero})
        cause = "nothing in the rows depends on them"
        advice = "choose an adapter that does not train them, or rows that use them"
        if not rows_have_images and self._of_image_components(zero) == list(zero):
            cause = "the training rows have no images"
            advice = (
                "choose an adapter that trains the language model alone (adapter=lora, or "
                "adapter=full adapter.freeze=[vision,resampler]), or rows with images"
            )
        return (
            f"the gradients of {len(zero)} of {len(self._names)} trained tensors "
            f"({', '.join(components)}) were exactly zero in the first steps: {cause}. They are "
            f"{named}{more}. To train: {advice}"
        )


def _without_learning_rate(optimizer: torch.optim.Optimizer) -> set[int]:
    """Returns the `id`s of the gradients whose tensors have a peak learning rate of zero."""
    ids = set()
    for group in optimizer.param_groups:
        if group.get("initial_lr", group["lr"]) == 0:
            ids.update(id(tensor.grad) for tensor in group["params"])
    return ids
