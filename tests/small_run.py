"""A training run of a tiny model on tiny data, and ways to end it, for tests of checkpoints."""

from collections import Counter
from pathlib import Path

import lightning
import torch
from PIL import Image
from tiny import tiny_family
from toy_task import trainer

from qwenvl_lit.callbacks.checkpoint import RunCheckpoint
from qwenvl_lit.callbacks.run_log import RunLog, read_log
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.training.adapters.methods import LoRA
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.optim import AdamW
from qwenvl_lit.types import Conversation, ImageSource, Turn

DROPOUT = LoRA(rank=2, alpha=4, dropout=0.3, targets="all-linear")


class Killed(BaseException):
    """Ends a run at once, as a signal would: only pytest catches it."""


class At(lightning.Callback):
    """Calls `act` when `hook` is called for the `nth` time."""

    def __init__(self, hook: str, nth: int, act):
        calls = Counter()

        def count(*_, **__):
            calls[hook] += 1
            if calls[hook] == nth:
                act()

        setattr(self, hook, count)


def kills_at(hook: str, nth: int) -> At:
    def kill():
        raise Killed

    return At(hook, nth, kill)


def read(source: str, read_options) -> list[Conversation]:
    """Makes each letter a row with an image of its own color; the answer repeats the letter."""
    rows = []
    for index, letter in enumerate(source):
        image = ImageSource(Image.new("RGB", (9, 9), (index * 20, 0, 0)))
        turns = (
            Turn(role="user", parts=(image, letter)),
            Turn(role="assistant", parts=(letter * 3,)),
        )
        rows.append(Conversation(id=letter, turns=turns, index=index))
    return rows


def run(
    folder: Path,
    *callbacks,
    adapter=DROPOUT,
    resume: bool = False,
    every: int = 2,
    keep: int = 0,
    **options,
) -> dict[str, torch.Tensor]:
    """Trains two epochs of seven batches, two batches per step; returns the trained tensors.

    A validation follows every third batch.
    """
    torch.manual_seed(3)
    module = VisionLanguageModule(
        family=tiny_family(),
        adapter=adapter,
        generation=Generation(max_new_tokens=2, do_sample=True),
        metrics={},
        optim=AdamW(lr=1e-2),
        config={"seed": 3},
    )
    data = DataModule(
        processor=module.processor,
        read=read,
        train="abcdefghijklmn",
        validation="opq",
        batch_size=2,
        generated_validation_rows=2,
    )
    defaults = {
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "val_check_interval": 3,
        "gradient_clip_val": 1.0,
        "enable_checkpointing": True,
    }
    checkpoints = RunCheckpoint(every=every, keep=keep)
    last = folder / "checkpoints/last.ckpt" if resume else None
    trainer(folder, RunLog(), *callbacks, checkpoints, **{**defaults, **options}).fit(
        module, data, ckpt_path=last, weights_only=True
    )
    trainable, state = module.trainable_names(), module.state_dict()
    return {name: state[name].clone() for name in state if name in trainable}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def history(folder: Path) -> list[dict]:
    """The log of a run without the times."""
    history = []
    for record in read_log(folder / "logging.jsonl"):
        history.append({name: record[name] for name in record if not name.endswith("_s")})
    return history
