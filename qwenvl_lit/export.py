"""`python -m qwenvl_lit.export ckpt=RUN out=DIR`: what a run has learned as a model, or an adapter, that others can load."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_lit.cli.command import command
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from qwenvl_lit.runs.run import Run
    from qwenvl_lit.training.adapters.methods import Adapter
    from qwenvl_lit.training.module import VisionLanguageModule
    from qwenvl_lit.types import Batch

DTYPES = ("bfloat16", "float16", "float32")
ROWS = 3  # that are compared
# How far logits may be from the run's, as a share of the largest one: float32 sums in another order, and weights rounded once more
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}
OF_A_PLACE = (
    "device_map",
    "max_memory",
    "download",
    "load_in_4bit",
)  # settings of a model that say nothing about it


def main(config: DictConfig) -> None:
    out = checked_target(config)
    dtype = config.dtype or config.model.dtype
    flags = [(key, config[key], (True, False)) for key in ("merge", "overwrite")]
    for key, value, choices in (
        ("dtype", dtype, DTYPES),
        ("compare", config.compare, ("run", "sample", "none")),
        *flags,
    ):
        if value not in choices:
            raise DataError(
                f"{key} is one of {', '.join(map(str, choices)).lower()}, got {value!r}"
            )
    if config.model.get("load_in_4bit"):
        raise DataError(
            "model.load_in_4bit: 4 bits are taken when a model is loaded to answer, not written; leave it out"
        )

    from omegaconf import OmegaConf

    from qwenvl_lit import build
    from qwenvl_lit.api import device_named
    from qwenvl_lit.data.download.files import in_bytes
    from qwenvl_lit.models.qwen_vl.export import PROJECTION
    from qwenvl_lit.reports.model_card import model_card
    from qwenvl_lit.training.adapters.peft_files import weights_file
    from qwenvl_lit.runs.run import SETTINGS, find_run
    from qwenvl_lit.training.adapters.peft_files import read_peft_file

    build.start(config)
    run = find_run(config.ckpt) if config.ckpt else None
    bnb_config = run is not None and bool(config.adapter.get("quantization"))
    if bnb_config:
        config.adapter.quantization = (
            None  # what was learned over few bits is added to the weights as they were
        )
    device = device_named(config.device)
    task = build.module(config, adapted=run is not None)
    task.home, task.trained = device, run.checkpoint if run else None
    batches = [] if config.compare == "none" else list(rows(config, task, device))

    settings = {
        part: OmegaConf.to_container(config[part], resolve=True) for part in ("model", "generation")
    }
    settings["model"] = {
        key: value for key, value in settings["model"].items() if key not in OF_A_PLACE
    }
    with unfinished(out, overwrite=config.overwrite) as folder:
        if config.merge:
            write_model(task, folder, dtype)
        else:
            write_adapter(task, folder)
        write_settings(folder / SETTINGS, settings, whole=config.merge, dtype=dtype)
        found = ["not compared with the run"]
        if batches:
            coarser = "float32" if {dtype, config.model.dtype} == {"float32"} else "bfloat16"
            found = [compare(task, folder, batches, tolerance=TOLERANCE[coarser], device=device)]
        if bnb_config:
            found.append(
                "the run holds its base in few bits, here it is as it was published: answers may differ from the run's"
            )
        if not config.merge and any(
            PROJECTION.search(name) for name in read_peft_file(weights_file(folder))
        ):
            found.append(
                "the adapters on q_proj, k_proj and v_proj of the resampler load here only, elsewhere these are one tensor"
            )
        trained = resolved(run)
        card = model_card(
            out.name,
            run=run,
            trained=trained,
            config=settings,
            merged=config.merge,
            dtype=dtype,
            compared="; ".join(found),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    size = sum(file.stat().st_size for file in out.iterdir())
    print(
        f"\nWrote {build.shown(str(out))}: {in_bytes(size)}, {dtype if config.merge else 'an adapter'}"
    )
    print("\n".join(found))
    print(f"Try it:  python -m qwenvl_lit.chat ckpt={build.shown(str(out))}")


def resolved(run: Run | None) -> dict[str, Any]:
    """The config of a run as it was; empty for what others trained."""
    from omegaconf import OmegaConf

    if run is None or run.folder is None:
        return {}
    file = run.folder / "config.yaml"
    return OmegaConf.to_container(OmegaConf.load(file)) if file.exists() else run.config


def checked_target(config: DictConfig) -> Path:
    """The folder to write.

    Raises:
        DataError: it is not named, there already, not one that an export wrote, or the one to read.
    """
    from qwenvl_lit.runs.run import SETTINGS

    if config.out is None:
        raise DataError(
            f"out is missing: python -m qwenvl_lit.export ckpt={config.ckpt or 'RUN'} out=FOLDER"
        )
    out = Path(config.out).expanduser().resolve()
    sources = [path for path in (config.model.path, config.ckpt) if path]
    if any(Path(path).expanduser().resolve().is_relative_to(out) for path in sources):
        raise DataError(f"out={config.out} holds what is to be read; choose another folder")
    if out.exists() and not config.overwrite:
        raise DataError(f"out={config.out} exists; choose another folder, or overwrite=true")
    if out.exists() and not (out / SETTINGS).exists():
        raise DataError(
            f"out={config.out} is not an exported folder, and stays: remove it yourself, or choose another"
        )
    return out


@contextmanager
def unfinished(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` that gets its name in the end, if all goes well, and is removed if not."""
    folder = out.with_name(out.name + ".part")
    shutil.rmtree(folder, ignore_errors=True)  # of an export that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
        old = out.with_name(out.name + ".old")
        if overwrite and out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        folder.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder)
        raise


def learned(task: VisionLanguageModule) -> list[tuple[Adapter, Path]]:
    """What was trained on top of the weights, the oldest first."""
    links = [(task.adapter, task.trained)] if task.adapter else []
    init = task.init
    while init:
        init.check()
        links.insert(0, (init.adapter, init.checkpoint))
        init = init.init
    return links


def write_model(task: VisionLanguageModule, folder: Path, dtype: str) -> None:
    """The whole model in the published layout, a shard at a time.

    Raises:
        DataError: the disk is too small, or a checkpoint is not there or not this model's.
    """
    import torch

    from qwenvl_lit.data.download.files import in_bytes
    from qwenvl_lit.models.qwen_vl.checkpoint import open_shard, stored_tensors
    from qwenvl_lit.models.qwen_vl.export import (
        reader,
        total_bytes,
        write_companions,
        write_weights,
    )
    from qwenvl_lit.models.qwen_vl.network import file_shapes
    from qwenvl_lit.training.adapters.merging import MergedWeights

    family, target = task.family, getattr(torch, dtype)
    shapes = file_shapes(family.meta_model())
    if (needed := total_bytes(shapes, target)) > (free := shutil.disk_usage(folder).free):
        raise DataError(
            f"{folder.parent} has {in_bytes(free)} left, and the model takes {in_bytes(needed)}"
        )
    if family.random:
        state = family.load(task.home).state_dict()
        read = lambda name: state[name].cpu()  # noqa: E731
    else:
        read = reader(stored_tensors(family.folder, shapes), getattr(torch, family.dtype))
    links = learned(task)
    for place, (adapter, checkpoint) in enumerate(links, 1):
        summed = (
            torch.float32 if place == len(links) else None
        )  # earlier ones as the run itself has folded them
        read = MergedWeights(
            read,
            outline=family.meta_model(),
            components=family.components,
            adapter=adapter,
            checkpoint=checkpoint,
            dtype=summed,
        )
    try:
        write_weights(read, shapes, folder, dtype=target)
    finally:
        open_shard.cache_clear()
    base = None if family.random else family.folder
    template = task.processor.template
    write_companions(
        folder,
        family.config,
        dtype=dtype,
        vocabulary=family.tokenizer.path,
        base=base,
        template=template,
    )


def write_adapter(task: VisionLanguageModule, folder: Path) -> None:
    """The adapter in peft's format.

    Raises:
        DataError: there is none, or it is for weights that another run has changed.
    """
    from qwenvl_lit.callbacks.checkpoint import save_adapter
    from qwenvl_lit.training.adapters.merging import load_trained_state

    if task.init:
        raise DataError(
            f"the run started from what another had learned ({task.init.checkpoint}), and its adapter is of no use without that: "
            f"export with merge=true"
        )
    model = (
        task.adapter.apply(task.family.meta_model(), task.family.components)
        if task.adapter
        else None
    )
    if not hasattr(model, "peft_config"):
        raise DataError(
            "there is no adapter: whole tensors were trained, or nothing was; export with merge=true"
        )
    load_trained_state(model, task.trained, assign=True)
    described = model.peft_config["default"]
    described.base_model_name_or_path = place_of(task.family.path)
    described.task_type = (
        "CAUSAL_LM"  # else peft names a class of this package, which others have not
    )
    weights = {
        f"model.{name}": tensor for name, tensor in model.state_dict().items() if not tensor.is_meta
    }
    save_adapter(model, weights, folder)


def write_settings(file: Path, settings: dict[str, Any], *, whole: bool, dtype: str) -> None:
    """How the model is prompted and answers, which the published layout has no place for."""
    from qwenvl_lit.models.qwen_vl.export import write_json

    model = settings["model"]
    if whole:
        model = {
            key: value
            for key, value in model.items()
            if key not in ("path", "config", "weights", "vocabulary", "seed")
        }
        model["dtype"] = dtype
    else:
        model = {**model, "path": place_of(model["path"])}
    write_json(file, {**settings, "model": model})


def place_of(path: str | None) -> str | None:
    """A folder as it is found from anywhere; a name on the hub as it is."""
    return (
        str(Path(path).expanduser().resolve())
        if path and Path(path).expanduser().is_dir()
        else path
    )


def rows(config: DictConfig, task: VisionLanguageModule, device: torch.device) -> Iterator[Batch]:
    """Prompts to compare on, one a batch: of the run's data, or, where no data are named, drawn images."""
    from qwenvl_lit import build
    from qwenvl_lit.data.collate import Pad
    from qwenvl_lit.data.demo.scenes import scenes
    from qwenvl_lit.types import Conversation, ImageSource, Turn

    if config.compare == "run" and config.data:
        data = build.data(config, task.processor)
        data.prepare_data()
        data.setup("predict")
        first = next(iter(data.test.values()))
        conversations: Sequence[Conversation] = [
            first[place] for place in range(min(ROWS, len(first)))
        ]
    else:
        conversations = [
            Conversation(
                id=str(number),
                turns=(
                    Turn(role="user", parts=(ImageSource(scene.draw()), "What is in the picture?")),
                ),
            )
            for number, scene in enumerate(scenes("test", ROWS))
        ]
    pad = Pad(pad_id=task.processor.pad_id)
    for conversation in conversations:
        yield pad([task.processor.encode(conversation, prompt=True)]).to(device)


def compare(
    task: VisionLanguageModule,
    folder: Path,
    batches: Sequence[Batch],
    *,
    tolerance: float,
    device: torch.device,
) -> str:
    """Load what was written, as anybody would, and say how far its logits are from those of the run.

    Args:
        tolerance: the difference that may be, as a share of the largest logit.

    Raises:
        DataError: it is larger.
    """
    import torch

    from qwenvl_lit import build
    from qwenvl_lit.runs.run import find_run

    written = find_run(str(folder))
    before = logits(task, batches)
    again = build.trained(written, {})
    again.home, again.trained = device, written.checkpoint
    after = logits(again, batches)
    scale = float(max(one.abs().max() for one in before))
    difference = float(
        max((one - other).abs().max() for one, other in zip(before, after, strict=True))
    )
    if not all(torch.isfinite(one).all() for one in after):
        raise DataError(
            "the written model gives logits that are not finite; float16 reaches up to 65504 only: choose dtype=bfloat16"
        )
    if not difference <= tolerance * scale:
        raise DataError(
            f"the written model is not the run's: logits differ by up to {difference:.3g}, where they go up to {scale:.3g} and "
            f"{tolerance * scale:.3g} can be explained; nothing was kept"
        )
    same = sum(
        int((one.argmax(-1) == other.argmax(-1)).sum())
        for one, other in zip(before, after, strict=True)
    )
    places = sum(len(one) for one in before)
    return f"logits up to {scale:.3g} differ by {difference:.2g} at most in {len(batches)} rows; {same} of {places} likeliest tokens agree"


def logits(task: VisionLanguageModule, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Of every token of each batch of one row, on the CPU; the weights are loaded for it and let go afterwards."""
    import torch

    task.configure_model()
    task.model.eval()
    with torch.inference_mode():
        found = [
            task.model(**task.family.inputs(batch)).logits[0].float().cpu() for batch in batches
        ]
    task.model = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    command("export", main, needs_run=True)
