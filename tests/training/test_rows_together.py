"""How many rows are evaluated together on which device, and when compiling the decoder pays."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from qwenvl_lit.data.evaluation_batches import BatchChoice, EvaluationPlan, RowSizes
from qwenvl_lit.generation.compilation import seconds_saved
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training import rows_together
from qwenvl_lit.training.rows_together import (
    batch_lines,
    choose_rows,
    compilation_saves,
    state_to_come,
)
from qwenvl_lit.training.strategies import DeviceMapStrategy

GIB = 2**30


@pytest.fixture(scope="module")
def family() -> QwenVLFamily:
    """The published sizes, without weights."""
    return QwenVLFamily(
        path="Qwen/Qwen-VL-Chat", weights="random", vocabulary="tiny", dtype="bfloat16"
    )


def prompts(rows: int = 1000, tokens: int = 300, **options) -> RowSizes:
    sizes = {"supervised": 0, "image_tokens": 256, "answered": True, "options": False, **options}
    return RowSizes(rows=rows, tokens=tokens, **sizes)


def trainer_on(device: str = "cuda", strategy=None, fn: str = "predict") -> SimpleNamespace:
    strategy = strategy or SingleDeviceStrategy(device=torch.device(device))
    devices = {"num_devices": 1, "num_nodes": 1}
    return SimpleNamespace(
        strategy=strategy, state=SimpleNamespace(fn=fn), optimizers=[], **devices
    )


def chosen(
    family, monkeypatch, sizes: RowSizes, gib: float, trainer=None, **generation
) -> tuple[int, str]:
    monkeypatch.setattr(rows_together, "free_memory", lambda device: gib * GIB)
    choice = choose_rows(
        sizes,
        model=nn.Linear(2, 2).requires_grad_(False),
        family=family,
        generation=Generation(**generation),
        trainer=trainer or trainer_on(),
    )
    return choice.rows, choice.reason


ENOUGH, MEMORY = "more are hardly faster", "more do not fit into GPU memory"


def test_a_large_gpu_answers_128_rows(family, monkeypatch):
    assert chosen(family, monkeypatch, prompts(), 110) == (128, ENOUGH)
    assert chosen(family, monkeypatch, prompts(rows=20), 110) == (20, "all rows of a process")


@pytest.mark.parametrize(
    ("sizes", "gib", "generation", "rows"),
    [
        # 24 GB: 5 GiB are free beside the weights. The cache takes 0.5 MiB per token and row.
        (prompts(), 5, {"max_new_tokens": 512}, 8),
        (prompts(), 5, {"max_new_tokens": 20}, 16),
        (prompts(tokens=1500), 5, {"max_new_tokens": 20}, 4),
        (prompts(), 5, {"max_new_tokens": 512, "num_beams": 4}, 2),
        (prompts(), 20, {"max_new_tokens": 512}, 40),
        (prompts(), 0, {}, 1),
    ],
)
def test_memory_limits_the_rows(family, monkeypatch, sizes, gib, generation, rows):
    assert chosen(family, monkeypatch, sizes, gib, **generation) == (rows, MEMORY)


def test_fewer_rows_than_fit_are_all_of_them(family, monkeypatch):
    assert chosen(family, monkeypatch, prompts(rows=7), 5, max_new_tokens=512)[0] == 7


def test_a_loss_is_computed_for_as_many_rows_as_keep_the_gpu_busy(family, monkeypatch):
    rows = {"answered": False, "supervised": 16}
    trainer = trainer_on(fn="fit")
    for tokens, expected in [(32, 128), (320, 48), (2048, 8), (20_000, 1)]:
        sizes = prompts(tokens=tokens, **rows)
        assert chosen(family, monkeypatch, sizes, 60, trainer) == (expected, ENOUGH)
    assert chosen(family, monkeypatch, prompts(tokens=320, **rows), 2, trainer) == (16, MEMORY)


def test_validation_leaves_gradients_and_optimizer_states_their_memory():
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(10, 10))
    model[1].requires_grad_(False)
    trainer = trainer_on(fn="fit")
    optimizer = torch.optim.AdamW(model[0].parameters())
    trainer.optimizers = [optimizer]
    weight = 4 * 100 * 100
    assert state_to_come(model, trainer) == 3 * weight
    model[0].weight.grad = torch.zeros(100, 100)
    assert state_to_come(model, trainer) == 2 * weight
    optimizer.step()
    assert state_to_come(model, trainer) == 0
    model[0].weight.grad = None  # between two steps
    assert state_to_come(model, trainer) == weight
    assert state_to_come(model, trainer_on()) == 0


def test_a_cpu_answers_few_rows_unless_the_model_is_small(family, monkeypatch):
    on_cpu = trainer_on("cpu")
    assert chosen(family, monkeypatch, prompts(), 0, on_cpu) == (128, "a small model on a CPU")
    monkeypatch.setattr(rows_together, "SMALL_MODEL", 4)
    assert chosen(family, monkeypatch, prompts(), 0, on_cpu) == (8, "on a CPU")


def test_a_model_that_is_spread_over_devices_answers_few_rows(family, monkeypatch):
    strategy = DeviceMapStrategy()
    strategy._root_device = torch.device("cuda")
    spread = trainer_on(strategy=strategy)
    expected = (8, "the model is spread over devices")
    assert chosen(family, monkeypatch, prompts(), 110, spread) == expected


def plan(rows: int, reason: str, prompt_tokens: int = 0, answers: tuple = ()) -> EvaluationPlan:
    return EvaluationPlan(
        indices=[],
        batches=BatchChoice(rows=rows, reason=reason),
        prompt_tokens=prompt_tokens,
        answer_tokens=answers,
    )


def test_the_lines_name_sets_only_if_their_batches_differ():
    plans = {"easy": plan(128, ENOUGH), "hard": plan(128, ENOUGH)}
    [line] = batch_lines(plans)
    assert line == f"Batches of 128 rows: {ENOUGH} (data.eval_batch_size=auto)"
    lines = list(batch_lines({**plans, "long": plan(1, MEMORY), "given": plan(3, "")}))
    assert lines == [
        f"Batches of 128 rows of easy, hard: {ENOUGH} (data.eval_batch_size=auto)",
        f"Batches of 1 row of long: {MEMORY} (data.eval_batch_size=auto)",
    ]


@pytest.mark.parametrize(
    ("rows", "batch", "tokens", "pays"),
    [
        (1_000, 128, 20, False),  # 2 s
        (20_000, 128, 20, True),  # 38 s
        (1_000, 8, 400, True),  # 65 s of 50,000 steps
        (1_000, 128, 400, False),  # 4 s of 3,200 steps
        (1, 1, 512, False),
    ],
)
def test_the_decoder_is_compiled_if_the_rows_save_more_than_it_takes(rows, batch, tokens, pays):
    batches = -(-rows // batch)
    plans = {"test": plan(batch, ENOUGH, 300 * rows, (tokens,) * batches)}
    assert (compilation_saves(plans, Generation()) > 0) == pays


def test_answers_are_as_long_as_the_settings_allow_and_options_take_no_step():
    limits = {"min_new_tokens": 10, "max_new_tokens": 100}
    steps = (10, 100, 50, 0)
    expected = sum(steps) * 1.3e-3
    assert seconds_saved(0, (1, 500, 50, 0), **limits) == pytest.approx(expected)
    assert seconds_saved(1_000_000, (), **limits) == pytest.approx(5.7)


def test_beams_are_not_decoded_by_the_decoder():
    plans = {"test": plan(8, ENOUGH, 10**9, (500,) * 1000)}
    assert compilation_saves(plans, Generation(num_beams=2)) < 0
