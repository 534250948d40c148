"""Write the embedded demo dataset: drawn images, conversations about them, and the same in COCO's and in VQA's format.

    python scripts/make_demo_data.py data/demo

A folder that holds the same data already is kept as it is.
"""

from __future__ import annotations

import argparse
import inspect
import time
from pathlib import Path

from qwenvl_lit.data.demo.dataset import write_demo
from qwenvl_lit.types import DataError

HELP = {
    "seed": "another seed draws other scenes; which scenes may be in which split does not depend on it",
    "train": "images with two questions each",
    "single": "images of one object with its caption, to begin with",
    "validation": "images, each with every question as a row of its own",
    "test": "images, the same",
    "unseen_pairs": "test images with a class where training never shows it",
    "new_classes": "images of four classes that the other files do not have; an eighth of that to test them",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to write; made if needed")
    for name, help_text in HELP.items():
        default = inspect.signature(write_demo).parameters[name].default
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=default,
            metavar="N",
            help=f"{help_text} (default: {default})",
        )
    options = vars(parser.parse_args())
    began = time.perf_counter()
    try:
        folder = write_demo(**options)
    except DataError as fault:
        parser.exit(1, f"{fault}\n")
    images = sum(1 for _ in (folder / "images").iterdir())
    rows = {file.stem: sum(1 for _ in file.open()) for file in sorted(folder.glob("*.jsonl"))}
    print(f"{folder}: {images} images, rows {rows}, in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
