"""docs/troubleshooting.md quotes messages of the source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/troubleshooting.md"
QUOTES = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE)
PLACEHOLDER = re.compile(r"%[.\d]*[sdgfr]")


def literals(tree: ast.AST) -> Iterator[str]:
    """Texts of a module; `...` stands for values that are put in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [getattr(part, "value", "") for part in node.values]
            yield "".join(part if isinstance(part, str) else "..." for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield PLACEHOLDER.sub("...", node.value)


@pytest.fixture(scope="module")
def messages() -> list[str]:
    found = []
    for file in sorted((ROOT / "qwenvl_lit").rglob("*.py")):
        found += literals(ast.parse(file.read_text()))
    return found


def test_every_quoted_message_is_in_the_source(messages):
    assert len(QUOTES) > 40
    missing = []
    for quote in QUOTES:
        parts = quote.split("...")
        pattern = re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)
        longest = max(parts, key=len)
        likely = [message for message in messages if longest in message]
        if not any(map(pattern.match, likely)):
            missing.append(quote)
    assert not missing


def test_placeholders_of_messages_are_dots():
    tree = ast.parse('f"{file} lacks {key!r}"; "%d of %.1f rows"')
    assert {"... lacks ...", "... of ... rows"} <= set(literals(tree))
