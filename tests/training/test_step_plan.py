"""How many rows the micro-batches of a GPU have, from estimates; no weights are loaded."""

import numpy as np
import pytest
from tiny import tiny_family

from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.adapters.methods import LoRA
from qwenvl_lit.training.memory import GIB, fits
from qwenvl_lit.training.step_plan import EFFICIENT_TOKENS, StepPlan, _costs_of_rows, plan_step

LANGUAGE = LoRA(rank=8, alpha=32, dropout=0.05, targets="attention")
EVERYWHERE = LoRA(rank=8, alpha=32, dropout=0.05, targets="all-linear")


def even_rows(tokens: int = 320, targets: int = 16, image_tokens: int = 256) -> np.ndarray:
    return np.repeat(np.array([[tokens], [targets], [image_tokens]]), 100, axis=1)


@pytest.fixture(scope="module")
def models():
    """Networks of full size on the meta device, by adapter, and the plans made so far."""
    options = {"weights": "random", "vocabulary": "tiny", "dtype": "bfloat16"}
    family = QwenVLFamily(path="Qwen/Qwen-VL-Chat", **options)
    networks = {}
    for adapter in (LANGUAGE, EVERYWHERE):
        networks[adapter] = adapter.apply(family.meta_model(), family).train()
    return family, networks, {}


def plan(models, gib: float, sizes=None, *, adapter=LANGUAGE, **options) -> StepPlan:
    family, networks, plans = models
    options = {"checkpointing": "auto", "same_count": False, "compiled": True, **options}
    sizes = even_rows() if sizes is None else sizes
    key = (gib, adapter, *sorted(options.items()), sizes.tobytes())
    if key not in plans:
        plans[key] = plan_step(networks[adapter], family, sizes, 16, gib * GIB, **options)
    return plans[key]


def test_a_large_gpu_takes_a_whole_step_without_recomputation(models):
    large = plan(models, 80)
    assert large.checkpointed == []
    assert large.is_one_batch
    assert large.most_tokens == 16 * 320
    assert 36 * GIB < large.estimate.total < 46 * GIB  # measured: 37.1 GiB on an H200


def test_the_vision_tower_costs_memory_only_if_it_is_trained(models):
    assert plan(models, 139).costs.per_image_token == 0
    assert plan(models, 139, adapter=EVERYWHERE).costs.per_image_token > 8 * 2**20
    text_only = plan(models, 139, even_rows(image_tokens=0), adapter=EVERYWHERE)
    assert text_only.estimate.total < plan(models, 139, adapter=EVERYWHERE).estimate.total / 2


def test_rows_of_equal_length_cost_more_if_more_of_their_tokens_are_of_images(models):
    sizes = even_rows()
    sizes[2, :8] = 40, 80, 120, 160, 200, 240, 280, 300
    costs = _costs_of_rows(plan(models, 139, adapter=EVERYWHERE).costs, sizes)
    per_image_token = (costs[0] - costs[1]) / 20
    assert costs[0] - costs[-1] == pytest.approx(260 * per_image_token)
    assert per_image_token > 8 * 2**20
    assert (np.diff(costs) <= 0).all()


def test_a_smaller_gpu_recomputes_as_few_blocks_as_efficient_micro_batches_need(models):
    few = plan(models, 32)
    assert not few.is_one_batch
    assert 0 < len(few.checkpointed) < 32
    assert few.most_tokens >= EFFICIENT_TOKENS
    assert fits(few.estimate, 32 * GIB)
    assert len(plan(models, 24).checkpointed) > len(few.checkpointed)


def test_recomputation_can_be_chosen(models):
    none = plan(models, 24, checkpointing="none")
    assert none.checkpointed == []
    assert none.most_tokens < EFFICIENT_TOKENS
    assert len(plan(models, 80, checkpointing="full").checkpointed) == 32


def test_the_largest_row_fits_alone_although_others_are_short(models):
    sizes = even_rows()
    sizes[:2, 0] = 6000, 16
    mixed = plan(models, 40, sizes)
    assert mixed.max_bytes >= mixed.costs.of(tokens=6000, image_tokens=256, targets=16)
    assert fits(mixed.estimate, 40 * GIB)


def test_long_answers_cost_memory(models):
    short, long = plan(models, 80), plan(models, 80, even_rows(targets=300))
    assert long.estimate.total > short.estimate.total + 3 * GIB  # 4,544 logits of 151,936


def test_all_ranks_of_fsdp_get_the_same_number_of_micro_batches(models):
    options = {"same_count": True, "sharding": "fsdp", "gpus": 2, "checkpointing": "none"}
    assert plan(models, 80, **options).count == 1
    small = plan(models, 24, **options)
    assert small.count > 1
    rows = -(-16 // small.count)
    assert small.estimate.activations < plan(models, 80, **options).estimate.activations
    assert rows * small.costs.of(tokens=320, image_tokens=256, targets=16) <= small.max_bytes


def test_a_short_context_leaves_no_image_to_probe():
    family = tiny_family(max_length=40)
    model = LANGUAGE.apply(family.meta_model(), family).train()
    sizes = even_rows(tokens=30, image_tokens=0)
    options = {"checkpointing": "none", "same_count": False, "compiled": False}
    assert plan_step(model, family, sizes, 4, GIB, **options).most_tokens == 4 * 30
