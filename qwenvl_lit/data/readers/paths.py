"""Image paths that were written on another machine, which may be a Windows one."""

from __future__ import annotations

import re
from collections.abc import Mapping


def mapped(address: str, path_map: Mapping[str, str]) -> str:
    """Replaces the longest prefix of `address` in `path_map`, counting whole path components."""
    for prefix in sorted(path_map, key=len, reverse=True):
        stem = prefix.rstrip("/\\")
        rest = address[len(stem) :]
        if not address.startswith(stem) or (rest and rest[0] not in "/\\"):
            continue
        if "\\" in prefix:
            rest = rest.replace("\\", "/")
        if not path_map[prefix]:
            return rest.lstrip("/")
        return path_map[prefix].rstrip("/") + rest
    return address


def windows_hint(address: str) -> str:
    """Returns how to replace the folder of a Windows path; empty for other paths."""
    folder, separator, _ = address[:1000].rpartition("\\")
    has_drive = re.match(r"[A-Za-z]:[\\/]", address) is not None
    if not separator and not has_drive:
        return ""
    if not separator:
        folder = address[:1000].rpartition("/")[0]
    if separator and not has_drive and not folder.startswith("\\"):
        here = folder.replace("\\", "/") or "."
        return f". It is a Windows path: 'data.path_map={{{folder}\\: {here}}}' replaces its folder"
    return f". It is a Windows path: 'data.path_map={{{folder}: FOLDER}}' replaces its folder"
