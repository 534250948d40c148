"""Finds all images of a run, encodes them and stores their features, for the vision cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from qwenvl_lit.data.features import IMAGES_PER_FILE, FeatureStore
from qwenvl_lit.data.loading import ignore_cluster_signals
from qwenvl_lit.data.selection import Concat, Rows, Subset, flatten
from qwenvl_lit.data.survey import DROP_ADVICE, Finding, ReportProgress, survey
from qwenvl_lit.terminal import counted
from qwenvl_lit.types import BadImage, Conversation, DataError, ImageSource, Sample, Turn

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Processor

BATCH_SIZE = 16  # images that are encoded as one batch

# `Processor.collate_vision` -> features (Q, D) of each image
Encode = Callable[[Mapping[str, Any]], Sequence[torch.Tensor]]


class Location(NamedTuple):
    """Where an image is found."""

    row: int  # index of a row that has the image
    image: int  # index of the image in this row
    tokens: int  # of the image


Locations = dict[str, Location]  # by image key


def distinct_rows(train: Sequence[Rows], validation: Rows) -> tuple[Rows, np.ndarray]:
    """Returns all distinct training and validation rows, and how often an epoch uses each."""
    sources, positions = flatten(Concat([*train, validation]))
    distinct, index = np.unique(positions, return_inverse=True)
    train_rows = sum(map(len, train))
    repeats = np.bincount(index[:train_rows], minlength=len(distinct))
    return Subset(Concat(sources), distinct), repeats


def find_images(
    rows: Rows,
    repeats: np.ndarray,
    processor: Processor,
    *,
    rank: int,
    world_size: int,
    workers: int,
    drop_bad: bool,
    progress: ReportProgress,
) -> tuple[Locations, int]:
    """Returns the distinct images of all rows, and the number of images an epoch trains on.

    The images are in the order of the rows. Each rank reads some of the rows, and all ranks return
    the same result.

    Args:
        repeats: (rows,) how often an epoch trains on each row. An image that occurs several times
            in an epoch is counted each time.
        workers: the number of processes that read rows.
        drop_bad: whether to leave out rows whose images cannot be read.

    Raises:
        DataError: an image cannot be read, and `drop_bad` is False.
    """
    rows_of_rank = range(rank, len(rows), world_size)
    locations: Locations = {}
    errors, uses = [], 0

    def report(done: int) -> None:
        progress("images looked up", done, len(rows_of_rank))

    report(0)
    look = _LookUp(processor)
    results = survey(Subset(rows, rows_of_rank), look, workers=workers, progress=report)
    for row, result in zip(rows_of_rank, results, strict=True):
        if isinstance(result, Finding):
            errors.append(result.message)
            continue
        uses += int(repeats[row]) * len(result)
        for index, (key, tokens) in enumerate(result):
            locations.setdefault(key, Location(row, index, tokens))
    return _merge(_all_gather((locations, uses, errors), world_size), drop_bad)


def example_features(encode: Encode, processor: Processor, *, padded: bool) -> torch.Tensor:
    """Returns the features (Q, D) of an image of 448 x 448 pixels."""
    vision = processor.image_vision(ImageSource(Image.new("RGB", (448, 448))))
    return encode(_BatchVision(processor, padded)([vision]))[0].cpu()


def encode_images(
    store: FeatureStore,
    encode: Encode,
    rows: Rows,
    locations: Locations,
    processor: Processor,
    *,
    padded: bool,
    num_workers: int,
    drop_bad: bool,
    progress: ReportProgress,
) -> None:
    """Encodes images and adds their features to `store`.

    If an exception is raised, the features that were computed before it are still stored.

    Args:
        locations: the images to encode.
        padded: whether the last batch is filled up with copies of its last image. The encoder is
            then compiled for one number of images only.
        drop_bad: whether to leave out images that cannot be decoded.

    Raises:
        BadImage: an image cannot be decoded, and `drop_bad` is False.
        DataError: the store cannot be written.
    """
    loader = DataLoader(
        _ImageDataset(rows, locations, processor),
        batch_size=BATCH_SIZE,
        num_workers=num_workers,
        collate_fn=_Collate(_BatchVision(processor, padded)),
        worker_init_fn=ignore_cluster_signals,
        pin_memory=torch.cuda.is_available(),
        # Otherwise the loader would draw from torch's default generator and change the random
        # numbers of the training.
        generator=torch.Generator(),
    )
    features: dict[str, torch.Tensor] = {}
    writing: Future | None = None
    done = 0
    progress("images encoded", 0, len(locations))
    with ThreadPoolExecutor(1) as writer:
        try:
            for keys, vision, errors in loader:
                if errors and not drop_bad:
                    raise BadImage(f"{errors[0]}; {DROP_ADVICE}")
                if keys:
                    encoded = encode(vision)[: len(keys)]  # without the filling of the last batch
                    for key, tensor in zip(keys, encoded, strict=True):
                        features[key] = tensor.cpu()
                if len(features) > IMAGES_PER_FILE - BATCH_SIZE:
                    # Wait for the previous file, so that only one file at a time is in memory.
                    _wait(writing)
                    writing, features = writer.submit(store.add, features), {}
                done += len(keys) + len(errors)
                progress("images encoded", done, len(locations))
        finally:
            last = writer.submit(store.add, features)
            _wait(writing)
            _wait(last)


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns a SHA-256 hash of the names, dtypes, shapes and checksums of tensors.

    The checksums of a tensor are the sum of its elements, as integers, and their sum weighted by
    position. They are computed on the device of the tensor.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    described, sums = [], []
    for name, tensor in sorted(tensors.items()):
        described.append([name, str(tensor.dtype), list(tensor.shape)])
        bits = tensor.reshape(-1).view(integers[tensor.element_size()]).long()
        positions = torch.arange(1, len(bits) + 1, device=bits.device)
        sums.append(torch.stack([bits.sum(), (bits * positions).sum()]))  # overflow is harmless
    content = json.dumps([described, torch.stack(sums).tolist()])
    return hashlib.sha256(content.encode()).hexdigest()


def _merge(
    results: Sequence[tuple[Locations, int, list[str]]], drop_bad: bool
) -> tuple[Locations, int]:
    """Merges the locations, image counts and errors of all ranks."""
    merged: Locations = {}
    errors: list[str] = []
    total_uses = 0
    for locations, uses, errors_of_rank in results:
        total_uses += uses
        errors += errors_of_rank
        for key, location in locations.items():
            merged[key] = min(location, merged.get(key, location))
    if errors and not drop_bad:
        raise DataError(
            f"{errors[0]}; the vision cache needs every image, and has none for "
            f"{counted(len(errors), 'row')}"
        )
    return dict(sorted(merged.items(), key=lambda item: item[1])), total_uses


def _all_gather(value: Any, world_size: int) -> list[Any]:
    values = [value] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


@dataclass(frozen=True, slots=True)
class _LookUp:
    """Returns the key of each image of a row, and the number of its tokens."""

    processor: Processor

    def __call__(self, conversation: Conversation) -> list[tuple[str, int]]:
        found = []
        for image in conversation.images:
            question = Conversation(id="image", turns=(Turn(role="user", parts=(image,)),))
            tokens = self.processor.length(question, prompt=True).image_tokens
            found.append((image.key, tokens))
        return found


def _wait(writing: Future | None) -> None:
    """Waits until a file is written, and raises the exception of the writer, if any."""
    if writing is not None:
        writing.result()


class _ImageDataset(Dataset):
    """Image keys with `Processor.image_vision`, or with the reason why it cannot be decoded."""

    def __init__(self, rows: Rows, locations: Locations, processor: Processor):
        self.rows = rows
        self.locations = list(locations.items())
        self.processor = processor

    def __len__(self) -> int:
        return len(self.locations)

    def __getitem__(self, index: int) -> tuple[str, dict[str, torch.Tensor] | str]:
        key, location = self.locations[index]
        conversation = self.rows[location.row]
        try:
            return key, self.processor.image_vision(conversation.images[location.image])
        except BadImage as error:
            return key, str(conversation.located(error))


@dataclass(frozen=True, slots=True)
class _BatchVision:
    """Returns `Processor.collate_vision` of images, or {} without images; see `encode_images`."""

    processor: Processor
    padded: bool

    def __call__(self, images: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        if not images:
            return {}
        nothing = torch.empty(0, dtype=torch.int64)
        tensors = {"input_ids": nothing, "labels": nothing, "vision_positions": nothing}
        question = Conversation(id="image", turns=())
        samples = [Sample(conversation=question, **tensors, vision=image) for image in images]
        if self.padded:
            samples += samples[-1:] * (BATCH_SIZE - len(samples))
        return self.processor.collate_vision(samples)


@dataclass(frozen=True, slots=True)
class _Collate:
    """Returns keys and vision tensors of the images that were decoded, and the other messages."""

    batch_vision: _BatchVision

    def __call__(
        self, items: Sequence[tuple[str, dict[str, torch.Tensor] | str]]
    ) -> tuple[list[str], dict[str, Any], list[str]]:
        keys, images, errors = [], [], []
        for key, content in items:
            if isinstance(content, str):
                errors.append(content)
            else:
                keys.append(key)
                images.append(content)
        return keys, self.batch_vision(images), errors
