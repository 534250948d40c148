"""Command-line arguments as Hydra overrides: quotes free text and reads the value of a key."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

# Keys whose values are free text, which Hydra's grammar cannot parse unquoted.
FREE_TEXT = ("adapter.targets", "benchmarks", "data.special_tokens", "vllm.arguments")
# Keys whose values are paths: free text in which `~` is the home folder.
PATHS = (
    "answered",
    "ckpt",
    "compare",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "image",
    "init.checkpoint",
    "model.path",
    "model.vocabulary",
    "out",
    "paths.cache",
    "paths.run",
    "predictions",
    "resume",
)
# The same for keys of a dataset. Test sets and the datasets of a mixture have names.
DATA_PATHS = re.compile(
    r"data\.(?:datasets\.[^.]+\.)?(?:cache|root|split_file|train|validation|test(?:\.[^.]+)?)"
)
MAY_BE_LISTS = re.compile(r"compare|image|data\.(?:.+\.)?(?:train|validation|test(?:\.[^.]+)?)")
# Keys whose values are lists. A single value is a list of one.
LISTS = ("adapter.freeze", "adapter.train", "benchmarks", "serve.allowed_hosts", "vllm.arguments")
# Keys whose values are text, also where they look like a number or a list.
TEXT = re.compile(r"prompt|(?:model\.)?system|data\.(?:datasets\.[^.]+\.)?(?:prompt|user_agent)")
# Mappings whose keys the user chooses.
FREE_MAPPINGS = ("adapter.options", "adapters", "data.path_map", "optim.component_lr")
# Keys that the stored model config of a run may lack.
OPTIONAL_MODEL_KEYS = ("model.load_in_4bit", "model.device_map", "model.max_memory")
HELP_FLAGS = {"--help", "-h", "--hydra-help", "--info", "--shell-completion", "-sc"}
INFO_FLAGS = HELP_FLAGS | {"-i", "--cfg", "-c"}  # with these a command only prints
FLAGS = (  # all flags of Hydra
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p"),
    *("--run", "-r", "--multirun", "-m", "--shell-completion", "-sc", "--config-path", "-cp"),
    *("--config-name", "-cn", "--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
)

_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_ELEMENT = re.compile(r"\s*('(?:[^'\\]|\\.)*'|[^,]+)")
_NAMED_ELEMENT = re.compile(
    r"\s*([\w.-]+)\s*:\s*('(?:[^'\\]|\\.)*'|\[[^\]]*\]|[^,'\[\]{}]+)\s*(?:,|$)"
)
# The beginning of a path may have a drive or a scheme before its first separator.
_PATH_PAIR = re.compile(
    r"\s*((?:[A-Za-z]+:(?=[\\/]))?[^:,]+?)\s*:\s*('(?:[^'\\]|\\.)*'|[^,']*?)\s*(?:,|$)"
)
_NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def quote_free_text(argument: str) -> str:
    """Quotes the value of `key=value` if the key takes free text; quoting twice changes nothing.

    Text in quotes, numbers, `null` and `{...}` stay as they are. In a list `[a,b]` each
    element is quoted. In a path, `~` becomes the home folder, and numbers and `{...}` are quoted,
    too. Values of `TEXT` keys are quoted whatever they are, except `null`. Keys that a config may
    lack get Hydra's `++`, which adds them. A single value of a key of `LISTS` becomes a list.

    >>> quote_free_text("prompt=Is it a dog, (really)?")
    "prompt='Is it a dog, (really)?'"
    >>> quote_free_text("data.train=[a.jsonl#200,b.jsonl]")
    "data.train=['a.jsonl#200','b.jsonl']"
    """
    key, equals, value = argument.partition("=")
    if key == "--config-dir":
        return f"{key}{equals}{os.path.expanduser(value)}"
    if key == "adapters" and value.startswith("{"):
        return f"++{key}={_quote_named_paths(key, value)}"
    if key == "data.path_map" and value.startswith("{"):
        return f"++{key}={_quote_path_map(value)}"
    is_mapping = key in FREE_MAPPINGS and value.startswith("{")
    if key in OPTIONAL_MODEL_KEYS or is_mapping or key.rpartition(".")[0] in FREE_MAPPINGS:
        return f"++{argument}"
    if not equals:
        return argument
    name = key.lstrip("+")
    if name in LISTS and value not in ("", "null") and value[0] not in "[$" and "," not in value:
        value = f"[{value}]"
        argument = f"{key}={value}"
    if is_path(name):
        return f"{key}={_quote_paths(name, value)}"
    if TEXT.fullmatch(name):
        is_quoted = re.fullmatch(r"'(?:[^'\\]|\\.)*'", value, re.DOTALL)
        return argument if is_quoted or value == "null" else f"{key}={_in_quotes(value)}"
    if name not in FREE_TEXT:
        return argument
    if value.startswith("[") and value.endswith("]"):
        return f"{key}=[{','.join(map(quote, _ELEMENT.findall(value[1:-1])))}]"
    return f"{key}={quote(value)}"


def is_path(key: str) -> bool:
    """Whether the value of `key` is a path, or several.

    >>> list(map(is_path, ("model.path", "data.test.easy", "data.datasets.mine.root", "seed")))
    [True, True, True, False]
    """
    return key in PATHS or DATA_PATHS.fullmatch(key) is not None


def _quote_paths(key: str, value: str) -> str:
    may_be_list = MAY_BE_LISTS.fullmatch(key) is not None
    if may_be_list and value.startswith("[") and value.endswith("]"):
        return f"[{','.join(map(_quote_path, _ELEMENT.findall(value[1:-1])))}]"
    if key.endswith(".test") and value.startswith("{") and value.endswith("}"):
        return _quote_named_paths(key, value)
    if key.endswith(".validation") and _NUMBER.fullmatch(value):
        return value  # how many rows to hold out
    return _quote_path(value)


def _quote_named_paths(key: str, value: str) -> str:
    """Quotes the paths of `{name: path, other: [path, path]}`; leaves other mappings to Hydra."""
    inner, position = value[1:-1].strip(), 0
    named_paths = []
    while position < len(inner):
        element = _NAMED_ELEMENT.match(inner, position)
        if element is None:
            return value
        name, paths = element[1], element[2].strip()
        named_paths.append(f"{name}: {_quote_paths(f'{key}.{name}', paths)}")
        position = element.end()
    return f"{{{', '.join(named_paths)}}}"


def _quote_path_map(value: str) -> str:
    """Quotes `{C:\\data: /mnt/data, http://host/: ~/images}`; leaves other mappings to Hydra."""
    inner, position = value[1:-1], 0
    pairs = []
    while position < len(inner):
        pair = _PATH_PAIR.match(inner, position)
        if pair is None:
            return value
        beginning = re.sub(r"([\\:(){}\[\]=, ])", r"\\\1", pair[1])  # a key takes no quotes
        pairs.append(f"{beginning}: {_quote_path(pair[2])}")
        position = pair.end()
    return f"{{{', '.join(pairs)}}}"


def _quote_path(path: str) -> str:
    if path == "null":
        return path
    return _in_quotes(os.path.expanduser(unquote(path)))


def quote(text: str) -> str:
    """`text` in single quotes, as Hydra's grammar reads it."""
    if _QUOTED.fullmatch(text) or re.fullmatch(r"\{.*\}|null|[\d.]+", text, re.DOTALL):
        return text
    return _in_quotes(text)


def _in_quotes(text: str) -> str:
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)  # backslashes are special only before a quote
    if escaped.endswith("\\"):
        escaped += escaped[len(escaped.rstrip("\\")) :]
    return f"'{escaped}'".replace("${", "\\${")


def unquote(text: str) -> str:
    """The text that `quote` was called with; Lightning uses double quotes for the other ranks.

    >>> unquote(quote("it's ${a}"))
    "it's ${a}"
    """
    if _QUOTED.fullmatch(text) is None:
        return text
    quotation_mark = text[0]
    inner = text[1:-1].replace("\\${", "${")
    pieces = re.split(rf"(\\*)({quotation_mark}|\Z)", inner)
    for index in range(1, len(pieces), 3):
        pieces[index] = "\\" * (len(pieces[index]) // 2)
    return "".join(pieces)


def value_of(arguments: Sequence[str], key: str) -> str | None:
    """The value that the arguments give to `key`, without quotes; None if none or null.

    The last one counts, as for Hydra.
    """
    for argument in reversed(arguments):
        name, equals, value = argument.partition("=")
        if name == key and equals:
            return None if value == "null" else unquote(value)
    return None


def paths_of(arguments: Sequence[str], key: str) -> list[str]:
    """The paths that the arguments give to `key`: one, those of a list, or those of named sets.

    A number of rows to hold out is no path.

    >>> paths_of(["data.test={x: 'a', y: ['b','c']}"], "data.test")
    ['a', 'b', 'c']
    """
    value = value_of(arguments, key)
    if value is None or (key.endswith(".validation") and _NUMBER.fullmatch(value)):
        return []
    return _paths_in(value)


def _paths_in(value: str) -> list[str]:
    if value.startswith("[") and value.endswith("]"):
        return list(map(unquote, _ELEMENT.findall(value[1:-1])))
    if value.startswith("{") and value.endswith("}"):
        paths = []
        for _, element in _NAMED_ELEMENT.findall(value[1:-1]):
            paths += _paths_in(element.strip())
        return paths
    return [unquote(value)]


def has_any(arguments: Sequence[str], *prefixes: str) -> bool:
    """Whether an argument starts with one of the prefixes, such as `model=`.

    >>> has_any(["seed=1", "model=qwen_vl"], "model=", "data=")
    True
    """
    return any(argument.startswith(prefixes) for argument in arguments)
