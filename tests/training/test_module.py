"""What a step does with a batch of which every row was dropped."""

import math

import lightning
import pytest
import torch
from tiny import read_letters, tiny_task
from torch import nn
from toy_task import trainer

from qwenvl_lit.callbacks.run_log import RunLog
from qwenvl_lit.callbacks.throughput import Throughput
from qwenvl_lit.data.collate import nothing
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.training.adapters.methods import Full, LoRA


@pytest.mark.parametrize(
    "adapter",
    [Full(), LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")],
    ids=["full", "lora"],
)
def test_a_batch_without_rows_gives_every_trained_tensor_a_gradient_of_zero(adapter):
    made = tiny_task(adapter)
    loss = made.training_step(nothing(made.processor.pad_id, ("broken",)), 0)
    loss.backward()
    assert loss == 0
    for name, tensor in made.named_parameters():
        if tensor.requires_grad:
            assert tensor.grad is not None, name
            assert not tensor.grad.any(), name


def test_the_end_of_a_run_on_a_gpu_calls_nothing_to_the_host(monkeypatch):
    made, moved = tiny_task(Full()), []
    monkeypatch.setattr(nn.Module, "cpu", lambda module: moved.append(module))
    made.cpu()
    assert moved == [made]
    made.home = torch.device("cuda")
    assert made.cpu() is made
    assert len(moved) == 1


def test_loops_pass_over_batches_without_rows(tmp_path):
    made = tiny_task(Full())
    data = DataModule(
        processor=made.processor,
        read=read_letters,
        train="ABcd",
        validation="EFgh",
        test="IJkl",
        order="staged",
        batch_size=1,
        eval_batch_size=2,
        generated_validation_rows=4,
        on_bad_image="drop",
        max_bad_fraction=0.5,
    )
    losses: list[float] = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    trained = trainer(tmp_path, Watch(), Throughput(), RunLog(), max_epochs=1)
    trained.fit(made, data)
    held_out = trained.callback_metrics
    assert held_out["val/perplexity"].item() == pytest.approx(
        math.exp(held_out["val/loss"]), rel=1e-5
    )
    assert 0 <= held_out["val/token_accuracy"] <= 1
    assert sorted(loss > 0 for loss in losses) == [False, False, True, True]
    tested = trainer(tmp_path)
    tested.test(made, data, verbose=False)
    assert tested.callback_metrics["test/rows"] == 2
    assert torch.isfinite(torch.tensor(losses)).all()
