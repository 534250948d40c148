"""Saves and restores the states of the random number generators."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """Returns the RNG states of Python, NumPy, torch and the GPU of this process.

    The states are plain data and tensors, so that `torch.load(weights_only=True)` can read them.
    """
    algorithm, keys, *further_state = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (algorithm, torch.from_numpy(keys.astype(np.int64)), *further_state),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restores the states that `rng_state` returned. Without a GPU, its state is ignored."""
    random.setstate(state["python"])
    algorithm, keys, *further_state = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *further_state))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
