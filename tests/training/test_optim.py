from copy import deepcopy

import pytest
import torch
from commands import compose_config
from hydra.utils import instantiate
from small_network import small_network, talk_of_two
from torch import nn

from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.optim import AdamW, StochasticAdamW, noise, round_stochastically


def test_matrices_decay_and_vectors_do_not():
    optimizer, _ = AdamW(lr=1.0, weight_decay=0.1).build(nn.Linear(3, 2), total_steps=10)
    decays = {}
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            decays[tuple(tensor.shape)] = group["weight_decay"]
    assert decays == {(2, 3): 0.1, (2,): 0.0}


@pytest.mark.parametrize("warmup", [4, 0.4])
def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine_to_zero(warmup):
    optimizer, schedule = AdamW(lr=1.0, warmup=warmup).build(nn.Linear(2, 2), total_steps=10)
    learning_rates = []
    for _ in range(11):
        learning_rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert learning_rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert learning_rates[7] == pytest.approx(0.5)
    assert learning_rates[10] == pytest.approx(0.0, abs=1e-9)


def test_a_warm_up_that_is_longer_than_the_training_is_warned_about(caplog):
    AdamW(lr=2e-3, warmup=50).build(nn.Linear(2, 2), total_steps=51)
    assert not caplog.text
    AdamW(lr=2e-3, warmup=50).build(nn.Linear(2, 2), total_steps=50)
    [warning] = caplog.messages
    assert warning.startswith(
        "the run has 50 optimizer steps and optim.warmup=50, so the learning rate never reaches "
        "optim.lr=0.002: "
    )


def test_a_warm_up_that_is_rounded_to_no_step_is_described():
    described = AdamW(lr=1e-4, warmup=0.05).describe(3)
    assert described.endswith("no warm-up (0.05 of all steps is less than one), cosine")
    assert AdamW(lr=1e-4, warmup=0).describe(3).endswith("0.0001, no warm-up, cosine")


@pytest.mark.parametrize(
    ("schedule", "learning_rates"),
    [
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0, 0.5, 1, 0.854, 0.5, 0.146, 0]),
        ("constant", [0, 0.5, 1, 1, 1, 1, 1]),
    ],
)
def test_each_schedule_follows_the_warm_up(schedule, learning_rates):
    settings = AdamW(lr=1.0, warmup=2, schedule=schedule)
    optimizer, scheduler = settings.build(nn.Linear(2, 2), total_steps=6)
    seen = []
    for _ in learning_rates:
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx(learning_rates, abs=1e-3)


@pytest.mark.parametrize("optim", ["adamw", "demo", "official", "swift_full"])
def test_every_optimizer_offers_a_schedule_a_warm_up_and_learning_rates_of_components(optim):
    overrides = [f"optim={optim}", "optim.schedule=linear", "optim.warmup=3", "optim.eps=1e-6"]
    overrides.append("+optim.component_lr.vision=1e-5")
    settings = instantiate(compose_config("train", *overrides).optim, _convert_="all")
    assert (settings.schedule, settings.warmup, settings.eps) == ("linear", 3, 1e-6)
    assert settings.component_lr == {"vision": 1e-5}


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


def test_components_have_their_own_learning_rate_and_the_innermost_counts():
    model = small_network()
    settings = AdamW(lr=1.0, component_lr={"vision": 0.1, "resampler": 0.3}, warmup=0)
    optimizer, _ = settings.build(model, 10, QwenVLFamily.components)
    lr_of = {}
    for group in optimizer.param_groups:
        lr_of |= dict.fromkeys(map(id, group["params"]), group["lr"])
    assert len(lr_of) == len(list(model.parameters()))
    tower = model.transformer.visual
    assert lr_of[id(tower.conv1.weight)] == 0.1
    assert lr_of[id(tower.proj)] == 0.1
    assert lr_of[id(tower.attn_pool.ln_q.bias)] == 0.3
    assert lr_of[id(model.lm_head.weight)] == 1.0
    assert {group["component"] for group in optimizer.param_groups} == {None, "vision", "resampler"}


def test_a_learning_rate_for_a_missing_or_frozen_component_is_an_error():
    model = small_network()
    with pytest.raises(ValueError, match=r"no component tower; its components are vision, "):
        AdamW(lr=1.0, component_lr={"tower": 0.1}).build(model, 10, QwenVLFamily.components)
    model.transformer.visual.requires_grad_(False)
    message = (
        r"nothing of vision, only tensors of embeddings, .*such as adapter=lora_all or adapter=f"
    )
    with pytest.raises(ValueError, match=message):
        AdamW(lr=1.0, component_lr={"vision": 0.1}).build(model, 10, QwenVLFamily.components)


@pytest.mark.parametrize("sign", [1, -1])
def test_stochastic_rounding_is_right_on_average_and_keeps_exact_values(sign):
    lower, upper = 1.0, 1.0 + 2**-7  # neighbours in bfloat16
    values = torch.full((100_000,), sign * (lower + 0.25 * (upper - lower)))
    rounded = round_stochastically(values, 5).float() * sign
    assert set(rounded.unique().tolist()) == {lower, upper}
    assert (rounded == upper).float().mean() == pytest.approx(0.25, abs=0.01)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_stochastically(exact.float()), exact)


def test_noise_is_uniform_and_uncorrelated_between_indices_and_seeds():
    like = torch.empty(1 << 18)
    first, second = (noise(like, seed).double() / 65536 for seed in (5, 6))
    assert first.min() >= 0
    assert first.max() < 1
    shares = torch.histc(first, bins=16, min=0, max=1) / len(first)
    assert shares.tolist() == pytest.approx([1 / 16] * 16, rel=0.03)
    first, second = first - 0.5, second - 0.5
    # The mean product of n independent pairs is 0 with a standard deviation of 1 / (12 sqrt(n))
    five_deviations = 5 / 12 / len(first) ** 0.5
    for shift in (1, 2, 64):
        assert abs((first[shift:] * first[:-shift]).mean()) < five_deviations
    assert abs((first * second).mean()) < five_deviations
    assert torch.equal(noise(like, torch.tensor(5, dtype=torch.int32)), noise(like, 5))


def test_a_compiled_step_gives_the_same_weights(monkeypatch):
    torch_compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function: torch_compile(function, backend="aot_eager")
    )
    models = []
    for compiled in (False, True):
        model = small_network().bfloat16().train()
        optimizer, _ = AdamW(lr=1e-3, warmup=0).build(model, 10, compiled=compiled)
        train(model, optimizer, 3)
        models.append(model)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> float:
    """Makes `count` steps on the same two rows with bfloat16 autocast.

    Returns the mean loss of the last ten.
    """
    batch, losses = talk_of_two(), []
    for _ in range(count):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-10:]).mean())


def test_with_a_small_learning_rate_bfloat16_trains_like_float32_only_if_rounded_stochastically():
    losses = {}
    for name, dtype, rounding in (
        ("float32", torch.float32, "nearest"),
        ("stochastic", torch.bfloat16, "stochastic"),
        ("nearest", torch.bfloat16, "nearest"),
    ):
        model = small_network().bfloat16().to(dtype).train()
        settings = {
            "lr": 1e-5,
            "warmup": 0,
            "schedule": "constant",
            "rounding": rounding,
        }
        optimizer, _ = AdamW(**settings).build(model, 200)
        losses[name] = train(model, optimizer, 200)
    assert losses["stochastic"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["nearest"] > 1.2 * losses["float32"]


def with_gradients(model: nn.Module, value: float | None = None) -> nn.Module:
    """Sets all gradients: to the same random numbers in every call, or to `value`."""
    torch.manual_seed(1)
    for tensor in model.parameters():
        tensor.grad = torch.randn_like(tensor) if value is None else torch.full_like(tensor, value)
    return model


@pytest.mark.parametrize("chunk", [7, 2**24])
def test_without_rounding_it_equals_the_adamw_of_torch(monkeypatch, chunk):
    monkeypatch.setattr("qwenvl_lit.training.optim.CHUNK", chunk)  # tensors are cut and joined
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
    for tensor, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    assert all(tensor.grad is None for tensor in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_with_a_non_finite_gradient_changes_nothing(dtype):
    model = nn.Linear(3, 2).to(dtype)
    optimizer, _ = AdamW(lr=0.1, warmup=0).build(model, 10)

    def weights_and_states() -> list[torch.Tensor]:
        tensors = list(model.state_dict().values())
        for state in optimizer.state_dict()["state"].values():
            tensors += state.values()
        return deepcopy(tensors)

    for value in (1.0, torch.inf, torch.nan):
        before = weights_and_states()
        optimizer.found_inf = torch.tensor(float(value != 1))
        with_gradients(model, value)
        optimizer.step()
        after = weights_and_states()[: len(before)]
        unchanged = [torch.equal(old, new) for old, new in zip(before, after, strict=True)]
        if value == 1:
            assert not any(unchanged)
        else:
            assert all(unchanged)


def test_stochastic_steps_resume_from_a_state_as_if_not_interrupted():
    model = small_network().bfloat16().train()
    settings = AdamW(lr=1e-3, warmup=0)
    optimizer, _ = settings.build(model, 10)
    train(model, optimizer, 2)
    resumed_model = deepcopy(model)
    resumed_optimizer, _ = settings.build(resumed_model, 10)
    resumed_optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2)
    train(resumed_model, resumed_optimizer, 2)
    assert all(map(torch.equal, model.parameters(), resumed_model.parameters()))
