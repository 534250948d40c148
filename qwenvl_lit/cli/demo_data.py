"""Files of a user beside the demo's settings: `data=jsonl` was forgotten."""

from __future__ import annotations

import os
from collections.abc import Sequence

from qwenvl_lit.cli.alternatives import alternatives_of
from qwenvl_lit.cli.overrides import has_any, paths_of
from qwenvl_lit.types import DataError

COMMANDS = ("train", "check")  # their data is the demo's unless the command line chooses another
FILES = (
    "train_single.jsonl",
    "train.jsonl",
    "validation.jsonl",
    "test.jsonl",
    "unseen_pairs.jsonl",
    "new_classes_train.jsonl",
    "new_classes_test.jsonl",
    "vqa_train.jsonl",
    "vqa_test.jsonl",
)


def refuse_own_files(command: str, arguments: Sequence[str]) -> None:
    """Refuses files that are not the demo's if no argument chooses the data.

    The other rows, the folder of the images and the metrics would be those of the demo.

    Raises:
        DataError: names the key, the file, and what to write.
    """
    if command not in COMMANDS or has_any(arguments, "data=", "experiment=", "resume="):
        return
    for key in ("data.train", "data.validation", "data.test"):
        for argument in alternatives_of(arguments, key):
            for file in filter(_is_own, paths_of([argument], key)):
                raise DataError(
                    f"{key}: {file} is not a file of the demo, which is the data without data=; "
                    f"for your own files: data=jsonl {key}={file}"
                )


def _is_own(file: str) -> bool:
    """Whether a file is not the demo's. A file that is seen from here is meant, too."""
    name = file.partition("#")[0]
    return name not in FILES or os.path.exists(name)
