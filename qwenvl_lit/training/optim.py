"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from qwenvl_lit.models.components import component_of_tensor

CHUNK = 2**24  # elements that a stochastically rounded step works on at a time: 0.6 GiB of float32


class AdamW:
    """AdamW with warm-up; matrices decay, vectors (biases, norms) do not.

    Args:
        lr: peak rate a step.
        component_lr: peak rates of parts of the model that have their own, {"vision": 1e-5}; a part inside another one goes with the inner.
        warmup: steps (1 or more), or their share of all steps (below 1).
        schedule: what follows the warm-up; "cosine" and "linear" end at zero.
        rounding: of trained tensors that are bfloat16. At small rates "nearest" leaves most of them as they are.
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
        schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine",
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        seed: int = 0,
    ):
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(f"optim.rounding is stochastic or nearest, got {rounding!r}")
        if not isinstance(lr, int | float) or lr < 0:
            raise ValueError(f"optim.lr is a number, 0 or more, got {lr!r}")
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
        compile: bool = False,
    ) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """Optimizer over the trainable tensors of `model`, and its schedule, to be stepped `total_steps` times.

        Both kinds of optimizer leave everything as it is where their attribute `found_inf` is set, to a tensor () that is 1.

        Args:
            parts: the family's modules by name, for `component_lr`. Its groups have their name as `part`, the others None.
            compile: whether what torch has no fused kernel for is compiled.

        Raises:
            ValueError: nothing is trainable, or nothing of a part that has a rate of its own.
        """
        trainable = {
            name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad
        }
        if not trainable:
            raise ValueError("nothing is trainable: check the adapter")
        groups = list(self._groups(trainable, components or {}))
        settings: dict[str, Any] = {"lr": self.lr, "betas": self.betas, "eps": self.eps}
        if self.rounding == "stochastic" and any(
            tensor.dtype == torch.bfloat16 for tensor in trainable.values()
        ):
            optimizer: torch.optim.Optimizer = StochasticAdamW(
                groups, **settings, seed=self.seed, compile=compile
            )
        else:
            optimizer = torch.optim.AdamW(groups, **settings, fused=True)
        warmup_steps = int(self.warmup if self.warmup >= 1 else self.warmup * total_steps)
        return optimizer, get_scheduler(
            self.schedule, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps
        )

    def _groups(
        self, trainable: Mapping[str, nn.Parameter], components: Mapping[str, str]
    ) -> Iterator[dict[str, Any]]:
        if unknown := sorted(set(self.component_lr) - set(components)):
            raise ValueError(
                f"optim.component_lr: the model has no part {', '.join(unknown)}; its parts are {', '.join(components)}"
            )
        part_of = {
            name: component_of_tensor(name, {part: components[part] for part in self.component_lr})
            for name in trainable
        }
        if idle := sorted(set(self.component_lr) - {part for part in part_of.values() if part}):
            raise ValueError(f"optim.component_lr: the adapter trains nothing of {', '.join(idle)}")
        for part in (None, *self.component_lr):
            for decay, of_dimension in (
                (self.weight_decay, lambda count: count >= 2),
                (0.0, lambda count: count < 2),
            ):
                tensors = [
                    tensor
                    for name, tensor in trainable.items()
                    if part_of[name] == part and of_dimension(tensor.ndim)
                ]
                if tensors:
                    yield {
                        "params": tensors,
                        "lr": self.component_lr.get(part, self.lr) if part else self.lr,
                        "weight_decay": decay,
                        "part": part,
                    }


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights without a float32 copy: what is computed in float32 is rounded up or down at random, right on average.

    Neighbours of a bfloat16 number are 0.4 to 0.8 % away, and plain rounding loses an update below half of that: a weight of 0.02 ignores
    steps of 1e-5. States have the type of their weight and are rounded as it is. Tensors may be sharded: a rank updates what it holds.
    Replicas of a tensor stay equal, since all ranks draw from `seed` and the number of the step.

    Gradients are given back as soon as they are used. Tensors are worked on in chunks, which take their count of steps from their first
    tensor: a tensor is expected to have a gradient in every step, or in none.

    Args:
        compile: the arithmetic of a chunk becomes one kernel: a fifth of the traffic of memory, which is what a step waits for.
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
        compile: bool = False,
    ):
        self._stepped: Callable[..., tuple[torch.Tensor, ...]] = (
            torch.compile(stepped) if compile else stepped
        )
        settings = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "seed": seed,
            "calls": 0,
        }
        super().__init__(
            params, {**settings, "capturable": True}
        )  # so that torch loads "step" to the device

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        found_inf: torch.Tensor | None = getattr(self, "found_inf", None)
        for number, group in enumerate(self.param_groups):
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            for tensor in tensors:
                if not self.state[tensor]:
                    moments = {name: torch.zeros_like(tensor) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[tensor] = {"step": torch.zeros((), device=tensor.device), **moments}
            seed = (group["seed"] * 1_000_003 + group["calls"]) * 1009 + number
            group["calls"] += 1
            for alike in _by_kind(tensors):
                device = alike[0].device
                keep = 1 - (
                    torch.zeros((), device=device) if found_inf is None else found_inf.to(device)
                )
                torch._foreach_add_([self.state[tensor]["step"] for tensor in alike], keep)
                for place, chunk in enumerate(self._chunks(alike)):
                    self._update(chunk, group, keep, seed * 10_007 + place)
        return result

    def _update(
        self, chunk: Chunk, group: Mapping[str, Any], keep: torch.Tensor, seed: int
    ) -> None:
        """Replace weights, means and squares of `chunk`; `keep` is 1, or 0 if nothing may change."""
        flat = [pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in chunk[1:]]
        drawn = torch.full(
            (), seed % 2**31, dtype=torch.int32, device=keep.device
        )  # as a tensor, or each would be compiled for
        rate = group["lr"] * keep
        new = self._stepped(
            *flat,
            chunk.step,
            keep,
            rate,
            drawn,
            group["betas"],
            group["eps"],
            group["weight_decay"],
        )
        for pieces, values in zip(chunk[1:4], new, strict=True):
            torch._foreach_copy_(pieces, values.split([len(piece) for piece in pieces]))

    def _chunks(self, tensors: list[nn.Parameter]) -> Iterator[Chunk]:
        """Pieces of tensors of `CHUNK` elements together. A gradient goes when its last piece is done."""
        chunk, size = None, 0
        for tensor in tensors:
            state, gradient = self.state[tensor], tensor.grad
            assert gradient is not None
            flat = [_own(t).view(-1) for t in (tensor, state["exp_avg"], state["exp_avg_sq"])] + [
                _own(gradient).reshape(-1)
            ]
            tensor.grad = gradient = None
            for start, end in pairwise(
                [0, *range(CHUNK - size, len(flat[0]), CHUNK), len(flat[0])]
            ):
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
    """Flat pieces of tensors and of what belongs to them, and the count of steps of the first."""

    step: torch.Tensor
    weights: list[torch.Tensor]
    means: list[torch.Tensor]
    squares: list[torch.Tensor]
    gradients: list[torch.Tensor]


def stepped(
    weights, means, squares, gradients, step, keep, rate, seed, betas, eps, weight_decay
) -> tuple[torch.Tensor, ...]:
    """Weights, means and squares (n,) after a step, of the type that they have. All that changes from step to step is a tensor ()."""
    kinds = [values.dtype for values in (weights, means, squares)]
    weights, means, squares, gradients = (
        values.float() for values in (weights, means, squares, gradients)
    )
    step = step.clamp(min=1)
    gradients = torch.where(keep > 0, gradients, 0)  # they may not be finite
    means = means.lerp(gradients, (1 - betas[0]) * keep)
    squares = squares.lerp(gradients.square(), (1 - betas[1]) * keep)
    scale = (squares / (1 - betas[1] ** step)).sqrt() + eps
    weights = weights * (1 - rate * weight_decay) - means / scale * (rate / (1 - betas[0] ** step))
    made = zip((weights, means, squares), kinds, strict=True)
    return tuple(
        new if kind == torch.float32 else round_stochastically(new, seed + place)
        for place, (new, kind) in enumerate(made)
    )


def round_stochastically(values: torch.Tensor, seed: torch.Tensor | int = 0) -> torch.Tensor:
    """float32 to bfloat16: to one of the two neighbours, to the nearer one more often, so that the mean is kept. What is bfloat16 stays.

    Args:
        seed: () int32; the same one rounds the same way, on any device.
    """
    bits = (values.view(torch.int32) + noise(values, seed)) & (
        -1 << 16
    )  # a bfloat16 is the upper half of a float32
    return bits.view(torch.float32).to(torch.bfloat16)


def noise(like: torch.Tensor, seed: torch.Tensor | int) -> torch.Tensor:
    """int32 from 0 to 65535 in the shape of `like`, a hash of each place and the seed: a generator could not be compiled.

    The hash is lowbias32, by C. Wellons (https://nullprogram.com/blog/2018/07/31/).
    """
    bits = torch.arange(like.numel(), dtype=torch.int32, device=like.device) + _scattered(
        torch.as_tensor(seed, device=like.device)
    )
    return (_scattered(bits) & 0xFFFF).view(like.shape)


def _scattered(bits: torch.Tensor) -> torch.Tensor:
    bits = bits.to(torch.int32)
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D  # the sign is shifted in, and masked away
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return bits ^ ((bits >> 16) & 0xFFFF)


def _by_kind(tensors: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    kinds: dict[Any, list[nn.Parameter]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(kinds.values())


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
