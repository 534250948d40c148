"""Command-line arguments as Hydra overrides: quotes free text and reads the value of a key."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Keys whose values are free text, which Hydra's grammar cannot parse unquoted.
FREE_TEXT = (
    "adapter.targets",
    "answered",
    "benchmarks",
    "ckpt",
    "compare",
    "data.root",
    "data.test",
    "data.train",
    "data.validation",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "image",
    "out",
    "paths.run",
    "predictions",
    "prompt",
    "resume",
    "system",
)
FREE_MAPPINGS = ("data.path_map", "optim.component_lr")  # mappings whose keys the user chooses
# Keys that the stored model config of a run may lack.
OPTIONAL_MODEL_KEYS = ("model.load_in_4bit", "model.device_map", "model.max_memory")
HELP_FLAGS = {"--help", "-h", "--hydra-help", "--info"}
INFO_FLAGS = HELP_FLAGS | {"-i", "--cfg", "-c"}  # with these a command only prints


def quote_free_text(argument: str) -> str:
    """Quotes the value of `key=value` if the key takes free text; quoting twice changes nothing.

    Text in single quotes, numbers, `null` and `{...}` stay as they are. In a list `[a,b]` each
    element is quoted. Keys that a config may lack get Hydra's `++`, which adds them.

    >>> quote_free_text("prompt=Is it a dog, (really)?")
    "prompt='Is it a dog, (really)?'"
    >>> quote_free_text("data.train=[a.jsonl#200,b.jsonl]")
    "data.train=['a.jsonl#200','b.jsonl']"
    """
    key, equals, value = argument.partition("=")
    if key in OPTIONAL_MODEL_KEYS or (key in FREE_MAPPINGS and value.startswith("{")):
        return f"++{argument}"
    if not equals or key.lstrip("+") not in FREE_TEXT:
        return argument
    if key == "hydra.run.dir" and re.fullmatch('".*"', value):
        return argument  # Lightning quotes it so for the other ranks
    if value.startswith("[") and value.endswith("]"):
        elements = re.findall(r"\s*('(?:[^'\\]|\\.)*'|[^,]+)", value[1:-1])
        return f"{key}=[{','.join(map(quote, elements))}]"
    return f"{key}={quote(value)}"


def quote(text: str) -> str:
    """`text` in single quotes, as Hydra's grammar reads it."""
    if re.fullmatch(r"'.*'|\{.*\}|null|[\d.]+", text, re.DOTALL):
        return text
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)  # backslashes are special only before a quote
    if escaped.endswith("\\"):
        escaped += escaped[len(escaped.rstrip("\\")) :]
    return f"'{escaped}'".replace("${", "\\${")


def value_of(arguments: Sequence[str], key: str) -> str | None:
    """The value that the arguments give to `key`, without quotes; None if none or null.

    The last one counts, as for Hydra.
    """
    for argument in reversed(arguments):
        name, equals, value = argument.partition("=")
        if name == key and equals:
            return None if value == "null" else value.strip("'\"")
    return None


def has_any(arguments: Sequence[str], *prefixes: str) -> bool:
    """Whether an argument starts with one of the prefixes, such as `model=`.

    >>> has_any(["seed=1", "model=qwen_vl"], "model=", "data=")
    True
    """
    return any(argument.startswith(prefixes) for argument in arguments)
