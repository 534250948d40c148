"""Counts comprehensions and conditional expressions, and finds those that are hard to read.

    python scripts/density.py                       # the package, folder by folder
    python scripts/density.py qwenvl_lit/data/*.py  # these files, with every offence

Offences are: a comprehension inside a comprehension, a conditional expression inside a
comprehension, a comprehension of more than two lines, and a conditional expression that is nested
or longer than a line. The exit status is 1 if there is an offence, or if all files together exceed
a limit.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "qwenvl_lit"
LIMITS = {"comprehensions": 25, "conditionals": 12}  # per 1,000 lines
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass
class Counts:
    """Counts over one or more files."""

    lines: int = 0
    comprehensions: int = 0
    conditionals: int = 0
    offences: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        self.lines += other.lines
        self.comprehensions += other.comprehensions
        self.conditionals += other.conditionals
        self.offences += other.offences

    def per_thousand(self) -> dict[str, float]:
        scale = 1000 / max(1, self.lines)
        return {name: getattr(self, name) * scale for name in LIMITS}

    def __str__(self) -> str:
        rates = self.per_thousand()
        return (
            f"{self.lines:6} lines {rates['comprehensions']:6.1f} comprehensions "
            f"{rates['conditionals']:6.1f} conditionals /1000 {len(self.offences):4} offences"
        )


def count(file: Path) -> Counts:
    """Counts over one Python file."""
    return count_in(file.read_text(encoding="utf-8"), str(file))


def count_in(text: str, name: str) -> Counts:
    """Counts over Python code; `name` stands in the offences."""
    counts = Counts(lines=len(text.splitlines()))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, COMPREHENSIONS):
            counts.comprehensions += 1
        elif isinstance(node, ast.IfExp):
            counts.conditionals += 1
        else:
            continue
        for fault in _faults(node):
            counts.offences.append(f"{name}:{node.lineno}: {fault}")
    return counts


def _faults(node: ast.expr) -> Iterator[str]:
    inner = [child for child in ast.walk(node) if child is not node]
    has_conditional = any(isinstance(child, ast.IfExp) for child in inner)
    if isinstance(node, ast.IfExp):
        if has_conditional:
            yield "conditional expression inside a conditional expression"
        if node.end_lineno > node.lineno:
            yield "conditional expression over several lines"
        return
    if any(isinstance(child, COMPREHENSIONS) for child in inner):
        yield "comprehension inside a comprehension"
    if has_conditional:
        yield "conditional expression inside a comprehension"
    if _lines_inside(node) > 2:
        yield f"comprehension over {_lines_inside(node)} lines"


def _lines_inside(node: ast.expr) -> int:
    """Lines of a comprehension, without brackets on lines of their own."""
    element = node.key if isinstance(node, ast.DictComp) else node.elt
    height = node.end_lineno - node.lineno + 1
    return height - 2 if element.lineno > node.lineno else height


def main(files: Iterable[str]) -> int:
    """Prints the counts for `files`, or for the package by folder; returns the exit status."""
    paths = [Path(file) for file in files]
    by_folder: defaultdict[str, Counts] = defaultdict(Counts)
    total = Counts()
    for path in paths or sorted(PACKAGE.rglob("*.py")):
        counts = count(path)
        by_folder[str(path.parent)].add(counts)
        total.add(counts)
    for folder, counts in by_folder.items():
        print(f"{counts}  {folder}")
    for offence in total.offences if paths else ():
        print(offence)
    print(f"{total}  in total")
    too_dense = any(rate > LIMITS[name] for name, rate in total.per_thousand().items())
    return int(too_dense or bool(total.offences))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
