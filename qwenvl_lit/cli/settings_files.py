"""Messages for files where `key=value` is expected: `train sft.yaml`, `--config sft.yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwenvl_lit.cli.choices import DATA_FILES
from qwenvl_lit.cli.hints import explain_command, translate_options
from qwenvl_lit.runs.stored_config import read_config
from qwenvl_lit.types import DataError

YAML = (".yaml", ".yml")
FILE_FLAGS = ("--config", "--config-file", "--config_file", "--config-name", "-cn", "--cfg-file")
FLAGS_WITHOUT_VALUE = ("-m", "--multirun", "--resolve")
FOLDER = "my_conf"  # in messages


def refuse_files(command: str, arguments: Sequence[str]) -> None:
    """Refuses files, and other words, where `key=value` is expected.

    Raises:
        DataError: says how settings are kept in a file, or names the argument for the file.
    """
    is_value = False  # of a flag before it
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in FILE_FLAGS:
            name = value if equals else "".join(arguments[index + 1 : index + 2])
            if name != command:  # a sweep names the config of its jobs
                raise DataError(explain_settings_file(command, name))
        elif flag == "experiment" and value.endswith(YAML):
            raise DataError(explain_settings_file(command, value))
        elif argument.startswith("-"):
            is_value = argument not in FLAGS_WITHOUT_VALUE
        elif equals or argument.startswith("~"):
            is_value = False
        elif not is_value:
            if argument.endswith(YAML):
                raise DataError(explain_settings_file(command, argument))
            raise DataError(_explain_word(command, argument, arguments[index + 1 :]))


def explain_settings_file(command: str, file: str) -> str:
    """Returns a line that says how the settings in `file` are given here."""
    name = Path(file).stem
    plus = "" if command == "train" else "+"  # only train has the group from the start
    message = (
        f"{file}: to keep settings in a file, write them, below the line `# @package _global_`, to "
        f"{FOLDER}/experiment/{name}.yaml and run python -m qwenvl_lit.{command} "
        f"--config-dir={FOLDER} {plus}experiment={name} (docs/fine_tuning.md has an example)"
    )
    meant, others = translate_options(command, _options(Path(file).expanduser()))
    if meant:
        message += f". As arguments, its settings are: {meant}{others}"
    return message


def _options(file: Path) -> Iterator[tuple[str, list[str], str]]:
    """Yields the settings of another program's file; none if it does not exist."""
    for key, value in _read_settings(file).items():
        if value is not None and not isinstance(value, dict):
            values = value if isinstance(value, list) else [value]
            yield key, list(map(_text, values)), key


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = read_config(file)
    except DataError:  # the message says without it how settings are kept in a file
        return {}
    return settings if isinstance(settings, dict) else {}


def _explain_word(command: str, word: str, following: Sequence[str]) -> str:
    """Returns a line about an argument that is neither `key=value` nor a flag.

    Args:
        following: the arguments after it.
    """
    message = f"{word!r} is no argument; arguments are written as key=value"
    if DATA_FILES.search(word):
        split = "train" if command in ("train", "check") else "test"
        return f"{message}: data=jsonl data.{split}={word}"
    if Path(word).expanduser().exists():
        if Path(word).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            return f"{message}: image={word}"
        return f"{message}: ckpt={word}"
    if meant := explain_command(word, following):
        return f"{word!r} is a command of other programs; {meant}"
    return f"{message}; see python -m qwenvl_lit.{command} --help"
