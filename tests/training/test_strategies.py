"""FSDP trains like DDP in two processes; its checkpoints are those of one process."""

from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from tiny import CONFIG
from toy_task import trainer
from two_ranks import GLOO, on_two_ranks

from qwenvl_lit.callbacks.checkpoint import RunCheckpoint
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.metrics.exact_match import ExactMatch
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.optim import AdamW, StochasticAdamW, local_tensor
from qwenvl_lit.training.speed import Speed
from qwenvl_lit.training.strategies import FSDP2Strategy
from qwenvl_lit.types import Conversation, ImageSource, Turn

TWO_LAYERS = {
    **CONFIG,
    "num_hidden_layers": 2,
    "visual": {**CONFIG["visual"], "layers": 2},
}
ADAPTERS = {
    "full": Full(),
    "lora": LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear"),
    # Nothing of the vision tower trains
    "language": LoRA(rank=2, alpha=4, dropout=0.0, targets=["c_attn"]),
}


def read(source: str, read_options) -> list[Conversation]:
    """Each letter is a row; capital letters have an image."""
    rows = []
    for index, letter in enumerate(source):
        parts = [letter]
        if letter.isupper():
            parts.insert(0, ImageSource(Image.new("RGB", (9, 9), (10 * index, 0, 0))))
        turns = (
            Turn(role="user", parts=tuple(parts)),
            Turn(role="assistant", parts=("yes",)),
        )
        rows.append(Conversation(id=letter, turns=turns, index=index))
    return rows


def module_and_data(
    adapter: str, dtype: str = "float32", **options
) -> tuple[VisionLanguageModule, DataModule]:
    """Eight training rows, and three to validate, which two ranks cannot divide evenly."""
    module = VisionLanguageModule(
        family=QwenVLFamily(config=TWO_LAYERS, vocabulary="tiny", dtype=dtype),
        adapter=ADAPTERS[adapter],
        generation=Generation(max_new_tokens=3),
        metrics={"exact_match": ExactMatch()},
        optim=AdamW(lr=1e-2, warmup=0, schedule="constant"),
        speed=Speed(checkpointing="full"),
        **options,
    )
    data = DataModule(
        processor=module.processor,
        read=read,
        train="ABcdEfGH",
        validation="IJk",
        test="LMn",
        order="staged",
        batch_size=1,
        eval_batch_size=1,
        generated_validation_rows=3,
        num_workers=0,
    )
    return module, data


class Record(lightning.Callback):
    """Records what each step logs, and how many of the trained parameters this rank holds."""

    def __init__(self):
        self.logged: list[dict[str, float]] = []
        self.held = self.whole = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trained = [tensor for tensor in module.parameters() if tensor.requires_grad]
        self.held = sum(local_tensor(tensor).numel() for tensor in trained)
        self.whole = sum(tensor.numel() for tensor in trained)
        self.record(trainer.logged_metrics, "train/")

    def on_validation_end(self, trainer, module):
        self.record(trainer.callback_metrics, "val/")

    def record(self, metrics, prefix: str) -> None:
        chosen = [name for name in metrics if name.startswith(prefix)]
        self.logged.append({name: float(metrics[name]) for name in chosen})


def fit(
    folder: Path, adapter: str, dtype: str = "float32", resume: Path | None = None, **options
) -> dict:
    lightning.seed_everything(0, verbose=False)  # adapters are initialized at random
    record, (module, data) = Record(), module_and_data(adapter, dtype)
    fitting = trainer(
        folder,
        record,
        RunCheckpoint(every=1, keep=9),
        max_epochs=1,
        gradient_clip_val=0.5,
        val_check_interval=2,
        enable_checkpointing=True,
        **options,
    )
    fitting.fit(module, data, ckpt_path=resume, weights_only=True)
    return {
        "log": record.logged,
        "held": record.held,
        "whole": record.whole,
        "stochastic": isinstance(fitting.optimizers[0], StochasticAdamW),
        "mesh": tuple(fitting.strategy.device_mesh.shape) if "fsdp" in folder.name else None,
    }


def run_rank(rank: int, folder: Path) -> None:
    bfloat16 = {"dtype": "bfloat16"}
    resumed = {**bfloat16, "resume": folder / "fsdp_bfloat16/checkpoints/step_000001.ckpt"}
    results = {}
    for name, strategy, adapter, options in (
        ("ddp_full", DDPStrategy, "full", {}),
        ("fsdp_full", FSDP2Strategy, "full", {}),
        ("ddp_lora", DDPStrategy, "lora", {}),
        ("fsdp_lora", FSDP2Strategy, "lora", {}),
        ("ddp_language", DDPStrategy, "language", {}),
        ("fsdp_language", FSDP2Strategy, "language", {}),
        ("fsdp_bfloat16", FSDP2Strategy, "full", bfloat16),
        ("resumed", FSDP2Strategy, "full", resumed),
    ):
        results[name] = fit(folder / name, adapter, strategy=strategy(**GLOO), devices=2, **options)
    checkpoint = folder / "fsdp_full/checkpoints/last.ckpt"
    module, data = module_and_data("full", trained_checkpoint=checkpoint)
    testing = trainer(folder / "test", strategy=FSDP2Strategy(**GLOO), devices=2)
    [scores] = testing.test(module, data, verbose=False)
    torch.save({**results, "scores": scores}, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict]:
    """The folder of the runs of two processes, and the results of rank 0."""
    folder = tmp_path_factory.mktemp("two")
    on_two_ranks(run_rank, folder)
    return folder, torch.load(folder / "rank0.pt")


def saved_weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_fsdp_and_ddp_give_the_same_losses_norms_answers_and_weights(runs, adapter):
    """With text on one rank and an image on the other."""
    folder, results = runs
    ddp, fsdp = (results[f"{strategy}_{adapter}"]["log"] for strategy in ("ddp", "fsdp"))
    assert len(ddp) == len(fsdp) == 4 + 2
    assert {"val/loss", "val/exact_match"} <= set().union(*ddp)
    for expected, logged in zip(ddp, fsdp, strict=True):
        assert logged == pytest.approx(expected, rel=1e-4)
    ddp_weights, fsdp_weights = (
        saved_weights(folder / f"{strategy}_{adapter}") for strategy in ("ddp", "fsdp")
    )
    assert ddp_weights.keys() == fsdp_weights.keys()
    for name, tensor in ddp_weights.items():
        # Adam's first steps follow the sign of the gradient, which may be noise
        torch.testing.assert_close(tensor, fsdp_weights[name], rtol=1e-3, atol=1e-4)


def test_each_fsdp_rank_holds_half_of_the_parameters(runs):
    sharded, replicated = runs[1]["fsdp_full"], runs[1]["ddp_full"]
    assert sharded["whole"] == replicated["held"]
    assert sharded["held"] == pytest.approx(sharded["whole"] / 2, rel=0.05)


def test_all_ranks_are_one_data_parallel_group(runs):
    """The strategy sets a private attribute of Lightning's for this."""
    assert runs[1]["fsdp_full"]["mesh"] == (2, 1)


def test_bfloat16_weights_are_rounded_stochastically_and_resume_as_if_not_interrupted(runs):
    folder, results = runs
    assert results["fsdp_bfloat16"]["stochastic"]
    assert not results["fsdp_full"]["stochastic"]
    assert results["resumed"]["log"] == results["fsdp_bfloat16"]["log"][1:]
    resumed, whole = (saved_weights(folder / name) for name in ("resumed", "fsdp_bfloat16"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_an_fsdp_checkpoint_scores_the_same_in_one_process_and_in_two(runs, tmp_path):
    folder, results = runs
    checkpoint = folder / "fsdp_full/checkpoints/last.ckpt"
    module, data = module_and_data("full", trained_checkpoint=checkpoint)
    [scores] = trainer(tmp_path).test(module, data, verbose=False)
    assert scores == results["scores"]
    assert scores["test/rows"] == 3
