"""Quantization of weights to 4 bits by bitsandbytes, for all model families."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from qwenvl_lit.extras import require

NF4: Mapping[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


def bnb_config(
    settings: Mapping[str, Any], *, dtype: torch.dtype, skip: Sequence[str]
) -> BitsAndBytesConfig:
    """Returns the config with which transformers quantizes the linear layers of a model.

    Args:
        settings: arguments of `BitsAndBytesConfig`. They take precedence over `dtype` and `skip`.
        dtype: the dtype in which quantized layers compute.
        skip: names of modules that are not quantized.

    Raises:
        ValueError: bitsandbytes is not installed, or `settings` has an unknown argument or
            a value of another type.
    """
    known = inspect.signature(BitsAndBytesConfig).parameters
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(
            f"quantization: BitsAndBytesConfig has no argument {', '.join(unknown)}; it has "
            f"{', '.join(known)}"
        )
    require("bitsandbytes", "a quantized model")
    defaults = {"bnb_4bit_compute_dtype": dtype, "llm_int8_skip_modules": list(skip)}
    try:
        return BitsAndBytesConfig(**{**defaults, **settings})
    except TypeError as error:  # a value of another type
        raise ValueError(f"quantization: {error}") from None
