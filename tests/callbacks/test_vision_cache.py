"""Training from stored features is training from pixels; what they depend on, what is refused, and what stays of a pass that ends early."""

import logging
import os
import shutil
import socket
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import lightning
import pytest
import torch.multiprocessing
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from safetensors import safe_open
from small_run import SIZES, VISUAL, Killed, kills_at
from toy_task import trainer

from qwenvl_lit.callbacks import vision_cache
from qwenvl_lit.callbacks.run_log import RunLog, read_log
from qwenvl_lit.callbacks.vision_cache import VisionCache, fingerprint, tensors_of
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.qwen_vl import processor
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.optim import AdamW
from qwenvl_lit.training.strategies import FSDP2Strategy
from qwenvl_lit.types import BadImage, Conversation, DataError, ImageSource, Turn

LANGUAGE = LoRA(rank=2, alpha=4, dropout=0.3, targets=["c_attn"])
FROZEN_TOWER = Full(freeze=["vision"])
TRAIN, VALIDATION = (
    "abcdefgA2",
    "opq",
)  # as `read` takes them: eleven distinct images, one of which is in two rows


class Kept:
    """An image that has to be brought."""

    def __init__(self, shade: int):
        self.shade = shade
        self.name = f"https://images/{shade}.png"

    def path(self) -> Path:
        file = Path(Kept.folder, f"{self.shade}.png")
        image(self.shade).save(file)
        return file


def image(shade: int) -> Image.Image:
    return Image.new("RGB", (9, 9), (shade, 255 - shade, 40))


def read(source: str, read_options) -> list[Conversation]:
    """A letter is a row with an image, a capital letter one with that of the small one too, a digit none; "!" has a broken one, "@" one
    that has to be fetched."""
    rows = []
    for place, letter in enumerate(source):
        images = (
            [ImageSource(image(4 * (ord(letter) - 60)))]
            * (letter not in "!@")
            * (not letter.isdigit())
        )
        images += [ImageSource(image(4 * (ord(letter.lower()) - 60)))] * letter.isupper()
        images += [ImageSource(b"no image")] * (letter == "!") + [ImageSource(Kept(7))] * (
            letter == "@"
        )
        turns = (
            Turn(role="user", parts=(*images, letter)),
            Turn(role="assistant", parts=(letter * 3,)),
        )
        rows.append(Conversation(id=letter, turns=turns, index=place, where=f"rows:{place + 1}"))
    return rows


class Watch(lightning.Callback):
    """Remembers answers, and how many images the tower saw in steps."""

    def __init__(self):
        self.answers: list[str] = []
        self.images = 0
        self.vision: set[str] = set()

    def on_train_start(self, trainer, pl_module):
        tower = next(
            module
            for name, module in pl_module.named_modules()
            if name.endswith("transformer.visual")
        )
        tower.register_forward_pre_hook(
            lambda _, given: setattr(self, "images", self.images + len(given[0]))
        )

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.vision |= set(batch.vision)

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ):
        if dataloader_idx == 1:
            self.answers += [prediction.text for prediction in outputs]


def run(
    folder: Path, *callbacks, adapter=LANGUAGE, seed: int = 0, data=None, **options
) -> tuple[VisionLanguageModule, DataModule]:
    """Two epochs; a validation, with answers, after each."""
    torch.manual_seed(3)
    task = VisionLanguageModule(
        family=QwenVLFamily(
            config={**SIZES, "visual": {**VISUAL, "resampler_heads": 2}},
            vocabulary="tiny",
            seed=seed,
        ),
        adapter=adapter,
        generation=Generation(max_new_tokens=3),
        metrics={},
        optim=AdamW(lr=1e-2),
    )
    rows = {
        "train": TRAIN,
        "validation": VALIDATION,
        "batch_size": 2,
        "generated_validation_rows": 3,
        **(data or {}),
    }
    module = DataModule(processor=task.processor, read=read, **rows)
    fitted = trainer(folder, RunLog(), *callbacks, **{"max_epochs": 2, **options})
    fitted.fit(task, module)
    return task, module


def losses(folder: Path) -> list[float]:
    records = read_log(folder / "logging.jsonl")
    return [
        record[name]
        for record in records
        for name in ("loss", "val/loss", "grad_norm")
        if name in record
    ]


def stored(cache: Path) -> int:
    """How many images there are, in all stores."""
    opened = [safe_open(file, framework="pt") for file in cache.rglob("*.safetensors")]
    return sum(len(file.keys()) for file in opened)


@pytest.fixture
def decoded(monkeypatch) -> list:
    """Grows with each image that is decoded for the tower."""
    seen = []
    resized = processor.resized
    monkeypatch.setattr(processor, "resized", lambda *given: seen.append(given) or resized(*given))
    return seen


@pytest.mark.parametrize(
    ("adapter", "data"),
    [(LANGUAGE, {}), (FROZEN_TOWER, {"max_tokens": 64, "packing": True})],
    ids=["lora", "full"],
)
def test_training_from_features_is_training_from_pixels(tmp_path, adapter, data):
    watch, usual = Watch(), Watch()
    task, _ = run(
        tmp_path / "cached", VisionCache(tmp_path / "cache"), watch, adapter=adapter, data=data
    )
    other, _ = run(tmp_path / "usual", usual, adapter=adapter, data=data)
    assert (watch.vision, usual.vision) == ({"vision_features"}, {"pixel_values"})
    assert watch.images == 0 < usual.images
    assert len(losses(tmp_path / "usual")) > 10
    # Float32: a tower that sees other images beside one adds in another order
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "usual"), abs=1e-6)
    assert len(watch.answers) == 6
    assert watch.answers == usual.answers
    for one, same in zip(task.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(
            one, same, atol=1e-5, rtol=0
        )  # AdamW's steps go by signs where gradients are small


@pytest.mark.parametrize(
    "length", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 7}], ids=["epochs", "steps"]
)
def test_workers_are_started_once_there_are_features(tmp_path, length):
    watch = Watch()
    run(tmp_path, VisionCache(tmp_path / "cache"), watch, data={"num_workers": 1}, **length)
    assert (watch.vision, watch.images) == ({"vision_features"}, 0)


def test_a_later_run_decodes_and_encodes_nothing(tmp_path, decoded, capsys):
    _, data = run(tmp_path / "first", VisionCache(tmp_path / "cache"))
    assert data.processor.features is None  # the run is over
    assert len(decoded) == 1 + 11  # one to see what features look like; each image once
    assert stored(tmp_path / "cache") == 11
    told = f"11 images, 5.63 kB, in {next((tmp_path / 'cache').iterdir())}; "
    assert f"{told}11 of them are to be encoded" in capsys.readouterr().out
    run(tmp_path / "second", VisionCache(tmp_path / "cache"))
    assert len(decoded) == 1 + 11 + 1
    assert f"{told}0 of them are to be encoded" in capsys.readouterr().out
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


def test_other_weights_are_another_store(tmp_path):
    run(tmp_path / "run", VisionCache(tmp_path / "cache"), max_epochs=1)
    run(tmp_path / "run", VisionCache(tmp_path / "cache"), max_epochs=1, seed=1)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert stored(tmp_path / "cache") == 22


def test_the_fingerprint_notices_any_bit_and_any_order_and_no_wrapper():
    task = VisionLanguageModule(
        family=QwenVLFamily(config={**SIZES, "visual": VISUAL}, vocabulary="tiny"),
        adapter=None,
        generation=Generation(),
        metrics={},
    )
    task.configure_model()
    parts = task.family.components
    tensors = tensors_of(task.model, parts)
    assert {"transformer.visual.conv1.weight", "transformer.visual.attn_pool.pos_embed"} <= set(
        tensors
    )
    assert all(name.startswith("transformer.visual.") for name in tensors)
    known = fingerprint(tensors)
    assert fingerprint(tensors_of(LANGUAGE.apply(task.model, parts), parts)) == known
    for name in ("transformer.visual.proj", "transformer.visual.attn_pool.pos_embed"):
        before = tensors[name].clone()
        tensors[name][0, 0] = torch.nextafter(before[0, 0], torch.tensor(9.0))
        changed = fingerprint(tensors)
        tensors[name].copy_(before.flip(0))
        turned = fingerprint(tensors)
        tensors[name].copy_(before)
        assert len({known, changed, turned}) == 3
    assert fingerprint({name: tensor.bfloat16() for name, tensor in tensors.items()}) != known
    assert fingerprint(tensors) == known


@pytest.mark.parametrize(("end", "status"), [(Killed, None), (KeyboardInterrupt, 130)])
def test_a_pass_that_ends_early_keeps_what_it_did(
    tmp_path, monkeypatch, decoded, capsys, end, status
):
    monkeypatch.setattr(vision_cache, "TOGETHER", 2)
    monkeypatch.setattr(vision_cache, "SHARD", 4)
    resized = processor.resized

    def until_killed(*given):
        if len(decoded) == 8:
            raise end
        return resized(*given)

    monkeypatch.setattr(processor, "resized", until_killed)
    with pytest.raises(SystemExit if status else end) as ended:
        run(tmp_path / "run", VisionCache(tmp_path / "cache"))
    assert getattr(ended.value, "code", None) == status
    assert ("goes on from there" in capsys.readouterr().out) == bool(status)
    assert stored(tmp_path / "cache") == 6  # three batches: a file of four and one of two
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    monkeypatch.setattr(processor, "resized", resized)
    run(tmp_path / "run", VisionCache(tmp_path / "cache"))
    assert stored(tmp_path / "cache") == 11
    assert len(decoded) == 8 + 1 + 5


def test_a_run_that_is_killed_gives_pixels_again(tmp_path):
    held = []
    with pytest.raises(Killed):
        run(
            tmp_path,
            VisionCache(tmp_path / "cache"),
            Watched(held),
            kills_at("on_train_batch_start", 2),
        )
    (processor_of_run,) = held
    assert processor_of_run.features is None


class Watched(lightning.Callback):
    """Keeps the processor of a run that gives features."""

    def __init__(self, held: list):
        self.held = held

    def on_train_start(self, trainer, pl_module):
        assert trainer.datamodule.processor.features is not None
        self.held.append(trainer.datamodule.processor)


def test_a_cache_above_its_limit_is_refused_before_anything_is_encoded(tmp_path):
    with pytest.raises(
        DataError,
        match=r"needs 5\.63 kB for 11 images of 512 bytes, more than speed\.vision_cache_gb=5e-06 allows",
    ):
        run(tmp_path, VisionCache(tmp_path / "cache", limit_gb=5e-6))
    assert stored(tmp_path / "cache") == 0
    with pytest.raises(ValueError, match=r"speed\.vision_cache_gb is a number above 0, got 0"):
        VisionCache(tmp_path, limit_gb=0)


def test_what_does_not_fit_the_disk_is_refused(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9000, 5000, 4000))
    with pytest.raises(
        DataError,
        match=r"needs 5\.63 kB more for 11 images .* has 4 kB left: make room, .*paths\.cache=FOLDER",
    ):
        run(tmp_path, VisionCache(tmp_path / "cache"))


def test_one_epoch_is_warned_about_unless_its_images_are_there(tmp_path, caplog):
    def warnings(epochs: int, cache: str, train: str = "abcdef", **options) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger=vision_cache.__name__):
            run(
                tmp_path / "run",
                VisionCache(tmp_path / cache),
                data={"train": train, "validation": None},
                max_epochs=epochs,
                **options,
            )
        return [
            record.getMessage() for record in caplog.records if "pointless" in record.getMessage()
        ]

    (said,) = warnings(1, "one")
    assert (
        "6 images are encoded before the first step, and training looks at images 6 times" in said
    )
    assert not warnings(1, "one")
    assert not warnings(2, "two")
    assert not warnings(1, "three", train="aaabbb")  # each image three times
    assert warnings(2, "four", limit_train_batches=1)
    assert warnings(-1, "five", max_steps=3)
    assert not warnings(-1, "six", max_steps=6)


@pytest.mark.parametrize(
    ("adapter", "first"),
    [
        (
            LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear"),
            r"transformer\.visual\.transformer\.resblocks",
        ),
        (
            LoRA(rank=2, alpha=4, dropout=0.0, targets=r".*attn_pool\.attn\.q_proj"),
            r"transformer\.visual\.attn_pool\.attn\.q_proj\.lora_A",
        ),
        (Full(), r"transformer\.visual\.positional_embedding"),
        (Full(freeze=["vision"], train=["resampler"]), r"transformer\.visual\.attn_pool\.query"),
    ],
    ids=["lora everywhere", "lora in the resampler", "full", "resampler"],
)
def test_what_trains_before_the_features_is_refused(tmp_path, adapter, first):
    with pytest.raises(
        DataError,
        match=rf"tensors that encode them train \(.*{first}.*adapter=lora.*speed\.vision_cache=false",
    ):
        run(tmp_path, VisionCache(tmp_path / "cache"), adapter=adapter)
    assert not (tmp_path / "cache").exists()


def test_bad_images_are_dropped_or_told_as_without_the_cache(tmp_path):
    dropping = {"train": "ab!c", "on_bad_image": "drop", "max_bad_fraction": 0.5}
    for name, callbacks in (("cached", [VisionCache(tmp_path / "cache")]), ("usual", [])):
        run(tmp_path / name, *callbacks, data=dropping)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "usual"), abs=1e-6)
    assert (
        (tmp_path / "cached/findings.jsonl").read_text()
        == (tmp_path / "usual/findings.jsonl").read_text()
        != ""
    )
    assert stored(tmp_path / "cache") == 6
    with pytest.raises(
        BadImage, match=r"rows:3: sample '!': image <bytes> cannot be read as an image"
    ):
        run(
            tmp_path / "told",
            VisionCache(tmp_path / "cache"),
            data={**dropping, "on_bad_image": "error"},
        )


def test_rows_without_images_need_no_store(tmp_path):
    run(
        tmp_path / "run",
        VisionCache(tmp_path / "cache"),
        data={"train": "1234", "validation": None},
    )
    assert not (tmp_path / "cache").exists()
    mixed = Watch()
    run(
        tmp_path / "run",
        VisionCache(tmp_path / "cache"),
        mixed,
        data={"train": "a111", "validation": None, "batch_size": 1},
    )
    assert mixed.vision == {"vision_features"}


def test_images_that_have_to_be_fetched_are_fetched(tmp_path):
    Kept.folder = tmp_path
    run(tmp_path / "cached", VisionCache(tmp_path / "cache"), data={"train": "ab@"})
    run(tmp_path / "usual", data={"train": "ab@"})
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "usual"), abs=1e-6)
    assert stored(tmp_path / "cache") == 6


def test_data_workers_decode_for_the_pass_and_read_the_features(tmp_path):
    run(tmp_path / "cached", VisionCache(tmp_path / "cache"), data={"num_workers": 2}, max_epochs=1)
    run(tmp_path / "usual", max_epochs=1)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "usual"), abs=1e-6)
    assert stored(tmp_path / "cache") == 11


def run_rank(rank: int, folder: Path, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    added = []
    add = vision_cache.FeatureStore.add
    vision_cache.FeatureStore.add = lambda self, features: (
        added.append(len(features)) or add(self, features)
    )
    gloo = {
        "process_group_backend": "gloo",
        "timeout": timedelta(seconds=60),
    }  # not to wait for ever
    data = {"train": TRAIN.strip("2")}  # each rank has images in each step
    kinds = (
        ("ddp", DDPStrategy, LANGUAGE, {"max_epochs": -1, "max_steps": 4}),
        ("fsdp", FSDP2Strategy, FROZEN_TOWER, {}),
    )
    for kind, strategy, adapter, ends in kinds:
        for name, callbacks in (("usual", []), ("cached", [VisionCache(folder / f"{kind}_cache")])):
            run(
                folder / f"{kind}_{name}",
                *callbacks,
                adapter=adapter,
                data=data,
                devices=2,
                strategy=strategy(**gloo),
                **ends,
            )
    (folder / f"added{rank}").write_text(str(added))


def test_two_ranks_share_the_work_and_the_store(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, args=(tmp_path, port), nprocs=2)
    for kind in ("ddp", "fsdp"):
        assert losses(tmp_path / f"{kind}_cached") == pytest.approx(
            losses(tmp_path / f"{kind}_usual"), abs=1e-6
        )
        assert len(losses(tmp_path / f"{kind}_cached")) == 10
        assert stored(tmp_path / f"{kind}_cache") == 11
    assert [(tmp_path / f"added{rank}").read_text() for rank in (0, 1)] == ["[6, 6]", "[5, 5]"]
