"""What a step does with a batch of which every row was dropped."""

import math

import lightning
import pytest
import torch
from PIL import Image
from torch import nn
from toy_task import trainer

from qwenvl_lit.callbacks.run_log import RunLog
from qwenvl_lit.callbacks.throughput import Throughput
from qwenvl_lit.data.collate import nothing
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.metrics.exact_match import ExactMatch
from qwenvl_lit.models.qwen_vl.family import QwenVL
from qwenvl_lit.training.adapters import Full, LoRA
from qwenvl_lit.training.module import Task
from qwenvl_lit.training.optim import AdamW
from qwenvl_lit.types import Conversation, Picture, Turn

VISUAL = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2, "mlp_ratio": 2.0, "output_dim": 32, "n_queries": 4}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "kv_channels": 16, "intermediate_size": 64}


def task(adapter, **options) -> Task:
    made = Task(
        family=QwenVL(config={**SIZES, "visual": {**VISUAL, "resampler_heads": 2}}, vocabulary="tiny", **options),
        adapter=adapter,
        generation=Generation(max_new_tokens=2),
        metrics={"exact_match": ExactMatch()},
        optim=AdamW(lr=1e-3),
    )
    made.configure_model()
    return made


def read(source: str, reading) -> list[Conversation]:
    """A letter is a row with a picture, which cannot be opened where the letter is large."""
    rows = []
    for place, letter in enumerate(source):
        picture = Picture(b"no picture") if letter.isupper() else Picture(Image.new("RGB", (9, 9)))
        turns = (Turn(role="user", parts=(picture, letter)), Turn(role="assistant", parts=("yes",)))
        rows.append(Conversation(id=letter, turns=turns, index=place))
    return rows


@pytest.mark.parametrize("adapter", [Full(), LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")], ids=["full", "lora"])
def test_a_batch_without_rows_gives_every_trained_tensor_a_gradient_of_zero(adapter):
    made = task(adapter)
    loss = made.training_step(nothing(made.processor.pad_id, ("broken",)), 0)
    loss.backward()
    assert loss == 0
    for name, tensor in made.named_parameters():
        if tensor.requires_grad:
            assert tensor.grad is not None, name
            assert not tensor.grad.any(), name


def test_the_end_of_a_run_on_a_gpu_calls_nothing_to_the_host(monkeypatch):
    made, moved = task(Full()), []
    monkeypatch.setattr(nn.Module, "cpu", lambda module: moved.append(module))
    made.cpu()
    assert moved == [made]
    made.home = torch.device("cuda")
    assert made.cpu() is made
    assert len(moved) == 1


def test_loops_pass_over_batches_without_rows(tmp_path):
    made = task(Full())
    data = DataModule(
        processor=made.processor,
        read=read,
        train="ABcd",
        validation="EFgh",
        test="IJkl",
        order="staged",
        batch_size=1,
        eval_batch_size=2,
        generated_validation_rows=4,
        on_bad_picture="drop",
        max_bad_fraction=0.5,
    )
    losses: list[float] = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    trained = trainer(tmp_path, Watch(), Throughput(), RunLog(), max_epochs=1)
    trained.fit(made, data)
    held_out = trained.callback_metrics
    assert held_out["val/perplexity"].item() == pytest.approx(math.exp(held_out["val/loss"]), rel=1e-5)
    assert 0 <= held_out["val/token_accuracy"] <= 1
    assert sorted(loss > 0 for loss in losses) == [False, False, True, True]
    tested = trainer(tmp_path)
    tested.test(made, data, verbose=False)
    assert tested.callback_metrics["test/rows"] == 2
    assert torch.isfinite(torch.tensor(losses)).all()
