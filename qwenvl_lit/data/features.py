"""Image features of a frozen vision tower, stored on disk and read memory-mapped."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qwenvl_lit.atomic import atomic_file, disk_errors, write_text
from qwenvl_lit.types import DataError, ImageSource

IMAGES_PER_FILE = 512  # at most; 1 GB of Qwen-VL's features
SETTINGS = "settings.json"
ABANDONED_S = 3600  # age of an unfinished file whose process was killed; writing takes seconds

# N images, Q tokens of an image, D model width


class FeatureStore:
    """A folder of image features (Q, D), found by `ImageSource.key`.

    Features are in files of up to `IMAGES_PER_FILE` images. Each combination of settings, shape and
    dtype has a subfolder of its own below `folder`.

    A file appears complete and under a name that no other process uses. Several processes may add
    images at once, and a killed process leaves the files that it has finished. `refresh` finds the
    images that other processes have added. A copy in a data worker opens its own files.

    Args:
        settings: plain data that determines the features, such as a fingerprint of the weights.
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
        described = {**settings, "shape": self.shape, "dtype": str(dtype)}
        content = json.dumps(described, sort_keys=True, indent=2)
        self.folder = Path(folder, hashlib.sha256(content.encode()).hexdigest()[:16])
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / SETTINGS).exists():
            write_text(self.folder / SETTINGS, content + "\n", concurrent=True)
        self._files: dict[str, str] = {}  # image key -> name of the file that holds its features
        self._opened: dict[str, safe_open] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def __len__(self) -> int:
        return len(self._files)

    @property
    def image_bytes(self) -> int:
        """Bytes that the features of one image take on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def refresh(self) -> None:
        """Reads again which images the folder has.

        Raises:
            DataError: a file cannot be read.
        """
        files: dict[str, str] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            files |= dict.fromkeys(self._open(file.name).keys(), file.name)
        self._files = files

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Returns the keys that are not stored, each once, in their order."""
        return [key for key in dict.fromkeys(keys) if key not in self._files]

    def add(self, features: Mapping[str, torch.Tensor]) -> None:
        """Writes the features of images to a new file.

        Raises:
            DataError: the file cannot be written, for example because the disk is full.
        """
        if not features:
            return
        tensors = {}
        for key, tensor in features.items():
            assert (tensor.shape, tensor.dtype) == (self.shape, self.dtype), key
            tensors[key] = tensor.contiguous()
        file = self.folder / f"{uuid.uuid4().hex}.safetensors"
        with disk_errors(file, "make room, or train with speed.vision_cache=false"):
            self._remove_abandoned_files()
            with atomic_file(file, durable=True) as unfinished:
                try:
                    save_file(tensors, unfinished)
                except SafetensorError as error:
                    raise OSError(str(error)) from error
                # safetensors lets the owner alone read its files; give them the usual permissions
                unfinished.chmod((self.folder / SETTINGS).stat().st_mode)
        self._files |= dict.fromkeys(features, file.name)

    def of(self, images: Sequence[ImageSource]) -> torch.Tensor:
        """Returns the features (N, Q, D) of images.

        Raises:
            BadImage: an image is not stored because it cannot be opened.
            DataError: an image can be opened, but is not stored.
        """
        if not images:
            return torch.empty(0, *self.shape, dtype=self.dtype)
        return torch.stack([self._read(image) for image in images])

    def _read(self, image: ImageSource) -> torch.Tensor:
        """The features (Q, D) of an image, mapped: they are read from the disk at first use."""
        key = image.key
        if key not in self._files:
            image.open()
            raise DataError(
                f"image {image.name} is not in the vision cache {self.folder}; "
                "did it change after the run began? start the run again"
            )
        return self._open(self._files[key]).get_tensor(key)

    def _open(self, name: str) -> safe_open:
        if name not in self._opened:
            path = self.folder / name
            try:
                self._opened[name] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise DataError(
                    f"{path} cannot be read: {error}; delete it, and its images are encoded again"
                ) from error
        return self._opened[name]

    def _remove_abandoned_files(self) -> None:
        for unfinished in self.folder.glob("*.part"):
            with suppress(FileNotFoundError):  # another process has just finished this file
                if time.time() - unfinished.stat().st_mtime > ABANDONED_S:
                    unfinished.unlink()


class CachedFeatures:
    """The feature source that a processor and the vision cache share.

    It is closed at first, and the processor decodes images. Once the store has every image of a run
    the vision cache opens it, and the processor takes the features from there until it is closed.
    """

    def __init__(self) -> None:
        self._store: FeatureStore | None = None

    def __call__(self, images: Sequence[ImageSource]) -> torch.Tensor | None:
        """Returns the features (N, Q, D) of images, or None while the source is closed.

        Raises:
            BadImage, DataError: see `FeatureStore.of`.
        """
        return None if self._store is None else self._store.of(images)

    @property
    def is_open(self) -> bool:
        return self._store is not None

    def open(self, store: FeatureStore) -> None:
        self._store = store

    def close(self) -> None:
        self._store = None
