"""Every number and switch of conf/ is checked before anything is built."""

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from commands import compose_config
from omegaconf import DictConfig, OmegaConf

from qwenvl_lit.cli.command import offer_groups, prepare
from qwenvl_lit.runs.composed_config import check_composed_config
from qwenvl_lit.runs.config_folder import config_folder

COMMANDS = ("train", "test", "predict", "chat", "serve", "check", "export")
ODD_NUMBERS = (math.nan, math.inf, 10**400, "abc", "", "1", [1], {"a": 1})
NUMBER = re.compile(r"(?m)^[^#\n]*: (-?\d|true|false)")
# Arguments of `QwenVLConfig`, peft and bitsandbytes, which are checked when these are built
CHECKED_LATER = re.compile(r"^(model\.config|adapter\.options|adapter\.quantization)\.")


def leaves(node: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from leaves(value, (*key, name))
    else:
        yield key, node


def put(config: dict, key: tuple[str, ...], value: Any) -> DictConfig:
    """The part of `config` on the way to `key`, which has another value."""
    if len(key) > 1:
        value = OmegaConf.to_container(put(config[key[0]], key[1:], value))
    changed = {name: config[name] for name in ("_target_",) if name in config}
    return OmegaConf.create({**changed, key[0]: value})


def composed(command: str, *overrides: str) -> dict:
    run = "needed" if command in ("test", "predict", "chat", "serve", "export") else "unused"
    model = ["model=qwen_vl_tiny"] if run == "needed" else []
    line = prepare(command, [*model, *overrides], run=run)
    offer_groups(line)
    return OmegaConf.to_container(compose_config(command, *line.arguments))


def configs() -> Iterator[dict]:
    """The config of each command, and of `train` with each file that sets a number or a switch."""
    for command in COMMANDS:
        yield composed(command)
    for file in sorted(config_folder().glob("*/*.yaml")):
        group, choice = file.parent.name, file.stem
        is_choice = group not in ("benchmark", "experiment", "sweep")
        if is_choice and NUMBER.search(file.read_text()):
            yield composed("train", f"{group}={choice}")


def refusal(config: DictConfig) -> str | None:
    try:
        check_composed_config(config)
    except ValueError as error:
        return str(error)
    return None


def test_every_number_and_every_switch_refuses_what_is_none():
    seen: set[str] = set()
    accepted: dict[str, list] = {}
    for config in configs():
        check_composed_config(OmegaConf.create(config))
        for path, default in leaves(config):
            key = ".".join(path)
            is_new = key not in seen and path[-1] != "_partial_" and not CHECKED_LATER.match(key)
            if not is_new or not isinstance(default, int | float):
                continue
            seen.add(key)
            for value in ODD_NUMBERS:
                message = refusal(put(config, path, value))
                if message is None:
                    accepted.setdefault(key, []).append(value)
                else:
                    assert key in message
                    assert len(message) < 300
                    assert "\n" not in message
    assert len(seen) > 70
    assert accepted == {
        "trainer.devices": ["abc", "", "1", [1]],  # Lightning checks text
        "data.validation": ["abc", "", "1"],  # a file
    }


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (("trust",), 1, "trust must be true or false, got 1"),
        (("verify",), "no", "verify must be true or false, got 'no'"),
        (("sweep", "mode"), "best", "sweep.mode must be min or max, got 'best'"),
        (("data", "batch_size"), 1.0, "data.batch_size must be a whole number or auto, got 1.0"),
        (("data", "root"), 7, "data.root must be text or a path or null, got 7"),
        (("data", "train"), [1], "data.train must be text or a list of text or null, got [1]"),
        (("data", "download"), 0, "data.download must be true or false, got 0"),
        (("optim", "lr"), math.nan, "optim.lr must be a finite number"),
        (("optim", "component_lr"), {"head": "a"}, "optim.component_lr.head must be a number"),
        (("optim", "schedule"), 1.5, "optim.schedule must be cosine or linear or constant"),
        (("model", "seed"), None, "model.seed must be a whole number, got None"),
        (("trainer", "fast_dev_run"), math.inf, "trainer.fast_dev_run must be a whole number or "),
        (("callbacks", "progress", "leave"), "x", "callbacks.progress.leave must be true or false"),
    ],
)
def test_a_value_of_another_type_is_a_line_that_says_what_is_expected(key, value, message):
    config = composed("train")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_composed_config(put(config, key, value))


def test_a_class_of_the_user_takes_what_it_takes():
    config = {"callbacks": {"mine": {"_target_": "mine.Callback", "limit": math.inf}}}
    check_composed_config(OmegaConf.create(config))
