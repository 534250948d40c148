"""Batches of which every row was dropped, and the end of a run on a GPU."""

import math

import lightning
import pytest
import torch
from tiny import read_letters, tiny_family, tiny_task
from torch import nn
from toy_task import trainer

from qwenvl_lit.callbacks.run_log import RunLog
from qwenvl_lit.callbacks.throughput import Throughput
from qwenvl_lit.data.collate import empty_batch
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.metrics.boxes import MeanIoU
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.module import VisionLanguageModule


@pytest.mark.parametrize(
    "adapter",
    [Full(), LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")],
    ids=["full", "lora"],
)
def test_a_batch_without_rows_gives_every_trained_tensor_a_gradient_of_zero(adapter):
    module = tiny_task(adapter)
    loss = module.training_step(empty_batch(module.processor.pad_id, ("broken",)), 0)
    loss.backward()
    assert loss == 0
    for name, tensor in module.named_parameters():
        if tensor.requires_grad:
            assert tensor.grad is not None, name
            assert not tensor.grad.any(), name


def test_a_model_on_a_gpu_is_not_moved_to_the_host_at_the_end_of_a_run(monkeypatch):
    moved = []
    monkeypatch.setattr(nn.Module, "cpu", lambda module: moved.append(module))
    choices = {"adapter": None, "generation": Generation(), "metrics": {}}
    on_cpu = VisionLanguageModule(family=tiny_family(), **choices)
    on_gpu = VisionLanguageModule(family=tiny_family(), **choices, load_device="cuda")
    on_cpu.cpu()
    assert on_gpu.cpu() is on_gpu
    assert moved == [on_cpu]


def test_an_unloaded_model_is_loaded_again():
    module = tiny_task(Full())
    before = module.model
    module.configure_model()
    assert module.model is before
    module.unload_model()
    assert module.model is None
    module.configure_model()
    after = module.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.state_dict().items())


@pytest.mark.parametrize("rows", [2, 4])
def test_a_validation_without_a_score_names_the_key_that_answers_more_rows(tmp_path, caplog, rows):
    module = tiny_task(Full())
    module.metrics = nn.ModuleDict({"iou": MeanIoU()})  # no row has a box
    data = DataModule(
        processor=module.processor,
        read=read_letters,
        train="abcd",
        validation="ef" * 2,
        generated_validation_rows=rows,
    )
    trainer(tmp_path, max_epochs=1).fit(module, data)
    [warning] = [text for text in caplog.messages if "iou" in text]
    advice = "; answer more than 2 of the 4 validation rows: data.generated_validation_rows=N"
    assert warning.startswith("val/iou: ")
    assert warning.endswith(advice if rows == 2 else "they have no expected box")


def test_scores_that_no_row_of_a_set_counts_in_are_one_warning(tmp_path, caplog):
    module = tiny_task(Full())
    module.metrics = nn.ModuleDict({"iou": MeanIoU(where={"task": "find"})})
    data = DataModule(
        processor=module.processor, read=read_letters, test={"first": "ab", "second": "c"}
    )
    trainer(tmp_path).test(module, data, verbose=False)
    assert [text for text in caplog.messages if "iou" in text] == [
        "scores without any row are nan: first/iou (task=find), second/iou (task=find)"
    ]


def test_training_and_testing_skip_batches_without_rows(tmp_path):
    module = tiny_task(Full())
    data = DataModule(
        processor=module.processor,
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

    class Losses(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    fit = trainer(tmp_path, Losses(), Throughput(), RunLog(), max_epochs=1)
    fit.fit(module, data)
    scores = fit.callback_metrics
    assert scores["val/perplexity"].item() == pytest.approx(math.exp(scores["val/loss"]), rel=1e-5)
    assert 0 <= scores["val/token_accuracy"] <= 1
    assert sorted(loss > 0 for loss in losses) == [False, False, True, True]
    test = trainer(tmp_path)
    test.test(module, data, verbose=False)
    assert test.callback_metrics["test/rows"] == 2
    assert torch.isfinite(torch.tensor(losses)).all()
