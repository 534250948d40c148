"""The values that keys of a config may have.

The classes that a config group configures check their arguments here. A command checks its whole
config here, too, before it imports torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

from qwenvl_lit.bounds import check_bool, check_number

BoxForm = Literal["unit_text", "unit_points"]  # of boxes as plain text: `models/unit_text.py`
Engine = Literal["own", "vllm"]  # of `serve`
Checkpointing = Literal["auto", "none", "full"]
Rounding = Literal["stochastic", "nearest"]
Schedule = Literal["cosine", "linear", "constant"]


def check_choice(key: str, value: object, *, choices: tuple[object, ...]) -> None:
    """Raises an error unless `value` is one of `choices`.

    Raises:
        ValueError: names the key, the choices and the value.
    """
    if value not in choices:
        allowed = ", ".join(map(str, choices)).lower()
        raise ValueError(f"{key} must be one of {allowed}, got {value!r:.100}")


def _check_betas(key: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{key} must be two numbers, got {value!r:.100}")
    for index, beta in enumerate(value):
        check_number(f"{key}[{index}]", beta, least=0, below=1)


def _check_component_lr(key: str, value: Any) -> None:
    for component, peak in dict(value or {}).items():
        check_number(f"{key}.{component}", peak, least=0)


def _check_devices(key: str, value: Any) -> None:
    if isinstance(value, int):  # Lightning reads text and lists
        check_number(key, value, least=-1, most=1024, whole=True)
        if value == 0:
            raise ValueError(f"{key} must be 1 or more, or -1 for all, got 0")


def _check_limit(key: str, value: Any, *, optional: bool) -> None:
    check_number(key, value, least=-1, whole=True, optional=optional)
    if value == 0:
        raise ValueError(f"{key} must be 1 or more, or -1 for no limit, got 0")


def _check_batches(key: str, value: Any, *, zero: bool = True) -> None:
    """Checks a number of batches (int), or a share of them (float)."""
    most = 1 if isinstance(value, float) else math.inf
    if zero:
        check_number(key, value, least=0, most=most, optional=True)
    else:
        check_number(key, value, above=0, most=most, optional=True)


def _check_steps_or_epochs(key: str, value: Any) -> None:
    """Checks a number of optimizer steps (int), or of epochs (float)."""
    if isinstance(value, int):
        check_number(key, value, least=1, whole=True)
    else:
        check_number(key, value, above=0, optional=True)


def _check_interval(key: str, value: Any) -> None:
    if not isinstance(value, str):  # text is a time, which Lightning reads
        _check_batches(key, value, zero=False)


def _check_hosts(key: str, value: Any) -> None:
    for host in value or ():
        if not isinstance(host, str) or not re.fullmatch(r"[\w.-]+(:\d{1,5})?", host):
            raise ValueError(
                f"{key} is a list of names such as example.com or example.com:8080, got "
                f"{host!r:.100} in it"
            )


def _check_box_form(key: str, value: Any) -> None:
    if value is not None:
        check_choice(key, value, choices=get_args(BoxForm))


def _check_arguments(key: str, value: Any) -> None:
    is_list = isinstance(value, list | tuple)
    if not is_list or any(isinstance(each, dict | list | None) for each in value):
        raise ValueError(
            f"{key} is a list of arguments as vLLM takes them, such as [--enforce-eager], got "
            f"{value!r:.100}"
        )


_auto_or_bool = partial(check_choice, choices=("auto", True, False))
_share = partial(check_number, least=0, most=1)
_not_negative = partial(check_number, least=0)
_positive = partial(check_number, above=0)
_count = partial(check_number, least=0, whole=True)
_positive_count = partial(check_number, least=1, whole=True)
_optional_count = partial(check_number, least=1, whole=True, optional=True)

EARLY_STOPPING = "callbacks.early_stopping"
CHECKS: Mapping[str, Mapping[str, Callable[[str, Any], None]]] = {  # by group and key
    "adapter": {
        "rank": partial(check_number, least=1, most=1_000_000, whole=True),
        "alpha": _not_negative,
        "dropout": partial(check_number, least=0, below=1),
    },
    EARLY_STOPPING: {
        "mode": partial(check_choice, choices=("min", "max")),
        "patience": _count,
        "min_delta": check_number,
        "stopping_threshold": partial(check_number, optional=True),
        "divergence_threshold": partial(check_number, optional=True),
    },
    "data": {
        "order": partial(check_choice, choices=("mixed", "staged")),
        "on_bad_image": partial(check_choice, choices=("error", "drop")),
        "batch_size": partial(check_number, least=1, most=10**6, whole=True, or_auto=True),
        "eval_batch_size": partial(check_number, least=1, most=10**6, whole=True, or_auto=True),
        "max_tokens": partial(check_number, least=1, most=10**8, whole=True, optional=True),
        "max_bad_fraction": _share,
        "generated_validation_rows": _count,
        "num_workers": partial(check_number, least=0, most=1024, whole=True),
        "seed": _count,
        "boxes": _check_box_form,
        "packing": check_bool,
        "group_by_length": check_bool,
    },
    "generation": {
        "compile": _auto_or_bool,
        "do_sample": check_bool,
        "max_new_tokens": _positive_count,
        "min_new_tokens": _count,
        "temperature": _not_negative,
        "top_p": partial(check_number, above=0, most=1),
        "top_k": _count,
        "num_beams": partial(check_number, least=1, most=1024, whole=True),
        "length_penalty": partial(check_number, least=-100, most=100),
        "repetition_penalty": _positive,
        "seed": partial(check_number, least=0, most=2**63 - 1, whole=True, optional=True),
    },
    "memory": {
        "tokens": partial(check_number, least=1, most=10**6, whole=True),
        "images": partial(check_number, least=0, most=10**4, whole=True),
        "targets": partial(check_number, least=1, most=10**6, whole=True),
        "check": check_bool,
    },
    "model": {
        "boxes": _check_box_form,
    },
    "optim": {
        "lr": _not_negative,
        "component_lr": _check_component_lr,
        "betas": _check_betas,
        "eps": _not_negative,
        "weight_decay": _not_negative,
        "warmup": _not_negative,
        "schedule": partial(check_choice, choices=get_args(Schedule)),
        "rounding": partial(check_choice, choices=get_args(Rounding)),
        "seed": partial(check_number, least=0, most=2**63 - 1, whole=True),
    },
    "serve": {
        "port": partial(check_number, least=0, most=65535, whole=True),
        "rows": partial(check_number, least=1, most=1024, whole=True, or_auto=True),
        "context": partial(check_number, least=2, most=10**6, whole=True, or_auto=True),
        "queue": _count,
        "max_choices": partial(check_number, least=1, most=128, whole=True),
        "max_body_mb": partial(check_number, above=0, most=10**4),
        "body_s": partial(check_number, above=0, most=3600),
        "max_images": _count,
        "max_image_mb": partial(check_number, above=0, most=10**4),
        "max_image_megapixels": partial(check_number, above=0, most=100),
        "allowed_hosts": _check_hosts,
        "image_s": partial(check_number, above=0, most=3600),
        "workers": partial(check_number, least=1, most=1024, whole=True),
        "grace_s": partial(check_number, least=0, most=3600),
    },
    "speed": {
        "compile": _auto_or_bool,
        "checkpointing": partial(check_choice, choices=get_args(Checkpointing)),
        "float8": check_bool,
        "vision_cache": check_bool,
        "vision_cache_gb": _positive,
    },
    "sweep": {
        "parallel": partial(check_number, least=1, most=1024, whole=True),
        "mode": partial(check_choice, choices=("min", "max")),
    },
    "trainer": {
        "devices": _check_devices,
        "max_steps": partial(_check_limit, optional=False),
        "max_epochs": partial(_check_limit, optional=True),
        "accumulate_grad_batches": _optional_count,
        "rows_per_step": _optional_count,
        "log_every_n_steps": _optional_count,
        "validate_every": _check_steps_or_epochs,
        "num_sanity_val_steps": partial(check_number, least=-1, whole=True, optional=True),
        "gradient_clip_val": partial(check_number, least=0, optional=True),
        "limit_train_batches": partial(_check_batches, zero=False),
        "limit_val_batches": _check_batches,
        "limit_test_batches": _check_batches,
        "limit_predict_batches": _check_batches,
        "overfit_batches": _check_batches,
        "val_check_interval": _check_interval,
    },
    "vllm": {
        "tensor_parallel_size": partial(check_number, least=1, most=1024, whole=True),
        "pipeline_parallel_size": partial(check_number, least=1, most=1024, whole=True),
        "data_parallel_size": partial(check_number, least=1, most=10**4, whole=True),
        "gpu_memory_utilization": partial(check_number, above=0, most=1, optional=True),
        "arguments": _check_arguments,
    },
}


def check_seed(seed: Any) -> None:
    """Raises a ValueError unless `seed` may seed all random generators."""
    check_number("seed", seed, least=0, most=2**32 - 1, whole=True)


def check_engine(engine: Any) -> None:
    """Raises a ValueError unless `engine` is one of those that serve."""
    check_choice("engine", engine, choices=get_args(Engine))


def check_settings(group: str, settings: Mapping[str, Any], *, key: str | None = None) -> None:
    """Checks the settings of a config group that `CHECKS` lists.

    Args:
        key: of the node, for messages, if it is not `group`.

    Raises:
        ValueError: names the key, what it may be and what it is.

    >>> check_settings("speed", {"checkpointing": "some"})
    Traceback (most recent call last):
    ValueError: speed.checkpointing must be one of auto, none, full, got 'some'
    """
    for name, check in CHECKS[group].items():
        if name in settings:
            check(f"{key or group}.{name}", settings[name])


def accumulated_batches(trainer: Mapping[str, Any], data: Mapping[str, Any]) -> int:
    """Returns how many training batches an optimizer step has, from two config groups.

    With `data.batch_size` "auto" it is one, which holds all rows of the step.

    Raises:
        ValueError: the settings contradict each other.

    >>> accumulated_batches({"rows_per_step": 16}, {"batch_size": 4})
    4
    """
    rows, accumulated = trainer.get("rows_per_step"), trainer.get("accumulate_grad_batches")
    batch_size = data.get("batch_size", 1)
    if data.get("max_tokens") is not None:
        return accumulated or 1
    if batch_size == "auto":
        if accumulated not in (None, 1):
            remedy = "set trainer.rows_per_step, the rows of a step, in its place"
            if rows is not None:
                remedy = f"remove it: trainer.rows_per_step={rows} already sets the rows of a step"
            raise ValueError(
                f"trainer.accumulate_grad_batches={accumulated} counts batches of "
                f"data.batch_size rows, which is auto; {remedy}"
            )
        return 1
    if accumulated is not None or rows is None or batch_size > rows:
        return accumulated or 1
    if rows % batch_size:
        raise ValueError(
            f"trainer.rows_per_step={rows} is not a multiple of data.batch_size={batch_size}: set "
            f"trainer.rows_per_step, or trainer.accumulate_grad_batches in its place"
        )
    return rows // batch_size


def check_rows_per_step(trainer: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Checks that an optimizer step has the `trainer.rows_per_step` rows of the command line.

    Raises:
        ValueError: other keys set another number.

    >>> check_rows_per_step({"rows_per_step": 16}, {"batch_size": 32})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: trainer.rows_per_step=16 has no effect: ...
    """
    rows, batch_size = trainer.get("rows_per_step"), data.get("batch_size", "auto")
    if rows is None:
        return
    if data.get("max_tokens") is not None:
        raise ValueError(
            f"trainer.rows_per_step={rows} has no effect: data.max_tokens={data['max_tokens']} "
            f"limits the tokens of a batch; remove one of the two"
        )
    if batch_size == "auto":
        return
    batches = accumulated_batches(trainer, data)
    if batches * batch_size != rows:
        raise ValueError(
            f"trainer.rows_per_step={rows} has no effect: a step has {batches * batch_size} rows, "
            f"{batches} x data.batch_size={batch_size}; add data.batch_size=auto"
        )
