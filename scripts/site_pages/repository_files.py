"""Brings files of the repository's root into the documentation, and mends links between pages."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = DOCS / "generated"
# Files outside docs/ that the site shows, by the name of their page.
COPIES = {
    "readme": ROOT / "README.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "security": ROOT / "SECURITY.md",
    "changelog": ROOT / "CHANGELOG.md",
    "code_of_conduct": ROOT / "CODE_OF_CONDUCT.md",
}
LINK = re.compile(r"(!?\[(?:[^\[\]\\]|\\.)*\])\(([^)\s:#]+)(#[^)\s]*)?\)")


def relinked(text: str, source: Path, page: Path) -> str:
    """Returns the text of `source` for `page`: links lead to pages of the site.

    A link to a file that the site does not show becomes its text.
    """

    def replaced(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        file = Path(os.path.normpath(source.parent / target))
        for name, copied in COPIES.items():
            if file == copied:
                file = GENERATED / f"{name}.md"
        if not file.is_relative_to(DOCS):
            return label[1:-1]
        return f"{label}({os.path.relpath(file, page.parent)}{anchor})"

    return LINK.sub(replaced, text)


def copied_pages() -> dict[str, str]:
    """Returns the pages that are copies of files in the root of the repository."""
    pages = {}
    for name, file in COPIES.items():
        text = file.read_text(encoding="utf-8")
        pages[name] = relinked(text, file, GENERATED / f"{name}.md")
    return pages
