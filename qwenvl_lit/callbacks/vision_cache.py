"""Images go through a frozen tower once, before the first step; training and validation then read what came out."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from qwenvl_lit.data.download.files import in_bytes
from qwenvl_lit.data.features import SHARD, FeatureStore
from qwenvl_lit.data.inspection import workers_here
from qwenvl_lit.data.split import Concat, Rows, Subset, places
from qwenvl_lit.data.survey import Finding, survey
from qwenvl_lit.models.components import component_of_tensor
from qwenvl_lit.types import BadImage, Conversation, DataError, ImageSource

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Family, Processor

FORMAT = 1  # of what is stored: one more when images are read or encoded in another way
FROZEN = ("vision", "resampler")  # parts of a family that make features
TOGETHER = 16  # images that go through the tower at a time

Places = dict[
    str, tuple[int, int]
]  # by an image's key, a row that has it and which of the row's images it is
log = logging.getLogger(__name__)


class VisionCache(lightning.Callback):
    """Encodes the images of training and validation rows before the first step, those that no earlier run has encoded with the same
    tower, and lets the data module's processor give their features in place of pixels. Losses are those of a run without.

    Ranks of a node share the work and `folder`. A pass that was interrupted goes on where it stopped.

    Args:
        folder: where features are kept, see `FeatureStore`; they stay after the run.
        limit_gb: more than this for the images of one run is an error.
    """

    def __init__(self, folder: str | Path, limit_gb: float = 100.0):
        if not isinstance(limit_gb, int | float) or limit_gb <= 0:
            raise ValueError(f"speed.vision_cache_gb is a number above 0, got {limit_gb!r}")
        self.folder = Path(folder).expanduser()
        self.limit_gb = limit_gb
        self._processor: Processor | None = None  # while it gives features

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """
        Raises:
            DataError: the tower or the resampler trains, the features are too many, or an image cannot be opened.
            SystemExit: Ctrl-C while images are encoded; status 130.
        """
        family, data = pl_module.family, trainer.datamodule
        refuse_trained(pl_module.model.named_parameters(), family.components)
        rows, times = _rows(data.train, data.validation)
        wanted, uses = _wanted(trainer, rows, times)
        if not wanted:
            return
        tensors = tensors_of(pl_module.model, family.components)
        model = _whole(pl_module.model, family, tensors)

        @torch.no_grad()
        def encode(pixels: torch.Tensor) -> torch.Tensor:
            full = torch.cat(
                [pixels, pixels[-1:].expand(TOGETHER - len(pixels), *pixels.shape[1:])]
            )  # to be compiled for once, if at all
            return family.image_features(model, full.to(trainer.strategy.root_device))[
                : len(pixels)
            ].cpu()

        one = encode(data.processor.pixels(ImageSource(Image.new("RGB", (8, 8))))[None])[0]
        settings = {
            "format": FORMAT,
            "weights": fingerprint(tensors),
            **data.processor.image_settings,
        }
        store = FeatureStore(self.folder, settings=settings, shape=one.shape, dtype=one.dtype)
        missing = store.missing(wanted)
        self._check(store, len(wanted), len(missing))
        seen = uses * data.epochs_of_run()
        if trainer.is_global_zero:
            whole = in_bytes(len(wanted) * store.image_bytes)
            print(
                f"Vision cache: {len(wanted):,} images, {whole}, in {store.folder}; {len(missing):,} of them are to be encoded"
            )
            if seen < 1.5 * len(missing):
                log.warning(
                    "the vision cache is pointless for this run alone: %d images are encoded before the first step, and training looks "
                    "at images %d times. It pays from the second epoch, and for later runs; speed.vision_cache=false does without",
                    len(missing),
                    seen,
                )
        trainer.strategy.barrier("images are counted")  # none writes before all have looked
        try:
            _fill(
                trainer,
                store,
                encode,
                rows,
                {key: wanted[key] for key in missing[trainer.local_rank :: trainer.num_devices]},
            )
        except KeyboardInterrupt:
            if trainer.is_global_zero:
                print(
                    "\nStopped; the images encoded so far are kept: the next run with them goes on from there.",
                    flush=True,
                )
            raise SystemExit(
                128 + signal.SIGINT if trainer.is_global_zero else 0
            ) from None  # Lightning kills rank 0 after another's error
        trainer.strategy.barrier("images are encoded")
        store.refresh()
        self._processor = data.processor
        self._processor.features = store.of

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        if self._processor is not None:
            self._processor.features = None  # other rows may have other images
            self._processor = None

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        self.teardown(trainer, pl_module, "fit")

    def _check(self, store: FeatureStore, wanted: int, missing: int) -> None:
        images = f"{wanted:,} images of {in_bytes(store.image_bytes)}"
        need, free = missing * store.image_bytes, shutil.disk_usage(store.folder).free
        if wanted * store.image_bytes > self.limit_gb * 1e9:
            raise DataError(
                f"the vision cache needs {in_bytes(wanted * store.image_bytes)} for {images}, more than "
                f"speed.vision_cache_gb={self.limit_gb:g} allows: raise it, or train with speed.vision_cache=false"
            )
        if need > free:
            raise DataError(
                f"the vision cache needs {in_bytes(need)} more for {images}, and the disk of {store.folder} has {in_bytes(free)} left: "
                f"make room, choose another disk with paths.cache=FOLDER, or train with speed.vision_cache=false"
            )


def refuse_trained(
    parameters: Iterable[tuple[str, torch.Tensor]], components: Mapping[str, str]
) -> None:
    """Raises a DataError if a tensor of the tower or the resampler is trained."""
    trained = [
        name
        for name, tensor in parameters
        if tensor.requires_grad and component_of_tensor(name, components) in FROZEN
    ]
    if trained:
        raise DataError(
            f"the vision cache holds what images became before training, and {len(trained)} tensors that encode them train "
            f"({trained[0]}, ...): choose an adapter that leaves the vision tower and the resampler as they are, as adapter=lora, "
            f"or train with speed.vision_cache=false"
        )


def tensors_of(model: nn.Module, components: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """All that the tower and the resampler compute with, whole where ranks share it, by its names in the family's network."""
    found = {}
    for name, tensor in {
        **dict(model.named_buffers()),
        **model.state_dict(),
    }.items():  # buffers need not be in the state
        if (part := component_of_tensor(name, components)) in FROZEN and isinstance(
            tensor, torch.Tensor
        ):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found[name[name.index(components[part]) :]] = whole.detach()
    return found


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types and two checksums of the bits of each tensor, which are computed where the tensor is."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    names, sums = [], []
    for name, tensor in sorted(tensors.items()):
        bits = tensor.reshape(-1).view(integers[tensor.element_size()]).long()
        names.append([name, str(tensor.dtype), list(tensor.shape)])
        sums.append(
            torch.stack(
                [bits.sum(), (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum()]
            )
        )  # may wrap around
    return hashlib.sha256(json.dumps([names, torch.stack(sums).tolist()]).encode()).hexdigest()


def _whole(model: nn.Module, family: Family, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """`model`; where its weights are divided among ranks, a network that has those of the tower and the resampler, and no others."""
    if not any(isinstance(tensor, DTensor) for tensor in model.parameters()):
        return model
    outline = family.meta_model().requires_grad_(False)
    unexpected = outline.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    assert not unexpected, unexpected
    return outline


def _rows(train: Sequence[Rows], validation: Rows) -> tuple[Rows, np.ndarray]:
    """Each row of training and validation once, and how often an epoch trains on it."""
    bottoms, place = places(Concat([*train, validation]))
    distinct, which = np.unique(place, return_inverse=True)
    return Subset(Concat(bottoms), distinct), np.bincount(
        which[: sum(map(len, train))], minlength=len(distinct)
    )


def _wanted(trainer: lightning.Trainer, rows: Rows, times: np.ndarray) -> tuple[Places, int]:
    """The distinct images of all rows, in their order, and how often an epoch looks at an image. Ranks share the reading.

    Raises:
        DataError: an image cannot be read, and rows with such images are not dropped.
    """
    own = range(trainer.global_rank, len(rows), trainer.world_size)
    found: Places = {}
    faults, uses = [], 0
    workers = max(1, workers_here() // trainer.num_devices)
    with _progress("images looked up", len(own), show=trainer.is_global_zero) as tell:
        for row, keys in zip(
            own, survey(Subset(rows, own), _keys, workers=workers, progress=tell), strict=True
        ):
            if isinstance(keys, Finding):
                faults.append(keys.message)
                continue
            uses += int(times[row]) * len(keys)
            for place, key in enumerate(keys):
                found.setdefault(key, (row, place))
    shares = _gathered((found, uses, faults), trainer.world_size)
    faults = [fault for _, _, some in shares for fault in some]
    if faults and trainer.datamodule.on_bad_image != "drop":
        raise DataError(
            f"{faults[0]}; {len(faults)} rows like it are in the way of the vision cache"
        )
    merged: Places = {}
    for places_of_rank, _, _ in shares:
        for key, place in places_of_rank.items():
            merged[key] = min(place, merged.get(key, place))
    return dict(sorted(merged.items(), key=lambda item: item[1])), sum(
        uses for _, uses, _ in shares
    )


def _keys(conversation: Conversation) -> tuple[str, ...]:
    try:
        return tuple(image.key for image in conversation.images)
    except BadImage as fault:
        raise _named(conversation, fault) from fault


def _named(conversation: Conversation, fault: BadImage) -> BadImage:
    return BadImage(f"{conversation.where}: sample {conversation.id!r}: {fault}".removeprefix(": "))


def _gathered(value: Any, world_size: int) -> list[Any]:
    if world_size == 1:
        return [value]
    values = [None] * world_size
    torch.distributed.all_gather_object(values, value)
    return values


def _fill(
    trainer: lightning.Trainer,
    store: FeatureStore,
    encode: Callable[[torch.Tensor], torch.Tensor],
    rows: Rows,
    wanted: Places,
) -> None:
    """Encode images and add them; what is done stays, whatever ends it.

    Raises:
        BadImage: an image cannot be decoded, and rows with such images are not dropped.
    """
    data = trainer.datamodule
    loader = DataLoader(
        _ImageRows(rows, wanted, data.processor),
        batch_size=TOGETHER,
        num_workers=data.num_workers,
        collate_fn=_together,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # torch's own would go on, and training would draw other numbers than without the cache
    )
    fresh: dict[str, torch.Tensor] = {}
    done = 0
    with (
        ThreadPoolExecutor(1) as writer,
        _progress("images encoded", len(wanted), show=trainer.is_global_zero) as tell,
    ):
        writing: list[Future] = []
        try:
            for keys, pixels, faults in loader:
                if faults and data.on_bad_image != "drop":
                    raise BadImage(faults[0])
                if keys:
                    fresh |= zip(keys, encode(pixels), strict=True)
                if len(fresh) > SHARD - TOGETHER:
                    _end(writing)  # two files at a time would take twice the memory
                    writing, fresh = [writer.submit(store.add, fresh)], {}
                done += len(keys) + len(faults)
                tell(done)
        finally:
            _end([*writing, writer.submit(store.add, fresh)])


def _end(writing: Iterable[Future]) -> None:
    for one in writing:
        one.result()


class _ImageRows(Dataset):
    """Images as pixels, or why one cannot be decoded."""

    def __init__(self, rows: Rows, wanted: Places, processor: Processor):
        self.rows = rows
        self.wanted = list(wanted.items())
        self.processor = processor

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, place: int) -> tuple[str, torch.Tensor | str]:
        key, (row, image) = self.wanted[place]
        conversation = self.rows[row]
        try:
            return key, self.processor.pixels(conversation.images[image])
        except BadImage as fault:
            return key, str(_named(conversation, fault))


def _together(
    items: Sequence[tuple[str, torch.Tensor | str]],
) -> tuple[list[str], torch.Tensor, list[str]]:
    pixels = {key: value for key, value in items if isinstance(value, torch.Tensor)}
    return (
        list(pixels),
        torch.stack([*pixels.values()]) if pixels else torch.empty(0),
        [v for _, v in items if isinstance(v, str)],
    )


@contextmanager
def _progress(what: str, total: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else a line a minute."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    terminal, said = sys.stdout.isatty(), time.monotonic()
    with Progress(*columns, transient=True, disable=not (show and terminal)) as bars:
        bar = bars.add_task(what, total=total)

        def tell(done: int) -> None:
            nonlocal said
            bars.update(bar, completed=done)
            if show and not terminal and time.monotonic() - said > 60:
                said = time.monotonic()
                print(f"{what}: {done:,} of {total:,}", flush=True)

        yield tell
