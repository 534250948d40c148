"""A dataset of your own, which is written or downloaded on first use: cards of one color each."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

COLORS = ("teal", "orange", "purple", "olive", "navy", "gold", "gray", "maroon")


def write_cards(root: Path | None, download: bool) -> None:
    """Writes images, `train.jsonl` and `test.jsonl` to `root`, once.

    `data.prepare` is called once per machine before files are opened. A dataset on the web is
    downloaded here, unless `download` is false.
    """
    assert root is not None  # `data.root`
    if (root / "test.jsonl").exists():  # written last
        return
    root.mkdir(parents=True, exist_ok=True)
    for color in COLORS:
        Image.new("RGB", (64, 64), color).save(root / f"{color}.png")
    for split, sizes in {"train": ("small", "large"), "test": ("plain",)}.items():
        lines = []
        for size in sizes:
            for color in COLORS:
                query = f"<img>{color}.png</img>Which color has this {size} card?"
                row = {"query": query, "response": color, "size": size}
                lines.append(json.dumps(row) + "\n")
        (root / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
