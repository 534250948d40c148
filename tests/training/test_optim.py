from copy import deepcopy

import pytest
import torch
from small_network import small_network, talk_of_two
from torch import nn

from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.optim import AdamW, StochasticAdamW, noise, round_stochastically


def test_matrices_decay_and_vectors_do_not():
    optimizer, _ = AdamW(lr=1.0, weight_decay=0.1).build(nn.Linear(3, 2), total_steps=10)
    decays = {
        tuple(tensor.shape): group["weight_decay"]
        for group in optimizer.param_groups
        for tensor in group["params"]
    }
    assert decays == {(2, 3): 0.1, (2,): 0.0}


@pytest.mark.parametrize("warmup", [4, 0.4])
def test_the_rate_rises_linearly_and_falls_as_a_cosine_to_zero(warmup):
    optimizer, schedule = AdamW(lr=1.0, warmup=warmup).build(nn.Linear(2, 2), total_steps=10)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert rates[7] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(0.0, abs=1e-9)


def test_frozen_tensors_are_left_out():
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    optimizer, _ = AdamW(lr=1.0).build(model, total_steps=10)
    assert [tuple(t.shape) for group in optimizer.param_groups for t in group["params"]] == [(2,)]
    before = model.weight.clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, before)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing is trainable"):
        AdamW(lr=1.0).build(nn.Linear(2, 2).requires_grad_(False), total_steps=10)


def test_parts_have_their_own_rate_and_the_innermost_part_counts():
    model, parts = small_network(), QwenVLFamily.components
    optimizer, _ = AdamW(lr=1.0, component_lr={"vision": 0.1, "resampler": 0.3}, warmup=0).build(
        model, 10, parts
    )
    rates = {
        id(tensor): group["lr"] for group in optimizer.param_groups for tensor in group["params"]
    }
    assert len(rates) == len(list(model.parameters()))
    tower = model.transformer.visual
    for rate, tensor in (
        (0.1, tower.conv1.weight),
        (0.1, tower.proj),
        (0.3, tower.attn_pool.ln_q.bias),
        (1.0, model.lm_head.weight),
    ):
        assert rates[id(tensor)] == rate
    assert {group["part"] for group in optimizer.param_groups} == {None, "vision", "resampler"}


def test_a_rate_for_a_part_that_is_missing_or_frozen_is_an_error():
    model = small_network()
    with pytest.raises(ValueError, match=r"no part tower; its parts are vision, "):
        AdamW(lr=1.0, component_lr={"tower": 0.1}).build(model, 10, QwenVLFamily.components)
    model.transformer.visual.requires_grad_(False)
    with pytest.raises(ValueError, match="trains nothing of vision"):
        AdamW(lr=1.0, component_lr={"vision": 0.1}).build(model, 10, QwenVLFamily.components)


@pytest.mark.parametrize("sign", [1, -1])
def test_stochastic_rounding_is_right_on_average_and_keeps_what_is_exact(sign):
    lower, upper = 1.0, 1.0 + 2**-7  # neighbours in bfloat16
    values = torch.full((100_000,), sign * (lower + 0.25 * (upper - lower)))
    rounded = round_stochastically(values, 5).float() * sign
    assert set(rounded.unique().tolist()) == {lower, upper}
    assert (rounded == upper).float().mean() == pytest.approx(0.25, abs=0.01)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_stochastically(exact.float()), exact)


def test_noise_is_uniform_and_neither_places_nor_seeds_go_together():
    like = torch.empty(1 << 18)
    one, other = (noise(like, seed).double() / 65536 for seed in (5, 6))
    assert one.min() >= 0
    assert one.max() < 1
    shares = torch.histc(one, bins=16, min=0, max=1) / len(one)
    assert shares.tolist() == pytest.approx([1 / 16] * 16, rel=0.03)
    centred, moved = one - 0.5, other - 0.5
    for shift in (
        1,
        2,
        64,
    ):  # of a product of two that are independent, the mean is 0 and the deviation 1/12 over the root of their number
        assert abs((centred[shift:] * centred[:-shift]).mean()) < 5 / 12 / len(one) ** 0.5
    assert abs((centred * moved).mean()) < 5 / 12 / len(one) ** 0.5
    assert torch.equal(noise(like, torch.tensor(5, dtype=torch.int32)), noise(like, 5))


def test_a_compiled_step_is_the_step(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend="aot_eager"))
    found = []
    for compiled in (False, True):
        model = small_network().bfloat16().train()
        optimizer, _ = AdamW(lr=1e-3, warmup=0).build(model, 10, compile=compiled)
        steps_of(model, optimizer, 3)
        found.append(model)
    assert all(map(torch.equal, found[0].parameters(), found[1].parameters()))


def steps_of(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> float:
    """Mean loss of the last ten of `count` steps on the same two rows, in bfloat16 arithmetic."""
    batch, losses = talk_of_two(), []
    for _ in range(count):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-10:]).mean())


def test_at_small_rates_bfloat16_weights_learn_like_float32_ones_only_with_stochastic_rounding():
    found = {}
    for name, dtype, rounding in (
        ("float32", torch.float32, "nearest"),
        ("stochastic", torch.bfloat16, "stochastic"),
        ("nearest", torch.bfloat16, "nearest"),
    ):
        model = small_network().bfloat16().to(dtype).train()
        settings = {
            "lr": 1e-5,
            "warmup": 0,
            "schedule": "constant_with_warmup",
            "rounding": rounding,
        }
        found[name] = steps_of(model, AdamW(**settings).build(model, 200)[0], 200)
    assert found["stochastic"] == pytest.approx(found["float32"], rel=0.02)
    assert found["nearest"] > 1.2 * found["float32"]


def with_gradients(model: nn.Module, value: float | None = None) -> nn.Module:
    """The same numbers whenever it is asked, or `value`."""
    torch.manual_seed(1)
    for tensor in model.parameters():
        tensor.grad = torch.randn_like(tensor) if value is None else torch.full_like(tensor, value)
    return model


@pytest.mark.parametrize("chunk", [7, 2**24])
def test_without_rounding_it_is_the_adamw_of_torch(monkeypatch, chunk):
    monkeypatch.setattr(
        "qwenvl_lit.training.optim.CHUNK", chunk
    )  # tensors are cut, and put together
    ours = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4))
    theirs = deepcopy(ours)
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = (
        StochasticAdamW(ours.parameters(), **settings),
        torch.optim.AdamW(theirs.parameters(), **settings),
    )
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            with_gradients(model)
            optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    assert all(tensor.grad is None for tensor in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_finite_changes_nothing(dtype):
    model = nn.Linear(3, 2).to(dtype)
    optimizer, _ = AdamW(lr=0.1, warmup=0).build(model, 10)

    def everything() -> list[torch.Tensor]:
        states = [
            tensor
            for state in optimizer.state_dict()["state"].values()
            for tensor in state.values()
        ]
        return deepcopy([*model.state_dict().values(), *states])

    for value in (1.0, torch.inf, torch.nan):
        before = everything()
        optimizer.found_inf = torch.tensor(float(value != 1))
        with_gradients(model, value)
        optimizer.step()
        changed = [
            not torch.equal(old, new)
            for old, new in zip(before, everything()[: len(before)], strict=True)
        ]
        assert all(changed) if value == 1 else not any(changed)


def test_stochastic_steps_go_on_from_a_state_as_if_not_interrupted():
    model = small_network().bfloat16().train()
    settings = AdamW(lr=1e-3, warmup=0)
    optimizer, _ = settings.build(model, 10)
    steps_of(model, optimizer, 2)
    other = deepcopy(model)
    resumed, _ = settings.build(other, 10)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (other, resumed)):
        steps_of(one, its, 2)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
