"""A run of a tiny model on tiny data, and ways to end it: what the tests of checkpoints share."""

from collections import Counter
from pathlib import Path

import lightning
import torch
from PIL import Image
from toy_task import trainer

from qwenvl_lit.callbacks.checkpoint import RunCheckpoint
from qwenvl_lit.callbacks.run_log import RunLog, read_log
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.adapters.methods import LoRA
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.optim import AdamW
from qwenvl_lit.types import Conversation, ImageSource, Turn

VISUAL = {
    "image_size": 16,
    "patch_size": 8,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "mlp_ratio": 2.0,
    "output_dim": 32,
    "n_queries": 4,
}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "intermediate_size": 64,
}
DROPOUT = LoRA(rank=2, alpha=4, dropout=0.3, targets="all-linear")


def family() -> QwenVLFamily:
    return QwenVLFamily(
        config={**SIZES, "visual": {**VISUAL, "resampler_heads": 2}}, vocabulary="tiny"
    )


class Killed(BaseException):
    """Ends a run where it stands: nothing catches it but pytest."""


class At(lightning.Callback):
    """Does something in the `nth` call of a hook."""

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
    rows = []
    for place, letter in enumerate(source):
        turns = (
            Turn(
                role="user",
                parts=(ImageSource(Image.new("RGB", (9, 9), (place * 20, 0, 0))), letter),
            ),
            Turn(role="assistant", parts=(letter * 3,)),
        )
        rows.append(Conversation(id=letter, turns=turns, index=place))
    return rows


def run(
    folder: Path,
    *callbacks,
    adapter=DROPOUT,
    goes_on: bool = False,
    every: int = 2,
    keep: int = 0,
    **options,
) -> dict[str, torch.Tensor]:
    """What is trained at the end: two epochs of seven batches, two of which are a step, and a validation after every third batch."""
    torch.manual_seed(3)
    task = VisionLanguageModule(
        family=family(),
        adapter=adapter,
        generation=Generation(max_new_tokens=2, do_sample=True),
        metrics={},
        optim=AdamW(lr=1e-2),
        config={"seed": 3},
    )
    data = DataModule(
        processor=task.processor,
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
    }
    fitted = trainer(
        folder,
        RunLog(),
        *callbacks,
        RunCheckpoint(every=every, keep=keep),
        enable_checkpointing=True,
        **{**defaults, **options},
    )
    fitted.fit(
        task,
        data,
        ckpt_path=folder / "checkpoints/last.ckpt" if goes_on else None,
        weights_only=True,
    )
    names = task.trainable_names()
    return {name: tensor.clone() for name, tensor in task.state_dict().items() if name in names}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def history(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in record.items() if not name.endswith("_s")}
        for record in read_log(folder / "logging.jsonl")
    ]
