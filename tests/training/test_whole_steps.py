"""`data.batch_size=auto`: a step of 4 rows gives the results of 4 batches of one row."""

import math
from functools import partial

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from tiny import tiny_family
from toy_task import trainer
from two_ranks import GLOO, on_two_ranks

from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.micro_batches import ActivationCosts
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.optim import AdamW
from qwenvl_lit.training.strategies import FSDP2Strategy
from qwenvl_lit.types import Conversation, ImageSource, Turn

LORA = LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")
ONE_BY_ONE = {"batch_size": 1}
AUTO = {"batch_size": "auto", "rows_per_step": 4}
EPOCHS = 2
ROWS = "abcdefghijk"  # a last step of three rows


class History(lightning.Callback):
    """Records the loss and the gradient norm of each optimizer step, and limits micro-batches."""

    def __init__(self, limit: dict | None = None):
        self.limit = limit
        self.steps = []
        self.micro_batches = []

    def setup(self, trainer, pl_module, stage):
        if self.limit is not None:
            options = {"count": None, "most_tokens": None, **self.limit}
            trainer.datamodule.cut_steps(ActivationCosts(), **options)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if isinstance(batch, list):
            self.micro_batches.append([len(part.conversations) for part in batch])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        if step > len(self.steps):
            logged = trainer.callback_metrics
            self.steps.append([logged[f"train/{name}"].item() for name in ("loss", "grad_norm")])


def read(source: str, read_options) -> list[Conversation]:
    """Makes each letter a row of another length; every third has no image."""
    rows = []
    for index, letter in enumerate(source):
        question = [letter * (1 + index * index % 7)]
        if index % 3:
            question.insert(0, ImageSource(Image.new("RGB", (9, 9), (index * 20, 0, 0))))
        turns = (
            Turn(role="user", parts=tuple(question)),
            Turn(role="assistant", parts=(letter * (1 + index % 4),)),
        )
        rows.append(Conversation(id=letter, turns=turns, index=index))
    return rows


def train(folder, history: History, batching, *, adapter=LORA, patch=None, **options):
    """Trains two epochs; returns the trained tensors."""
    torch.manual_seed(3)
    module = VisionLanguageModule(
        family=tiny_family(),
        adapter=adapter,
        generation=Generation(max_new_tokens=2),
        metrics={},
        optim=AdamW(lr=1e-2, warmup=0),
    )
    if patch:
        patch(module)
    data = DataModule(processor=module.processor, read=read, train=ROWS, **batching)
    accumulated = 4 if batching == ONE_BY_ONE else 1
    options = {"max_epochs": EPOCHS, "accumulate_grad_batches": accumulated, **options}
    trainer(folder, history, gradient_clip_val=1.0, **options).fit(module, data)
    tensors = {}
    for name, tensor in module.named_parameters():
        if tensor.requires_grad:
            tensors[name] = getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)().detach()
    return tensors


def assert_same(history: History, tensors, expected_history: History, expected) -> None:
    # Float32 sums in another order
    torch.testing.assert_close(
        torch.tensor(history.steps), torch.tensor(expected_history.steps), rtol=1e-4, atol=1e-6
    )
    for name in expected:
        torch.testing.assert_close(tensors[name], expected[name], rtol=1e-3, atol=2e-5)


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    history = History()
    return history, train(tmp_path_factory.mktemp("one"), history, ONE_BY_ONE)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("max_bytes", [math.inf, 80, 1], ids=["one", "several", "single rows"])
def test_a_step_has_the_results_of_batches_of_one_row(packed, max_bytes, one_by_one, tmp_path):
    history = History({"packed": packed, "max_bytes": max_bytes})
    tensors = train(tmp_path, history, AUTO)
    assert_same(history, tensors, *one_by_one)
    assert [sum(sizes) for sizes in history.micro_batches] == [4, 4, 3] * EPOCHS
    expected = {math.inf: [[4], [4], [3]] * EPOCHS, 1: [[1] * 4, [1] * 4, [1] * 3] * EPOCHS}
    if max_bytes in expected:
        assert history.micro_batches == expected[max_bytes]
    else:
        assert any(1 < len(sizes) < 4 for sizes in history.micro_batches)


def test_rows_per_step_are_one_by_default(tmp_path):
    history = History()
    train(tmp_path, history, {"batch_size": "auto"})
    assert history.micro_batches == [[1]] * len(ROWS) * EPOCHS


STRATEGIES = {
    "ddp": (partial(DDPStrategy, **GLOO), LORA),
    "fsdp": (partial(FSDP2Strategy, **GLOO), Full()),
}
LIMITS = {
    "ddp": {"packed": False, "max_bytes": 50},
    "fsdp": {"packed": False, "max_bytes": 50, "count": 3},
}


def rank_of_two(rank: int, folder, *, name: str) -> None:
    strategy, adapter = STRATEGIES[name]
    results = []
    for batching, limit in ((ONE_BY_ONE, None), (AUTO, LIMITS[name])):
        history = History(limit)
        tensors = train(folder, history, batching, adapter=adapter, strategy=strategy(), devices=2)
        results.append((history.steps, tensors, history.micro_batches))
    torch.save(results, folder / f"{rank}.pt")


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_step_of_two_ranks_has_the_results_of_batches_of_one_row(name, tmp_path):
    on_two_ranks(partial(rank_of_two, name=name), tmp_path)
    for rank in (0, 1):
        one_by_one, auto = torch.load(tmp_path / f"{rank}.pt")
        assert len(auto[0]) == 2 * EPOCHS  # six rows for each rank, four in a step
        torch.testing.assert_close(
            torch.tensor(auto[0]), torch.tensor(one_by_one[0]), rtol=1e-4, atol=1e-6
        )
        for tensor, expected in zip(auto[1].values(), one_by_one[1].values(), strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=2e-5)
        if name == "fsdp":
            assert {len(sizes) for sizes in auto[2]} == {3}  # empty ones where rows are few


# -- Out of memory ---------------------------------------------------------------------------------


def out_of_memory_above(rows: int, module: VisionLanguageModule) -> None:
    """Makes `module` run out of memory in micro-batches of more rows, after a part of the step."""
    loss = module._loss

    def limited(batch):
        if len(batch.conversations) > rows:
            loss(batch).backward()  # a backward pass that fails leaves a part of its gradients
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(batch)

    module._loss = limited


def test_out_of_memory_halves_the_micro_batch_and_changes_no_result(one_by_one, tmp_path, caplog):
    history = History()
    tensors = train(tmp_path, history, AUTO, patch=partial(out_of_memory_above, 2))
    assert_same(history, tensors, *one_by_one)
    records = [record for record in caplog.records if record.name.endswith("whole_steps")]
    messages = [record.getMessage() for record in records]
    assert messages == [
        "the GPU ran out of memory with 4 rows in a micro-batch: continuing with half of that"
    ]


def rank_out_of_memory(rank: int, folder) -> None:
    results = []
    for patch in (None, partial(out_of_memory_above, 1) if rank else None):
        history = History()
        strategy = DDPStrategy(**GLOO)
        tensors = train(folder, history, AUTO, patch=patch, strategy=strategy, devices=2)
        results.append((history.steps, tensors))
    torch.save(results, folder / f"{rank}.pt")


def test_one_rank_may_run_out_of_memory(tmp_path):
    on_two_ranks(rank_out_of_memory, tmp_path)
    for rank in (0, 1):
        undisturbed, halved = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(
            torch.tensor(halved[0]), torch.tensor(undisturbed[0]), rtol=1e-4, atol=1e-6
        )


def test_out_of_memory_with_a_single_row_ends_the_run(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        train(tmp_path, History(), AUTO, patch=partial(out_of_memory_above, 0))
