import pytest
import torch
from torch import nn

from qwenvl_lit.optim import AdamW


def test_matrices_decay_and_vectors_do_not():
    optimizer, _ = AdamW(lr=1.0, weight_decay=0.1).build(nn.Linear(3, 2), total_steps=10)
    decays = {tuple(tensor.shape): group["weight_decay"] for group in optimizer.param_groups for tensor in group["params"]}
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
