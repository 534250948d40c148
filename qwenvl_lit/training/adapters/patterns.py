"""Regular expressions of an adapter, which may come from a stranger's folder.

Python's matching can take years for a short expression such as `(a+)+$`, and nothing interrupts it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

SECONDS = 10.0  # all expressions on all module paths take milliseconds
PLAIN = re.compile(r"[\w.-]*")
# How peft makes expressions of its settings
FORMS: Mapping[str, str] = {
    "target_modules": "(?:{})$",
    "exclude_modules": "(?:{})$",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
ENDINGS = ("target_modules", "exclude_modules")  # their lists hold endings of paths
# Matches each expression with each path, in a process that can be ended
PROGRAM = """
import json, re, sys
expressions, paths = json.load(sys.stdin)
for expression in expressions:
    for path in paths:
        re.match(expression, path)
"""


def check_syntax(settings: Mapping[str, Any]) -> None:
    """Refuses settings, by peft's names, that hold no regular expressions where peft expects them.

    Raises:
        ValueError: names the setting.
    """
    for name in FORMS:
        for pattern in _patterns(settings, name):
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"{_key(name)}={pattern!r:.100} is not a regular expression: {error}"
                ) from None


def check_speed(settings: Mapping[str, Any], paths: Sequence[str]) -> None:
    """Refuses settings with expressions that take too long to match with the paths of modules.

    Raises:
        ValueError: names the setting.
    """
    for name, form in FORMS.items():
        patterns = _patterns(settings, name)
        expressions = tuple(form.replace("{}", pattern) for pattern in patterns)
        if expressions and not _are_fast(expressions, tuple(paths)):
            raise ValueError(
                f"{_key(name)}={', '.join(patterns):.100}: matching this expression with the "
                f"{len(paths)} module paths of the model takes more than {SECONDS:.0f} s; write it "
                f"without a repetition in a repetition"
            )


def _patterns(settings: Mapping[str, Any], name: str) -> list[str]:
    """Returns the expressions of a setting that are more than a name."""
    value = settings.get(name) or ()
    if isinstance(value, str):
        value = [value]
    elif name in ENDINGS:
        return []
    return [pattern for pattern in value if not PLAIN.fullmatch(pattern)]


def _key(name: str) -> str:
    return "adapter.targets" if name == "target_modules" else f"adapter.options.{name}"


@cache
def _are_fast(expressions: tuple[str, ...], paths: tuple[str, ...]) -> bool:
    command = [sys.executable, "-I", "-S", "-c", PROGRAM]
    content = json.dumps([expressions, paths])
    try:
        subprocess.run(command, input=content, text=True, timeout=SECONDS, check=True)
    except subprocess.TimeoutExpired:
        return False
    return True
