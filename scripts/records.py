"""Writes the records in benchmarks/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def record_option(file: Path | None, default: str = "") -> str:
    """Returns the option that writes a record, without the folders of this machine."""
    return f"--record benchmarks/{file.name if file else default}"


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Writes a record and makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
