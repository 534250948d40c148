"""Training from stored features equals training from pixels.

Also: what the stored features depend on, what is refused, and what an interrupted pass leaves.
"""

import logging
import shutil
from collections import namedtuple
from pathlib import Path

import lightning
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from safetensors import safe_open
from small_run import Killed, kills_at
from tiny import tiny_family
from toy_task import trainer
from two_ranks import GLOO, on_two_ranks

from qwenvl_lit import build
from qwenvl_lit.callbacks import vision_cache
from qwenvl_lit.callbacks.run_log import RunLog, read_log
from qwenvl_lit.callbacks.vision_cache import VisionCache, encoder_tensors
from qwenvl_lit.data import feature_pass
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.feature_pass import fingerprint
from qwenvl_lit.data.features import CachedFeatures, FeatureStore
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.qwen_vl import processor
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.optim import AdamW
from qwenvl_lit.training.strategies import FSDP2Strategy
from qwenvl_lit.types import BadImage, Conversation, DataError, ImageSource, Turn

LANGUAGE = LoRA(rank=2, alpha=4, dropout=0.3, targets=["c_attn"])
FROZEN_TOWER = Full(freeze=["vision"])
# As `read` reads them: eleven distinct images, one of which is in two rows.
TRAIN, VALIDATION = "abcdefgA2", "opq"


class RemoteImage:
    """An image that has to be fetched before it can be opened."""

    def __init__(self, shade: int):
        self.shade = shade
        self.name = f"https://images/{shade}.png"

    def path(self) -> Path:
        file = Path(RemoteImage.folder, f"{self.shade}.png")
        image(self.shade).save(file)
        return file


def image(shade: int) -> Image.Image:
    return Image.new("RGB", (9, 9), (shade, 255 - shade, 40))


def image_of(letter: str) -> ImageSource:
    return ImageSource(image(4 * (ord(letter) - 60)))


def read(source: str, read_options) -> list[Conversation]:
    """Each character is a row.

    A small letter has an image, a capital letter its own image and that of the small one, a digit
    none; the image of "!" is broken, and that of "@" has to be fetched.
    """
    rows = []
    for index, letter in enumerate(source):
        if letter == "!":
            images = [ImageSource(b"no image")]
        elif letter == "@":
            images = [ImageSource(RemoteImage(7))]
        elif letter.isdigit():
            images = []
        elif letter.isupper():
            images = [image_of(letter), image_of(letter.lower())]
        else:
            images = [image_of(letter)]
        turns = (
            Turn(role="user", parts=(*images, letter)),
            Turn(role="assistant", parts=(letter * 3,)),
        )
        rows.append(Conversation(id=letter, turns=turns, index=index, where=f"rows:{index + 1}"))
    return rows


class Watch(lightning.Callback):
    """Records answers, the tensors of batches, and how many images the tower encodes in steps."""

    def __init__(self):
        self.answers: list[str] = []
        self.images = 0
        self.vision: set[str] = set()

    def on_train_start(self, trainer, pl_module):
        towers = [
            module
            for name, module in pl_module.named_modules()
            if name.endswith("transformer.visual")
        ]
        towers[0].register_forward_pre_hook(self.count)

    def count(self, tower, inputs):
        self.images += len(inputs[0])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.vision |= set(batch.vision)

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ):
        if dataloader_idx == 1:
            self.answers += [prediction.text for prediction in outputs]


def run(
    folder: Path,
    *callbacks,
    cache: Path | None = None,
    limit_gb: float = 100.0,
    adapter=LANGUAGE,
    seed: int = 0,
    data=None,
    **options,
) -> tuple[VisionLanguageModule, CachedFeatures]:
    """Trains two epochs, with a validation and answers after each; `cache` is for features."""
    features = CachedFeatures()
    torch.manual_seed(3)
    module = VisionLanguageModule(
        family=tiny_family(seed=seed),
        adapter=adapter,
        generation=Generation(max_new_tokens=3),
        metrics={},
        optim=AdamW(lr=1e-2),
        features=features,
    )
    rows = {
        "train": TRAIN,
        "validation": VALIDATION,
        "batch_size": 2,
        "generated_validation_rows": 3,
        **(data or {}),
    }
    data_module = DataModule(processor=module.processor, read=read, **rows)
    if cache:
        callbacks = (VisionCache(features, cache, limit_gb), *callbacks)
    fitted = trainer(folder, RunLog(), *callbacks, **{"max_epochs": 2, **options})
    fitted.fit(module, data_module)
    return module, features


def losses(folder: Path) -> list[float]:
    values = []
    for record in read_log(folder / "logging.jsonl"):
        values += [record[name] for name in ("loss", "val/loss", "grad_norm") if name in record]
    return values


def stored(cache: Path) -> int:
    """Returns the number of images in all stores below `cache`."""
    opened = [safe_open(file, framework="pt") for file in cache.rglob("*.safetensors")]
    return sum(len(file.keys()) for file in opened)


@pytest.fixture
def decoded(monkeypatch) -> list:
    """A list that grows with each image that is decoded for the tower."""
    calls = []
    resized = processor.resize_image

    def recorded(*arguments):
        calls.append(arguments)
        return resized(*arguments)

    monkeypatch.setattr(processor, "resize_image", recorded)
    return calls


@pytest.mark.parametrize(
    ("adapter", "data"),
    [(LANGUAGE, {}), (FROZEN_TOWER, {"max_tokens": 64, "packing": True})],
    ids=["lora", "full"],
)
def test_training_from_features_equals_training_from_pixels(tmp_path, adapter, data):
    watch, usual = Watch(), Watch()
    options = {"adapter": adapter, "data": data}
    module, _ = run(tmp_path / "cached", watch, cache=tmp_path / "cache", **options)
    other, _ = run(tmp_path / "usual", usual, **options)
    assert (watch.vision, usual.vision) == ({"vision_features"}, {"pixel_values"})
    assert watch.images == 0 < usual.images
    assert len(losses(tmp_path / "usual")) > 10
    # float32: a tower that encodes an image in another batch sums in another order
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "usual"), abs=1e-6)
    assert len(watch.answers) == 6
    assert watch.answers == usual.answers
    for parameter, expected in zip(module.parameters(), other.parameters(), strict=True):
        # AdamW's steps follow the signs of gradients where these are small
        torch.testing.assert_close(parameter, expected, atol=1e-5, rtol=0)


def test_the_config_key_adds_the_callback_and_shares_its_features(tmp_path):
    overrides = [f"paths.run={tmp_path}", f"paths.cache={tmp_path}", "speed.vision_cache=true"]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", overrides)
        features = build.cached_features(config)
        module = build.module(config, features=features)
        callbacks = build.trainer(config, features=features).callbacks
        config.speed.vision_cache = False
        assert build.cached_features(config) is None
    assert module.processor.features is features
    [cache] = [callback for callback in callbacks if isinstance(callback, VisionCache)]
    assert cache.features is features
    assert cache.folder == tmp_path / "vision"


@pytest.mark.parametrize(
    "length", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 7}], ids=["epochs", "steps"]
)
def test_data_workers_start_after_the_pass(tmp_path, length):
    watch = Watch()
    run(tmp_path, watch, cache=tmp_path / "cache", data={"num_workers": 1}, **length)
    assert (watch.vision, watch.images) == ({"vision_features"}, 0)


def test_a_later_run_decodes_and_encodes_no_image(tmp_path, decoded, capsys):
    _, features = run(tmp_path / "first", cache=tmp_path / "cache")
    assert not features.is_open, "the run is over"
    assert len(decoded) == 1 + 11, "one for the shape of features, and each image once"
    assert stored(tmp_path / "cache") == 11
    described = f"11 images, 5.63 kB, in {next((tmp_path / 'cache').iterdir())}; "
    assert f"{described}11 of them to encode" in capsys.readouterr().out
    run(tmp_path / "second", cache=tmp_path / "cache")
    assert len(decoded) == 1 + 11 + 1
    assert f"{described}0 of them to encode" in capsys.readouterr().out
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


def test_other_weights_have_another_store(tmp_path):
    run(tmp_path / "run", cache=tmp_path / "cache", max_epochs=1)
    run(tmp_path / "run", cache=tmp_path / "cache", max_epochs=1, seed=1)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert stored(tmp_path / "cache") == 22


def test_the_fingerprint_depends_on_every_bit_and_the_order_but_not_on_adapters():
    module = VisionLanguageModule(
        family=tiny_family(), adapter=None, generation=Generation(), metrics={}
    )
    module.configure_model()
    components = module.family.components
    tensors = encoder_tensors(module.model, components)
    assert "transformer.visual.conv1.weight" in tensors
    assert "transformer.visual.attn_pool.pos_embed" in tensors
    assert all(name.startswith("transformer.visual.") for name in tensors)
    known = fingerprint(tensors)
    adapted = LANGUAGE.apply(module.model, module.family)
    assert fingerprint(encoder_tensors(adapted, components)) == known
    for name in ("transformer.visual.proj", "transformer.visual.attn_pool.pos_embed"):
        before = tensors[name].clone()
        tensors[name][0, 0] = torch.nextafter(before[0, 0], torch.tensor(9.0))
        changed = fingerprint(tensors)
        tensors[name].copy_(before.flip(0))
        flipped = fingerprint(tensors)
        tensors[name].copy_(before)
        assert len({known, changed, flipped}) == 3
    assert fingerprint({name: tensor.bfloat16() for name, tensor in tensors.items()}) != known
    assert fingerprint(tensors) == known


@pytest.mark.parametrize(("end", "status"), [(Killed, None), (KeyboardInterrupt, 130)])
def test_an_interrupted_pass_keeps_the_features_that_it_computed(
    tmp_path, monkeypatch, decoded, capsys, end, status
):
    monkeypatch.setattr(feature_pass, "BATCH_SIZE", 2)
    monkeypatch.setattr(feature_pass, "IMAGES_PER_FILE", 4)
    resized = processor.resize_image

    def until_interrupted(*arguments):
        if len(decoded) == 8:
            raise end
        return resized(*arguments)

    monkeypatch.setattr(processor, "resize_image", until_interrupted)
    with pytest.raises(SystemExit if status else end) as ended:
        run(tmp_path / "run", cache=tmp_path / "cache")
    assert getattr(ended.value, "code", None) == status
    assert ("next run encodes the remaining" in capsys.readouterr().out) == bool(status)
    assert stored(tmp_path / "cache") == 6, "three batches: a file of four and one of two"
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    monkeypatch.setattr(processor, "resize_image", resized)
    run(tmp_path / "run", cache=tmp_path / "cache")
    assert stored(tmp_path / "cache") == 11
    assert len(decoded) == 8 + 1 + 5


class HoldProcessor(lightning.Callback):
    """Keeps the processor of a run, which takes features from the cache."""

    def __init__(self):
        self.processor = None

    def on_train_start(self, trainer, pl_module):
        self.processor = trainer.datamodule.processor
        assert self.processor.features.is_open


def test_after_a_killed_run_the_processor_decodes_images_again(tmp_path):
    hold = HoldProcessor()
    with pytest.raises(Killed):
        run(tmp_path, hold, kills_at("on_train_batch_start", 2), cache=tmp_path / "cache")
    assert not hold.processor.features.is_open


def test_a_cache_above_its_limit_is_refused_before_anything_is_encoded(tmp_path):
    needs = (
        r"needs 5\.63 kB for 11 images of 512 bytes, more than speed\.vision_cache_gb=5e-06 allows"
    )
    with pytest.raises(DataError, match=needs):
        run(tmp_path, cache=tmp_path / "cache", limit_gb=5e-6)
    assert stored(tmp_path / "cache") == 0
    with pytest.raises(ValueError, match=r"speed\.vision_cache_gb is a number above 0, got 0"):
        VisionCache(CachedFeatures(), tmp_path, limit_gb=0)


def test_a_family_without_stored_features_is_refused_before_weights_are_loaded(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(QwenVLFamily, "supports_vision_cache", False)
    monkeypatch.setattr(QwenVLFamily, "load", lambda *_, **__: pytest.fail("weights are loaded"))
    with pytest.raises(DataError, match=r"vision_cache=true: models of the family QwenVL cannot"):
        run(tmp_path, cache=tmp_path / "cache")


def test_features_that_do_not_fit_on_the_disk_are_refused(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9000, 5000, 4000))
    needs = r"needs 5\.63 kB more for 11 images .* has 4 kB left: free disk .*paths\.cache=FOLDER"
    with pytest.raises(DataError, match=needs):
        run(tmp_path, cache=tmp_path / "cache")


def test_a_warning_says_that_one_epoch_does_not_pay_unless_its_images_are_stored(tmp_path, caplog):
    def warnings(epochs: int, cache: str, train: str = "abcdef", **options) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger=vision_cache.__name__):
            run(
                tmp_path / "run",
                cache=tmp_path / cache,
                data={"train": train, "validation": None},
                max_epochs=epochs,
                **options,
            )
        messages = [record.getMessage() for record in caplog.records]
        return [message for message in messages if "pointless" in message]

    (message,) = warnings(1, "one")
    assert "it encodes 6 images before the first step" in message
    assert "training uses images 6 times" in message
    assert not warnings(1, "one")
    assert not warnings(2, "two")
    assert not warnings(1, "three", train="aaabbb"), "each image three times"
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
def test_a_trained_encoder_is_refused(tmp_path, adapter, first):
    refused = rf"trains \d+ tensors .* \(.*{first}.*adapter=lora.*speed\.vision_cache=false"
    with pytest.raises(DataError, match=refused):
        run(tmp_path, cache=tmp_path / "cache", adapter=adapter)
    assert not (tmp_path / "cache").exists()


def test_bad_images_are_dropped_or_reported_as_without_the_cache(tmp_path):
    dropping = {"train": "ab!c", "on_bad_image": "drop", "max_bad_fraction": 0.5}
    run(tmp_path / "cached", cache=tmp_path / "cache", data=dropping)
    run(tmp_path / "usual", data=dropping)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "usual"), abs=1e-6)
    findings = (tmp_path / "cached/findings.jsonl").read_text()
    assert findings == (tmp_path / "usual/findings.jsonl").read_text() != ""
    assert stored(tmp_path / "cache") == 6
    broken = r"rows:3: row '!': image <bytes> cannot be read as an image"
    with pytest.raises(BadImage, match=broken):
        run(
            tmp_path / "refused",
            cache=tmp_path / "cache",
            data={**dropping, "on_bad_image": "error"},
        )


def test_rows_without_images_need_no_store(tmp_path):
    cache = tmp_path / "cache"
    run(tmp_path / "run", cache=cache, data={"train": "1234", "validation": None})
    assert not cache.exists()
    mixed = Watch()
    data = {"train": "a111", "validation": None, "batch_size": 1}
    run(tmp_path / "run", mixed, cache=cache, data=data)
    assert mixed.vision == {"vision_features"}


def test_remote_images_are_fetched(tmp_path):
    RemoteImage.folder = tmp_path
    run(tmp_path / "cached", cache=tmp_path / "cache", data={"train": "ab@"})
    run(tmp_path / "usual", data={"train": "ab@"})
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "usual"), abs=1e-6)
    assert stored(tmp_path / "cache") == 6


def test_data_workers_decode_for_the_pass_and_read_the_features(tmp_path):
    run(tmp_path / "cached", cache=tmp_path / "cache", data={"num_workers": 2}, max_epochs=1)
    run(tmp_path / "usual", max_epochs=1)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "usual"), abs=1e-6)
    assert stored(tmp_path / "cache") == 11


def train_with_and_without_cache(rank: int, folder: Path) -> None:
    """Writes how many images this rank added to the stores."""
    added = []
    add = FeatureStore.add

    def recorded(self, features):
        added.append(len(features))
        add(self, features)

    FeatureStore.add = recorded
    data = {"train": TRAIN.strip("2")}  # each rank has images in each step
    kinds = (
        ("ddp", DDPStrategy, LANGUAGE, {"max_epochs": -1, "max_steps": 4}),
        ("fsdp", FSDP2Strategy, FROZEN_TOWER, {}),
    )
    for kind, strategy, adapter, length in kinds:
        for name, cache in (("usual", None), ("cached", folder / f"{kind}_cache")):
            run(
                folder / f"{kind}_{name}",
                cache=cache,
                adapter=adapter,
                data=data,
                devices=2,
                strategy=strategy(**GLOO),
                **length,
            )
    (folder / f"added{rank}").write_text(str(added))


def test_two_ranks_share_the_work_and_the_store(tmp_path):
    on_two_ranks(train_with_and_without_cache, tmp_path)
    for kind in ("ddp", "fsdp"):
        cached, usual = losses(tmp_path / f"{kind}_cached"), losses(tmp_path / f"{kind}_usual")
        assert cached == pytest.approx(usual, abs=1e-6)
        assert len(cached) == 10
        assert stored(tmp_path / f"{kind}_cache") == 11
    assert [(tmp_path / f"added{rank}").read_text() for rank in (0, 1)] == ["[6, 6]", "[5, 5]"]
