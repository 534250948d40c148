"""Encodes the images of a run once, before the first step, with a frozen vision tower."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torch.distributed.tensor import DTensor

from qwenvl_lit.cores import available_cores
from qwenvl_lit.data.download.files import format_bytes
from qwenvl_lit.data.feature_pass import (
    Locations,
    distinct_rows,
    encode_images,
    example_features,
    find_images,
    fingerprint,
)
from qwenvl_lit.data.features import CachedFeatures, FeatureStore
from qwenvl_lit.data.survey import ReportProgress
from qwenvl_lit.models.components import component_of_tensor
from qwenvl_lit.rendering.progress import progress_bars
from qwenvl_lit.stopping import INTERRUPTED, NOTHING_KEPT, signals
from qwenvl_lit.terminal import counted
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Family, Processor

FORMAT = 1  # of the stored features; raise it when images are read or encoded in another way
ENCODER = ("vision", "resampler")  # the components of a family that compute image features
RESUMES = "The images encoded so far are stored; the next run encodes the remaining ones."
WORTHWHILE_USES = 1.5  # how often training must use an image for the cache to save time

log = logging.getLogger(__name__)


class VisionCache(lightning.Callback):
    """Lets training and validation read image features from disk instead of computing them.

    Before the first step it encodes the images of all rows that no earlier run has encoded with the
    same weights. Then it opens `features`, and the processor takes features from there in place of
    pixels. Losses are the same as without the cache.

    The ranks of a node share the work and `folder`. An interrupted pass continues in the next run.

    Args:
        features: the feature source of the data module's processor.
        folder: where the features are stored, see `FeatureStore`; they are kept after the run.
        limit_gb: the most that the features of one run may take on disk.
    """

    def __init__(self, features: CachedFeatures, folder: str | Path, limit_gb: float = 100.0):
        if not isinstance(limit_gb, int | float) or limit_gb <= 0:
            raise ValueError(f"speed.vision_cache_gb is a number above 0, got {limit_gb!r}")
        self.features = features
        self.folder = Path(folder).expanduser()
        self.limit_gb = limit_gb

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Refuses families without a vision cache, before weights are loaded."""
        family = pl_module.family
        if not family.supports_vision_cache:
            name = type(family).__name__.removesuffix("Family")
            what = "stored image features" if "vision" in family.components else "images"
            raise DataError(
                f"speed.vision_cache=true: models of the family {name} cannot read {what}; "
                "train with speed.vision_cache=false"
            )

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Encodes the images that are not stored yet, and opens the feature source.

        Raises:
            DataError: the tower or the resampler is trained, the features are larger than
                `limit_gb` or the free disk space, or an image cannot be opened.
            SystemExit: KeyboardInterrupt while images are encoded; status 130.
        """
        family, data = pl_module.family, trainer.datamodule
        drop_bad = data.on_bad_image == "drop"
        refuse_trained_encoder(pl_module.model.named_parameters(), family.components)
        rows, repeats = distinct_rows(data.train, data.validation)
        with _progress(trainer) as report:
            locations, uses = find_images(
                rows,
                repeats,
                data.processor,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                workers=max(1, available_cores() // trainer.num_devices),
                drop_bad=drop_bad,
                progress=report,
            )
        if not locations:
            return
        tensors = encoder_tensors(pl_module.model, family.components)
        model = _unsharded(pl_module.model, family, tensors)

        @torch.no_grad()
        def encode(vision: Mapping[str, Any]) -> list[torch.Tensor]:
            device = trainer.strategy.root_device
            return family.image_features(model, move_data_to_device(vision, device))

        padded = family.fixed_image_size
        example = example_features(encode, data.processor, padded=padded)
        store = self._open_store(data.processor, example, padded, fingerprint(tensors))
        missing = {key: locations[key] for key in store.missing_keys(locations)}
        self._check_size(store, locations, missing)
        if trainer.is_global_zero:
            _announce(store, locations, missing, uses * data.epochs_of_run())
        # No rank may write before all have looked up what is missing.
        trainer.strategy.barrier("images are counted")
        share = list(missing.items())[trainer.local_rank :: trainer.num_devices]
        signals.kept = RESUMES
        try:
            with _progress(trainer) as report:
                encode_images(
                    store,
                    encode,
                    rows,
                    dict(share),
                    data.processor,
                    padded=padded,
                    num_workers=data.num_workers,
                    drop_bad=drop_bad,
                    progress=report,
                )
        except KeyboardInterrupt:
            status = 0  # of ranks above 0: Lightning kills rank 0 when another one fails
            if trainer.is_global_zero:
                status = INTERRUPTED
                print(f"\nStopped. {RESUMES}", flush=True)
            raise SystemExit(status) from None
        signals.kept = NOTHING_KEPT
        trainer.strategy.barrier("images are encoded")
        store.refresh()
        self.features.open(store)

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        self.features.close()  # other rows may have images that are not stored

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        self.features.close()

    def _open_store(
        self, processor: Processor, example: torch.Tensor, same_shape: bool, weights: str
    ) -> FeatureStore:
        """Opens the store of features like `example` of the weights with this fingerprint."""
        tokens, width = example.shape
        settings = {"format": FORMAT, "weights": weights, **processor.image_settings}
        shape = (tokens if same_shape else None, width)
        return FeatureStore(self.folder, settings=settings, shape=shape, dtype=example.dtype)

    def _check_size(self, store: FeatureStore, images: Locations, missing: Locations) -> None:
        size, missing_size = _bytes(store, images), _bytes(store, missing)
        described = f"{counted(len(images), 'image')} of {format_bytes(size / len(images))}"
        free = shutil.disk_usage(store.folder).free
        if size > self.limit_gb * 1e9:
            raise DataError(
                f"the vision cache needs {format_bytes(size)} for {described}, more than "
                f"speed.vision_cache_gb={self.limit_gb:g} allows: raise it, or train with "
                "speed.vision_cache=false"
            )
        if missing_size > free:
            raise DataError(
                f"the vision cache needs {format_bytes(missing_size)} more for {described}, and "
                f"the disk of {store.folder} has {format_bytes(free)} left: free disk space, "
                "choose a disk with paths.cache=FOLDER, or train with speed.vision_cache=false"
            )


def refuse_trained_encoder(
    parameters: Iterable[tuple[str, torch.Tensor]], components: Mapping[str, str]
) -> None:
    """Raises a DataError if a parameter of the vision tower or the resampler is trained."""
    trained = []
    for name, parameter in parameters:
        if parameter.requires_grad and component_of_tensor(name, components) in ENCODER:
            trained.append(name)
    if trained:
        raise DataError(
            "the vision cache stores image features from before training, and this run trains "
            f"{counted(len(trained), 'tensor')} to compute them ({trained[0]}, ...): choose "
            "an adapter that leaves the vision tower and the resampler frozen, such as "
            "adapter=lora, or train with speed.vision_cache=false"
        )


def encoder_tensors(model: nn.Module, components: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Returns all tensors that the vision tower and the resampler compute with.

    Sharded tensors are gathered. The keys are the names in the family's network, without the prefix
    of adapters.
    """
    tensors = dict(model.named_buffers())  # also those that are not in the state
    tensors |= model.state_dict()
    encoder = {}
    for name, tensor in tensors.items():
        component = component_of_tensor(name, components)
        if component not in ENCODER or not isinstance(tensor, torch.Tensor):
            continue
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        start = name.index(components[component])
        encoder[name[start:]] = tensor.detach()
    return encoder


def _unsharded(model: nn.Module, family: Family, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A network that can encode images on one rank alone.

    That is `model` itself, or, if its weights are sharded, a network on the meta device with the
    gathered `tensors` of the encoder.
    """
    if not any(isinstance(tensor, DTensor) for tensor in model.parameters()):
        return model
    network = family.meta_model().requires_grad_(False)
    unexpected = network.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    assert not unexpected, unexpected
    return network


def _bytes(store: FeatureStore, images: Locations) -> int:
    return sum(location.tokens for location in images.values()) * store.token_bytes


def _announce(store: FeatureStore, images: Locations, missing: Locations, uses: float) -> None:
    print(
        f"Vision cache: {counted(len(images), 'image')}, {format_bytes(_bytes(store, images))}, "
        f"in {store.folder}; {len(missing):,} of them to encode"
    )
    if uses < WORTHWHILE_USES * len(missing):
        log.warning(
            "the vision cache is pointless for this run alone: it encodes %s before the first "
            "step, and training uses images %d times. It pays off from the second epoch on, "
            "and for later runs with the same images; speed.vision_cache=false trains without it",
            counted(len(missing), "image"),
            uses,
        )


def _progress(trainer: lightning.Trainer) -> AbstractContextManager[ReportProgress]:
    return progress_bars(enabled=trainer.is_global_zero, seconds_per_line=60)
