"""Ways to damage a file."""

from __future__ import annotations

import pickle
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

LFS_POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def cut_the_end(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip_a_bit(file: Path) -> None:
    """Flips a bit in the middle: in weights, one of a number."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def make_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def make_a_pointer(file: Path) -> None:
    file.write_bytes(LFS_POINTER)


def make_noise(file: Path) -> None:
    file.write_bytes(random.Random(0).randbytes(5000))


def make_a_list(file: Path) -> None:
    file.write_text("[1, 2]")


def make_a_number(file: Path) -> None:
    file.write_text("3")


def replace_values(file: Path) -> None:
    """Gives every number of a JSON or YAML file the type of a text."""
    text = file.read_text(encoding="utf-8", errors="replace")
    file.write_text(re.sub(r"\b\d+(\.\d+)?\b", '"x"', text))


def nest_deeply(file: Path) -> None:
    file.write_text("[" * 100_000)


BINARY: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "end cut off": cut_the_end,
    "a flipped bit": flip_a_bit,
    "empty": empty,
    "a folder": make_a_folder,
    "a git-lfs pointer": make_a_pointer,
    "noise": make_noise,
}
TEXT = {
    **BINARY,
    "a list": make_a_list,
    "a number": make_a_number,
    "wrong types": replace_values,
    "nested deeply": nest_deeply,
}
REFUSED = ("truncated", "empty", "a folder", "a git-lfs pointer", "noise")  # never read by chance


class Executes:
    """An object whose pickle creates a folder when it is read."""

    def __init__(self, evidence: Path):
        self.evidence = evidence

    def __reduce__(self):
        return (__import__("os").mkdir, (str(self.evidence),))


def write_pickle(file: Path, evidence: Path, *, zipped: bool) -> None:
    """Writes a pickle that executes, as torch writes its files since 1.6 or as before."""
    remove(file)
    content = pickle.dumps({"state_dict": Executes(evidence), "config": Executes(evidence)})
    if not zipped:
        file.write_bytes(content)
        return
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
