"""Two processes that share a model learn what two that replicate it do, and what one does."""

import os
import socket
from datetime import timedelta
from pathlib import Path

import lightning
import pytest
import torch.multiprocessing
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from torch.distributed.tensor import DTensor
from toy_task import trainer

from qwenvl_lit.callbacks.checkpoint import RunCheckpoint
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.metrics.exact_match import ExactMatch
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.optim import AdamW, StochasticAdamW
from qwenvl_lit.training.speed import Speed
from qwenvl_lit.training.strategies import FSDP2Strategy
from qwenvl_lit.types import Conversation, ImageSource, Turn

VISUAL = {
    "image_size": 16,
    "patch_size": 8,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "mlp_ratio": 2.0,
    "output_dim": 32,
    "n_queries": 4,
}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "intermediate_size": 64,
}
GLOO = {"process_group_backend": "gloo", "timeout": timedelta(seconds=60)}  # not to wait for ever
ADAPTERS = {"full": Full(), "lora": LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")}
ADAPTERS["language"] = LoRA(
    rank=2, alpha=4, dropout=0.0, targets=["c_attn"]
)  # nothing of the tower trains


def read(source: str, read_options) -> list[Conversation]:
    """A letter is a row, with an image where it is large."""
    rows = []
    for place, letter in enumerate(source):
        parts = (
            (ImageSource(Image.new("RGB", (9, 9), (10 * place, 0, 0))), letter)
            if letter.isupper()
            else (letter,)
        )
        rows.append(
            Conversation(
                id=letter,
                turns=(Turn(role="user", parts=parts), Turn(role="assistant", parts=("yes",))),
                index=place,
            )
        )
    return rows


def task_and_data(adapter: str, dtype: str = "float32") -> tuple[VisionLanguageModule, DataModule]:
    """Eight training rows, and three to validate, which two ranks cannot divide evenly."""
    made = VisionLanguageModule(
        family=QwenVLFamily(
            config={**SIZES, "visual": {**VISUAL, "resampler_heads": 2}},
            vocabulary="tiny",
            dtype=dtype,
        ),
        adapter=ADAPTERS[adapter],
        generation=Generation(max_new_tokens=3),
        metrics={"exact_match": ExactMatch()},
        optim=AdamW(lr=1e-2, warmup=0, schedule="constant_with_warmup"),
        speed=Speed(checkpointing="full"),
    )
    sizes = {
        "batch_size": 1,
        "eval_batch_size": 1,
        "generated_validation_rows": 3,
        "num_workers": 0,
    }
    return made, DataModule(
        processor=made.processor,
        read=read,
        train="ABcdEfGH",
        validation="IJk",
        test="LMn",
        order="staged",
        **sizes,
    )


class Watch(lightning.Callback):
    """What each step logs, and how much of the trained weights this rank holds."""

    def __init__(self):
        self.seen: list[dict[str, float]] = []
        self.held = self.whole = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trained = [tensor for tensor in module.parameters() if tensor.requires_grad]
        self.held = sum(
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()
            for tensor in trained
        )
        self.whole = sum(tensor.numel() for tensor in trained)
        self.seen.append(
            {
                name: float(value)
                for name, value in trainer.logged_metrics.items()
                if name.startswith("train/")
            }
        )

    def on_validation_end(self, trainer, module):
        self.seen.append(
            {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith("val/")
            }
        )


def fit(
    folder: Path, adapter: str, dtype: str = "float32", resume: Path | None = None, **options
) -> dict:
    lightning.seed_everything(0, verbose=False)  # adapters start at random
    watch, (task, data) = Watch(), task_and_data(adapter, dtype)
    loops = {
        "max_epochs": 1,
        "gradient_clip_val": 0.5,
        "val_check_interval": 2,
        "enable_checkpointing": True,
    }
    made = trainer(folder, watch, RunCheckpoint(every=1, keep=9), **loops, **options)
    made.fit(task, data, ckpt_path=resume, weights_only=True)
    stochastic = isinstance(made.optimizers[0], StochasticAdamW)
    return {"log": watch.seen, "held": watch.held, "whole": watch.whole, "stochastic": stochastic}


def run_rank(rank: int, folder: Path, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    found = {}
    for name, strategy, adapter, options in (
        ("ddp_full", DDPStrategy, "full", {}),
        ("fsdp_full", FSDP2Strategy, "full", {}),
        ("ddp_lora", DDPStrategy, "lora", {}),
        ("fsdp_lora", FSDP2Strategy, "lora", {}),
        ("ddp_language", DDPStrategy, "language", {}),
        ("fsdp_language", FSDP2Strategy, "language", {}),
        ("fsdp_bfloat16", FSDP2Strategy, "full", {"dtype": "bfloat16"}),
        (
            "resumed",
            FSDP2Strategy,
            "full",
            {"dtype": "bfloat16", "resume": folder / "fsdp_bfloat16/checkpoints/step_000001.ckpt"},
        ),
    ):
        found[name] = fit(folder / name, adapter, strategy=strategy(**GLOO), devices=2, **options)
    task, data = task_and_data("full")
    task.trained = folder / "fsdp_full/checkpoints/last.ckpt"
    [scores] = trainer(folder / "test", strategy=FSDP2Strategy(**GLOO), devices=2).test(
        task, data, verbose=False
    )
    torch.save({**found, "scores": scores}, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict]:
    """The folder of two processes, and what rank 0 found."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, args=(folder, port), nprocs=2)
    return folder, torch.load(folder / "rank0.pt")


def saved_weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_sharded_and_replicated_weights_learn_alike(runs, adapter):
    """Losses, gradient norms, validation losses and answers, with text on one rank and an image on the other."""
    ddp, fsdp = (runs[1][f"{strategy}_{adapter}"]["log"] for strategy in ("ddp", "fsdp"))
    assert len(ddp) == len(fsdp) == 4 + 2
    assert {"val/loss", "val/exact_match"} <= set().union(*ddp)
    for one, other in zip(ddp, fsdp, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    weights = [
        torch.load(runs[0] / f"{strategy}_{adapter}/checkpoints/last.ckpt", weights_only=True)[
            "state_dict"
        ]
        for strategy in ("ddp", "fsdp")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(
            tensor, weights[1][name], rtol=1e-3, atol=1e-4
        )  # Adam's first steps go by the sign of what may be noise


def test_each_rank_holds_half(runs):
    sharded, replicated = runs[1]["fsdp_full"], runs[1]["ddp_full"]
    assert sharded["whole"] == replicated["held"]
    assert sharded["held"] == pytest.approx(sharded["whole"] / 2, rel=0.05)


def test_bfloat16_weights_are_rounded_stochastically_and_go_on_as_if_not_stopped(runs):
    folder, found = runs
    assert found["fsdp_bfloat16"]["stochastic"]
    assert not found["fsdp_full"]["stochastic"]
    assert found["resumed"]["log"] == found["fsdp_bfloat16"]["log"][1:]
    resumed, whole = (saved_weights(folder / name) for name in ("resumed", "fsdp_bfloat16"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_what_was_sharded_is_tested_by_one_process_and_by_two(runs, tmp_path):
    task, data = task_and_data("full")
    task.trained = runs[0] / "fsdp_full/checkpoints/last.ckpt"
    [scores] = trainer(tmp_path).test(task, data, verbose=False)
    assert scores == runs[1]["scores"]
    assert scores["test/rows"] == 3
