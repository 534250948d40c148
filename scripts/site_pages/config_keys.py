"""Writes the pages of the documentation about config keys, from the comments in conf/."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from textwrap import dedent

import yaml

CONF = Path(__file__).parents[2] / "conf"
# A line of an aligned list in a comment: a value, at least two blanks, and its meaning.
LIST_ITEM = re.compile(r"\s+\S+\s{2,}\S")
CODE = re.compile(r"(`[^`]*`)")
MARKDOWN = re.compile(r"([\\*_<>\[\]{}#|~$])")
# Groups whose files only hold what other groups share: their keys are those of the group above.
SHARED = "shared"


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key of a yaml file with its comment."""

    path: str  # as on the command line
    default: str  # as the file writes it; empty for a mapping, whose keys follow
    comment: tuple[str, ...]  # lines without `#`


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """A yaml file of conf/."""

    name: str
    about: tuple[str, ...]  # the lines of the comment at its top
    keys: tuple[Key, ...]


class Comments:
    """The comments of a yaml file, which its parser leaves out."""

    def __init__(self, text: str):
        self.lines = text.splitlines()
        package = int(self.lines[0].startswith("# @package"))
        head = takewhile(lambda line: line.startswith("#"), self.lines[package:])
        self.head = tuple(head)
        self.end_of_head = package + len(self.head)

    def above(self, line: int) -> list[str]:
        """Returns the comment lines that end above a line, without the head of the file."""
        first = line
        while first > self.end_of_head and self.lines[first - 1].lstrip().startswith("#"):
            first -= 1
        return [text.lstrip() for text in self.lines[first:line]]

    def beside(self, line: int, column: int) -> list[str]:
        """Returns the comment behind a value that ends at this place."""
        if line >= len(self.lines):
            return []
        found = re.search(r"(?:^|\s)(#.*)", self.lines[line][column:])
        return [found[1]] if found else []


def read_config(file: Path) -> ConfigFile:
    """Reads the keys of a yaml file in its order, with their defaults and comments."""
    text = file.read_text(encoding="utf-8")
    comments = Comments(text)
    root = yaml.compose(text)
    keys = tuple(_keys(root, prefix_of(file, text), text, comments))
    return ConfigFile(name=file.stem, about=_without_hash(comments.head), keys=keys)


def prefix_of(file: Path, text: str) -> str:
    """Returns the package of a file with a dot behind it: what precedes its keys."""
    package = re.match(r"# @package (\S+)", text)
    groups = [group for group in file.parent.relative_to(CONF).parts if group != SHARED]
    name = package[1] if package else ".".join(groups)
    return "" if name in ("", "_global_") else f"{name}."


def _keys(mapping: yaml.MappingNode, prefix: str, text: str, comments: Comments) -> Iterator[Key]:
    for name, value in mapping.value:
        # The list of files that a file starts from belongs to the file, not to the config.
        path = "defaults" if name.value == "defaults" else prefix + name.value
        comment = comments.above(name.start_mark.line)
        in_block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        if not in_block:
            default = text[value.start_mark.index : value.end_mark.index].rstrip()
            if getattr(value, "style", None) != "|":
                comment += comments.beside(value.end_mark.line, value.end_mark.column)
            yield Key(path=path, default=default, comment=_without_hash(comment))
            continue
        comment += comments.beside(name.end_mark.line, name.end_mark.column)
        if isinstance(value, yaml.SequenceNode):
            for entry in value.value:
                comment += comments.beside(entry.end_mark.line, entry.end_mark.column)
            default = yaml.serialize(_in_one_line(value), width=10_000).strip()
            yield Key(path=path, default=default, comment=_without_hash(comment))
            continue
        if comment:
            yield Key(path=path, default="", comment=_without_hash(comment))
        yield from _keys(value, f"{path}.", text, comments)


def _in_one_line(node: yaml.Node) -> yaml.Node:
    for inner in getattr(node, "value", ()):
        for part in inner if isinstance(inner, tuple) else (inner,):
            if isinstance(part, yaml.CollectionNode):
                part.flow_style = True
    node.flow_style = True
    return node


def _without_hash(lines: Sequence[str]) -> tuple[str, ...]:
    return tuple(line.removeprefix("#").removeprefix(" ") for line in lines)


def markdown_of(comment: Sequence[str]) -> str:
    """Formats a comment as Markdown: paragraphs, aligned lists and indented commands."""
    blocks: list[list[str]] = []
    is_indented = None
    for line in comment:
        indented = line.startswith("  ")
        if not line.strip():
            is_indented = None
        elif indented == is_indented:
            blocks[-1].append(line)
        else:
            blocks.append([line])
            is_indented = indented
    return "\n\n".join(map(_block, blocks))


def _block(lines: Sequence[str]) -> str:
    if not lines[0].startswith("  "):
        return escaped(" ".join(lines))
    if not LIST_ITEM.match(lines[0]):
        return "\n".join(["```text", dedent("\n".join(lines)), "```"])
    indent = len(lines[0]) - len(lines[0].lstrip())
    items: list[str] = []
    for line in lines:
        if len(line) - len(line.lstrip()) > indent:
            items[-1] += f" {escaped(line.strip())}"
        else:
            value, _, meaning = line.strip().partition(" ")
            items.append(f"- `{value}`: {escaped(meaning.strip())}")
    return "\n".join(items)


def escaped(text: str) -> str:
    """Escapes Markdown outside of backticks."""
    pieces = CODE.split(text)
    pieces[::2] = [MARKDOWN.sub(r"\\\1", piece) for piece in pieces[::2]]
    return "".join(pieces)


def first_sentence(about: Sequence[str]) -> str:
    """Returns the first sentence of the comment at the top of a file."""
    text = " ".join(takewhile(str.strip, about))
    return escaped(re.split(r"(?<=\.)\s", text, maxsplit=1)[0].rstrip(":"))


def entry(key: Key) -> str:
    """Formats a key as an item of a definition list."""
    parts = [markdown_of(key.comment)] if key.comment else []
    if "\n" in key.default:
        _, _, text = key.default.partition("\n")  # behind the line of `|-`
        parts.append("\n".join(["default:", "", "```text", dedent(text), "```"]))
    elif key.default:
        parts.insert(0, f"default: `{key.default}`")
    body = "\n\n".join(parts).replace("\n", "\n  ")
    body = re.sub(r"^ +$", "", body, flags=re.MULTILINE)
    return f"`{key.path}`\n: {body}\n"


def section(config: ConfigFile) -> str:
    """Formats a file of a group: its comment, then its keys."""
    about = markdown_of(config.about)
    return "\n".join([f"## {config.name}\n", f"{about}\n", *map(entry, config.keys)])


def page(title: str, introduction: str, files: Sequence[ConfigFile]) -> str:
    """Formats the page of a group: a table of its files, then a section for each."""
    rows = []
    for config in files:
        # MyST makes the anchor of a heading as GitHub does.
        anchor = config.name.lower()
        rows.append(f"| [{config.name}](#{anchor}) | {first_sentence(config.about)} |")
    table = "\n".join(["| file | about |", "|---|---|", *rows])
    return "\n\n".join([f"# {title}", introduction, table, *map(section, files)]) + "\n"


def config_pages() -> dict[str, str]:
    """Returns the pages about config keys by name, with `config` as the first."""
    commands = [read_config(file) for file in sorted(CONF.glob("*.yaml"))]
    introduction = (
        "The keys at the top of each command, and of the files that several commands share. "
        "`python -m qwenvl_lit.train --help` prints those of a command."
    )
    pages = {"config_commands": page("Keys of commands", introduction, commands)}
    folders = sorted({file.parent.relative_to(CONF) for file in CONF.rglob("*/*.yaml")})
    for folder in folders:
        files = [read_config(file) for file in sorted((CONF / folder).glob("*.yaml"))]
        group = folder.as_posix()
        introduction = (
            f"Each section is a file of `conf/{group}/`. A key is given on the command line as "
            f"`KEY=VALUE`."
        )
        if folder.name != SHARED:
            introduction += f" `{group}=NAME` chooses a file."
        pages[f"config_{group.replace('/', '_')}"] = page(group, introduction, files)
    return {"config": _index(list(pages)), **pages}


def _index(names: Sequence[str]) -> str:
    return "\n".join(
        [
            "# Every config key",
            "",
            "All keys of the commands and of each config group, with their defaults and comments.",
            "",
            "```",
            "python -m qwenvl_lit.train --help",
            "```",
            "",
            "These pages are made from the comments of the files in `conf/`. Give a key on the "
            "command line as `KEY=VALUE`, and choose a file of a group as `GROUP=NAME`. Search "
            "for a key in the search box.",
            "",
            "```{toctree}",
            ":maxdepth: 1",
            "",
            *names,
            "```",
            "",
        ]
    )
