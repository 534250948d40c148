"""What images became in a frozen tower, kept on disk: computed once, and mapped into memory from then on."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qwenvl_lit.types import DataError, ImageSource

SHARD = 512  # images of a file, at most: 1 GB of Qwen-VL's
SETTINGS = "settings.json"

# N images, Q tokens of an image, D width


class FeatureStore:
    """Features (Q, D) of images by `ImageSource.key`, in files of up to `SHARD` images below `folder`; other settings are another store.

    A file appears whole or not at all, under a name that no other process takes: several may add at a time, and what a process that was
    stopped has added stays. Images that another process has added are known after `refresh`. A copy in a data worker opens its files
    itself.

    Args:
        settings: what the features depend on, as plain data.
        shape, dtype: of the features of one image.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        settings: Mapping[str, Any],
        shape: Sequence[int],
        dtype: torch.dtype,
    ):
        self.shape = tuple(shape)
        self.dtype = dtype
        content = json.dumps(
            {**settings, "shape": self.shape, "dtype": str(dtype)}, sort_keys=True, indent=2
        )
        self.folder = Path(folder, hashlib.sha256(content.encode()).hexdigest()[:16])
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / SETTINGS).exists():
            _write(self.folder / SETTINGS, lambda file: file.write_text(content + "\n"))
        self._files: dict[str, str] = {}  # by key, the name of the file that has it
        self._opened: dict[str, safe_open] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def __len__(self) -> int:
        return len(self._files)

    @property
    def image_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def refresh(self) -> None:
        """Look again which images there are.

        Raises:
            DataError: a file cannot be read.
        """
        names = [file.name for file in sorted(self.folder.glob("*.safetensors"))]
        self._files = {key: name for name in names for key in self._open(name).keys()}  # noqa: SIM118 - not a dict

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are not there, each once, in their order."""
        return [key for key in dict.fromkeys(keys) if key not in self._files]

    def add(self, features: Mapping[str, torch.Tensor]) -> None:
        """Write images, in one file.

        Raises:
            DataError: it cannot be written; the disk may be full.
        """
        if not features:
            return
        for key, tensor in features.items():
            assert (tensor.shape, tensor.dtype) == (self.shape, self.dtype), key
        file = self.folder / f"{uuid.uuid4().hex}.safetensors"

        def save(unfinished: Path) -> None:
            save_file({key: tensor.contiguous() for key, tensor in features.items()}, unfinished)
            unfinished.chmod(
                (self.folder / SETTINGS).stat().st_mode
            )  # others may read it where they may read that

        try:
            for left in self.folder.glob("*.unfinished"):
                if (
                    time.time() - left.stat().st_mtime > 3600
                ):  # by a process that was killed: writing takes seconds
                    left.unlink(missing_ok=True)
            _write(file, save)
        except (OSError, SafetensorError) as fault:
            raise DataError(
                f"{file} cannot be written: {fault}; make room, or train with speed.vision_cache=false"
            ) from fault
        self._files |= dict.fromkeys(features, file.name)

    def of(self, images: Sequence[ImageSource]) -> torch.Tensor:
        """Features (N, Q, D) of images.

        Raises:
            BadImage: an image cannot be opened, and hence is not there.
            DataError: one is not there, though it can be opened.
        """
        found = [self._read(image) for image in images]
        return torch.stack(found) if found else torch.empty(0, *self.shape, dtype=self.dtype)

    def _read(self, image: ImageSource) -> torch.Tensor:
        key = image.key
        if key not in self._files:
            image.open()
            raise DataError(
                f"image {image.name} is not in the vision cache {self.folder}; did it change after the run began? start the run again"
            )
        return self._open(self._files[key]).get_tensor(
            key
        )  # mapped: read from the disk when it is looked at

    def _open(self, name: str) -> safe_open:
        if name not in self._opened:
            try:
                self._opened[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as fault:
                raise DataError(
                    f"{self.folder / name} cannot be read: {fault}; delete it, and its images are encoded again"
                ) from fault
        return self._opened[name]


def _write(file: Path, write: Callable[[Path], object]) -> None:
    """`write(path)`, under another name until all of it is on the disk."""
    unfinished = file.with_name(f"{uuid.uuid4().hex}.unfinished")
    try:
        write(unfinished)
        with unfinished.open("rb+") as stream:
            os.fsync(stream.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
