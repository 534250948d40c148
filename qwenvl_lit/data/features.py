"""Stores image features of a frozen vision tower on disk, and reads them memory-mapped."""

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

IMAGES_PER_FILE = 512  # maximum. 512 images take 1 GB with Qwen-VL.
SETTINGS = "settings.json"
# Writing a file takes seconds. An unfinished file of this age belongs to a process that was killed.
ABANDONED_S = 3600

# Q tokens of an image, D width of its features


class FeatureStore:
    """A folder with image features (Q, D), which are identified by `ImageSource.key`.

    Images may have different Q. Features are stored in files of up to `IMAGES_PER_FILE` images.
    Each combination of settings, shape and dtype has its own subfolder of `folder`.

    Each file is written under a temporary name and renamed when it is complete, and no two
    processes use the same name. Several processes may add images at the same time. If a process is
    killed, the files that it finished remain. `refresh` finds the images that other processes
    added. A copy of the store in a data worker opens the files itself.

    Args:
        settings: plain data that determines the features, such as a fingerprint of the weights.
        shape, dtype: the shape and dtype of the features of one image, with None for Q if images
            have different Q.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        settings: Mapping[str, Any],
        shape: tuple[int | None, int],
        dtype: torch.dtype,
    ):
        self.shape = shape
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
    def token_bytes(self) -> int:
        """The size of the features of one token on disk."""
        return self.shape[1] * self.dtype.itemsize

    def refresh(self) -> None:
        """Updates the list of stored images from the files in the folder.

        Raises:
            DataError: a file cannot be read.
        """
        files: dict[str, str] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            files |= dict.fromkeys(self._open(file.name).keys(), file.name)
        self._files = files

    def missing_keys(self, keys: Iterable[str]) -> list[str]:
        """Returns the keys of images that are not stored, each once, in the order of `keys`."""
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
            tokens = self.shape[0] or len(tensor)
            expected = ((tokens, self.shape[1]), self.dtype)
            assert (tensor.shape, tensor.dtype) == expected, key
            tensors[key] = tensor.contiguous()
        file = self.folder / f"{uuid.uuid4().hex}.safetensors"
        with disk_errors(file, "free disk space, or train with speed.vision_cache=false"):
            self._remove_abandoned_files()
            with atomic_file(file, durable=True) as unfinished:
                try:
                    save_file(tensors, unfinished)
                except SafetensorError as error:
                    raise OSError(str(error)) from error
                # safetensors creates files that only their owner can read.
                unfinished.chmod((self.folder / SETTINGS).stat().st_mode)
        self._files |= dict.fromkeys(features, file.name)

    def read(self, images: Sequence[ImageSource]) -> list[torch.Tensor]:
        """Returns the features (Q, D) of each image, which are memory-mapped.

        Raises:
            BadImage: an image is not stored and cannot be opened.
            DataError: an image is not stored although it can be opened.
        """
        return [self._read_image(image) for image in images]

    def _read_image(self, image: ImageSource) -> torch.Tensor:
        key = image.key
        if key not in self._files:
            image.open()
            raise DataError(
                f"image {image.name} is not in the vision cache {self.folder}; "
                "if the image was changed after the run began, start the run again"
            )
        return self._open(self._files[key]).get_tensor(key)

    def _open(self, name: str) -> safe_open:
        if name not in self._opened:
            path = self.folder / name
            try:
                self._opened[name] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise DataError(
                    f"{path} cannot be read: {error}; delete it to encode its images again"
                ) from error
        return self._opened[name]

    def _remove_abandoned_files(self) -> None:
        for unfinished in self.folder.glob("*.part"):
            with suppress(FileNotFoundError):  # another process has just renamed this file
                if time.time() - unfinished.stat().st_mtime > ABANDONED_S:
                    unfinished.unlink()


class CachedFeatures:
    """The `FeatureSource` that a processor and the callback `VisionCache` share.

    The source is closed at first, and the processor decodes images. As soon as a store has the
    features of all images of a run, the callback opens the source with this store. The processor
    then uses the stored features until the source is closed.
    """

    def __init__(self) -> None:
        self._store: FeatureStore | None = None

    def __call__(self, images: Sequence[ImageSource]) -> list[torch.Tensor] | None:
        """Returns the features (Q, D) of each image, or None while the source is closed.

        Raises:
            BadImage, DataError: see `FeatureStore.read`.
        """
        return None if self._store is None else self._store.read(images)

    @property
    def is_open(self) -> bool:
        return self._store is not None

    def open(self, store: FeatureStore) -> None:
        self._store = store

    def close(self) -> None:
        self._store = None
