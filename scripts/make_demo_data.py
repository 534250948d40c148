"""Write the demo dataset: drawn images with conversations, also in the formats of COCO and VQA.

    python scripts/make_demo_data.py data/demo

A folder that holds the same dataset is kept.
"""

from __future__ import annotations

import argparse
import inspect
import time
from pathlib import Path

from qwenvl_lit.data.demo.dataset import write_demo
from qwenvl_lit.types import DataError

HELP = {
    "seed": "draws other scenes; the split of a scene does not depend on it",
    "train": "images with two questions each",
    "single": "images of one object with its caption, a curriculum to start with",
    "validation": "images, with a row for every question about each",
    "test": "images to test on, in the same form",
    "unseen_pairs": "test images with a class at a position where training never shows it",
    "new_classes": "images of four classes that no other file has; an eighth of that to test them",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="output folder, created if needed")
    parameters = inspect.signature(write_demo).parameters
    for name, help_text in HELP.items():
        default = parameters[name].default
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=default,
            metavar="N",
            help=f"{help_text} (default: {default})",
        )
    options = vars(parser.parse_args())
    start = time.perf_counter()
    try:
        folder = write_demo(**options)
    except DataError as error:
        parser.exit(1, f"{error}\n")
    seconds = time.perf_counter() - start
    images = len(list((folder / "images").iterdir()))
    rows = {}
    for file in sorted(folder.glob("*.jsonl")):
        rows[file.stem] = len(file.read_text().splitlines())
    print(f"{folder}: {images} images, rows {rows}, in {seconds:.1f} s")


if __name__ == "__main__":
    main()
