"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from qwenvl_lit.models.components import component_of_tensor
from qwenvl_lit.settings import Rounding, Schedule, check_settings
from qwenvl_lit.terminal import counted

CHUNK = 2**24  # elements that a stochastically rounded step updates at once: 0.6 GiB of float32
log = logging.getLogger(__name__)


class AdamW:
    """AdamW with warm-up. Weight decay applies to matrices, not to vectors (biases, norms).

    Args:
        lr: peak learning rate.
        component_lr: peak learning rate per component, e.g. {"vision": 1e-5}; nested components
            use the innermost entry.
        warmup: steps (1 or more), or their share of all steps (below 1).
        schedule: what follows the warm-up; "cosine" and "linear" fall to zero at the last step.
        rounding: how updates of trained bfloat16 tensors are rounded. With "nearest", small
            learning rates leave most of these weights unchanged.
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        *,
        lr: float,
        component_lr: Mapping[str, float] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        warmup: float = 0.05,
        schedule: Schedule = "cosine",
        rounding: Rounding = "stochastic",
        seed: int = 0,
    ):
        settings = {
            "lr": lr,
            "component_lr": component_lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup": warmup,
            "schedule": schedule,
            "rounding": rounding,
            "seed": seed,
        }
        check_settings("optim", settings)
        self.lr = lr
        self.component_lr = dict(component_lr or {})
        self.betas = (betas[0], betas[1])
        self.eps = eps
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.schedule = schedule
        self.rounding = rounding
        self.seed = seed

    def build(
        self,
        model: nn.Module,
        total_steps: int,
        components: Mapping[str, str] | None = None,
        *,
        compiled: bool = False,
    ) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """Makes an optimizer of the trainable tensors of `model`, and its schedule.

        Both optimizers skip the step if their attribute `found_inf` (a scalar tensor) is 1.

        Args:
            total_steps: how often the schedule will be stepped.
            components: component -> module path, of the family. Each parameter group stores its
                component under "component"; None without an own learning rate.
            compiled: whether to compile steps for which torch has no fused kernel.

        Raises:
            ValueError: nothing is trainable, or nothing of a component in `component_lr`.
        """
        from transformers import get_scheduler  # imports peft, and that imports bitsandbytes

        trainable = {}
        for name, tensor in model.named_parameters():
            if tensor.requires_grad:
                trainable[name] = tensor
        if not trainable:
            raise ValueError("nothing is trainable: check the adapter")
        groups = list(self._groups(trainable, components or {}))
        settings: dict[str, Any] = {"lr": self.lr, "betas": self.betas, "eps": self.eps}
        has_bfloat16 = any(tensor.dtype == torch.bfloat16 for tensor in trainable.values())
        optimizer: torch.optim.Optimizer
        if self.rounding == "stochastic" and has_bfloat16:
            optimizer = StochasticAdamW(groups, **settings, seed=self.seed, compiled=compiled)
        else:
            optimizer = torch.optim.AdamW(groups, **settings, fused=True)
        warmup_steps = self._warmup_steps(total_steps)
        if warmup_steps >= total_steps:
            self._warn_of_warmup(total_steps)
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        schedule = get_scheduler(
            name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps
        )
        return optimizer, schedule

    def describe(self, total_steps: int) -> str:
        """Returns the learning rates and their schedule in a line.

        >>> AdamW(lr=1e-4, component_lr={"vision": 1e-5}).describe(200)
        'learning rate 0.0001 (vision 1e-05), warm-up over 10 steps, then cosine'
        """
        rates = ", ".join(f"{name} {lr:g}" for name, lr in self.component_lr.items())
        text = f"learning rate {self.lr:g}" + (f" ({rates})" if rates else "")
        warmup_steps = self._warmup_steps(total_steps)
        if warmup_steps:
            return f"{text}, warm-up over {counted(warmup_steps, 'step')}, then {self.schedule}"
        reason = f" ({self.warmup:g} of all steps is less than one)" if self.warmup else ""
        return f"{text}, no warm-up{reason}, {self.schedule}"

    @rank_zero_only
    def _warn_of_warmup(self, total_steps: int) -> None:
        log.warning(
            "the run has %d optimizer step%s and optim.warmup=%g, so the learning rate never "
            "reaches optim.lr=%g: give a fraction of all steps, such as optim.warmup=0.05, or "
            "train longer",
            *(total_steps, "s" * (total_steps != 1), self.warmup, self.lr),
        )

    def _warmup_steps(self, total_steps: int) -> int:
        return int(self.warmup if self.warmup >= 1 else self.warmup * total_steps)

    def _groups(
        self, trainable: Mapping[str, nn.Parameter], components: Mapping[str, str]
    ) -> Iterator[dict[str, Any]]:
        """Parameter groups: for each learning rate the matrices, then the vectors."""
        if unknown := sorted(set(self.component_lr) - set(components)):
            raise ValueError(
                f"optim.component_lr: the model has no component {', '.join(unknown)}; its "
                f"components are {', '.join(components)}"
            )
        with_lr = {component: components[component] for component in self.component_lr}
        component_of = {name: component_of_tensor(name, with_lr) for name in trainable}
        if untrained := sorted(set(self.component_lr) - set(component_of.values())):
            trained = {component_of_tensor(name, components) or "other" for name in trainable}
            names = ", ".join(untrained)
            raise ValueError(
                f"optim.component_lr: the adapter trains nothing of {names}, only tensors of "
                f"{', '.join(sorted(trained))}. Choose an adapter that trains {names}, such as "
                "adapter=lora_all or adapter=full, or leave its learning rate out"
            )
        for component in (None, *self.component_lr):
            matrices: list[nn.Parameter] = []
            vectors: list[nn.Parameter] = []
            for name, tensor in trainable.items():
                if component_of[name] != component:
                    continue
                if tensor.ndim >= 2:
                    matrices.append(tensor)
                else:
                    vectors.append(tensor)
            lr = self.component_lr[component] if component else self.lr
            for tensors, decay in ((matrices, self.weight_decay), (vectors, 0.0)):
                if tensors:
                    group = {"params": tensors, "lr": lr, "weight_decay": decay}
                    yield {**group, "component": component}


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights without a float32 copy, by stochastic rounding.

    The step is computed in float32 and rounded up or down at random, which is right on average.
    Neighboring bfloat16 values are 0.4 to 0.8 % apart, and rounding to the nearest loses an update
    below half of that: a weight of 0.02 ignores steps of 1e-5. The moments have the dtype of their
    weight and are rounded in the same way.

    torchao's AdamW with stochastic rounding is private, draws from the global RNG, and knows
    nothing of `found_inf`. Here the noise follows from a seed and the number of the step, so that
    replicas and resumed runs round alike, and a step with a non-finite gradient is skipped on the
    device.

    Tensors may be sharded: a rank updates its own shard. Gradients are freed as soon as they have
    been used. Tensors are updated in chunks, which take the step count of their first tensor: a
    tensor is expected to have a gradient in every step or in none.

    Args:
        compiled: whether to compile the update of a chunk to one kernel. The compiled update needs
            a fifth of the memory traffic, the bottleneck of a step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        seed: int = 0,
        compiled: bool = False,
    ):
        self._adamw_step: Callable[..., tuple[torch.Tensor, ...]]
        self._adamw_step = torch.compile(adamw_step) if compiled else adamw_step
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "seed": seed,
            "calls": 0,
            "capturable": True,  # makes torch load the step counts to the device
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        found_inf: torch.Tensor | None = getattr(self, "found_inf", None)
        for group_index, group in enumerate(self.param_groups):
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            for tensor in tensors:
                if not self.state[tensor]:
                    self.state[tensor] = _initial_state(tensor)
            seed = (group["seed"] * 1_000_003 + group["calls"]) * 1009 + group_index
            group["calls"] += 1
            for same_kind in _by_device_and_dtype(tensors):
                # 0 skips the step. `keep` is a tensor because reading `found_inf` would
                # synchronize.
                keep = torch.ones((), device=same_kind[0].device)
                if found_inf is not None:
                    keep = 1 - found_inf.to(keep.device)
                torch._foreach_add_([self.state[tensor]["step"] for tensor in same_kind], keep)
                for chunk_index, chunk in enumerate(self._chunks(same_kind)):
                    self._update(chunk, group, keep, seed * 10_007 + chunk_index)
        return result

    def _update(
        self, chunk: Chunk, group: Mapping[str, Any], keep: torch.Tensor, seed: int
    ) -> None:
        """Replaces the weights and moments of `chunk`; leaves them unchanged if `keep` is 0."""
        flat = []
        for pieces in chunk[1:]:
            flat.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
        # A seed that is not a tensor would be compiled in, and each step would recompile.
        seed_tensor = torch.full((), seed % 2**31, dtype=torch.int32, device=keep.device)
        lr = group["lr"] * keep
        betas, eps, weight_decay = group["betas"], group["eps"], group["weight_decay"]
        new = self._adamw_step(*flat, chunk.step, keep, lr, seed_tensor, betas, eps, weight_decay)
        for pieces, values in zip(chunk[1:4], new, strict=True):
            torch._foreach_copy_(pieces, values.split([len(piece) for piece in pieces]))

    def _chunks(self, tensors: list[nn.Parameter]) -> Iterator[Chunk]:
        """Cuts and joins tensors to chunks of `CHUNK` elements.

        Frees a gradient once the last chunk that has a piece of it is done.
        """
        chunk, size = None, 0
        for tensor in tensors:
            state, gradient = self.state[tensor], tensor.grad
            assert gradient is not None
            updated = (tensor, state["exp_avg"], state["exp_avg_sq"])
            flat = [local_tensor(t).view(-1) for t in updated]
            flat.append(local_tensor(gradient).reshape(-1))
            tensor.grad = gradient = None
            bounds = [0, *range(CHUNK - size, len(flat[0]), CHUNK), len(flat[0])]
            for start, end in pairwise(bounds):
                chunk = chunk or Chunk(state["step"], [], [], [], [])
                for pieces, whole in zip(chunk[1:], flat, strict=True):
                    pieces.append(whole[start:end])
                size += end - start
                if size == CHUNK:
                    yield chunk
                    chunk, size = None, 0
        if chunk:
            yield chunk


class Chunk(NamedTuple):
    """Flat pieces of tensors, moments and gradients, with the step count of the first tensor."""

    step: torch.Tensor
    weights: list[torch.Tensor]
    means: list[torch.Tensor]
    squares: list[torch.Tensor]
    gradients: list[torch.Tensor]


def adamw_step(
    weights, means, squares, gradients, step, keep, lr, seed, betas, eps, weight_decay
) -> tuple[torch.Tensor, ...]:
    """Computes weights, means and squares (n,) after a step, in the dtypes that they had.

    Values that change between steps are tensors; otherwise each change would recompile.
    """
    dtypes = (weights.dtype, means.dtype, squares.dtype)
    weights, means, squares = weights.float(), means.float(), squares.float()
    step = step.clamp(min=1)
    # Gradients of a skipped step may not be finite.
    gradients = torch.where(keep > 0, gradients.float(), 0)
    means = means.lerp(gradients, (1 - betas[0]) * keep)
    squares = squares.lerp(gradients.square(), (1 - betas[1]) * keep)
    scale = (squares / (1 - betas[1] ** step)).sqrt() + eps
    weights = weights * (1 - lr * weight_decay) - means / scale * (lr / (1 - betas[0] ** step))
    new = [weights, means, squares]
    for index, dtype in enumerate(dtypes):
        if dtype != torch.float32:
            new[index] = round_stochastically(new[index], seed + index)
    return tuple(new)


def round_stochastically(values: torch.Tensor, seed: torch.Tensor | int = 0) -> torch.Tensor:
    """Rounds float32 to one of the two neighboring bfloat16 values, with the right mean.

    The nearer neighbor is more likely. Values that bfloat16 can represent stay as they are.

    Args:
        seed: () int32; the same seed rounds in the same way, on any device.
    """
    noisy = values.view(torch.int32) + noise(values, seed)
    bits = noisy & (-1 << 16)  # a bfloat16 is the upper half of a float32
    return bits.view(torch.float32).to(torch.bfloat16)


def noise(like: torch.Tensor, seed: torch.Tensor | int) -> torch.Tensor:
    """Uniform int32 noise from 0 to 65535 in the shape of `like`: a hash of index and seed.

    A hash, because torch.compile cannot compile a random generator of our own. It is lowbias32 by
    C. Wellons (https://nullprogram.com/blog/2018/07/31/).
    """
    indices = torch.arange(like.numel(), dtype=torch.int32, device=like.device)
    hashed = _hash(indices + _hash(torch.as_tensor(seed, device=like.device)))
    return (hashed & 0xFFFF).view(like.shape)


def _hash(bits: torch.Tensor) -> torch.Tensor:
    # `>>` copies the sign bit into the upper bits; the masks remove it
    bits = bits.to(torch.int32)
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return bits ^ ((bits >> 16) & 0xFFFF)


def _initial_state(tensor: nn.Parameter) -> dict[str, torch.Tensor]:
    return {
        "step": torch.zeros((), device=tensor.device),
        "exp_avg": torch.zeros_like(tensor),
        "exp_avg_sq": torch.zeros_like(tensor),
    }


def _by_device_and_dtype(tensors: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    groups: dict[Any, list[nn.Parameter]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
