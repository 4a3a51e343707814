import math

import pytest
import torch
from torch import nn

from rankgrpo.errors import TrainingError
from rankgrpo.runtime.optim import check_finite, learning_rate, make_optimizer, optimizer_step


def test_cosine_with_warmup_literals():
    kw = dict(num_steps=10, peak=1.0, schedule="cosine", warmup_frac=0.2)
    values = [learning_rate(step, **kw) for step in range(10)]
    assert values[:3] == [0.5, 1.0, 1.0]
    assert values[6] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))
    assert values[9] == pytest.approx(0.0380602, abs=1e-6)


def test_two_phases_switch_at_the_fraction():
    kw = dict(num_steps=16000, peak=1e-6, schedule="two-phase", second_phase_at=0.5, second_phase_lr=1e-7)
    assert [learning_rate(step, **kw) for step in (0, 7999, 8000, 15999)] == [1e-6, 1e-6, 1e-7, 1e-7]


def test_constant_and_unknown():
    assert learning_rate(7, num_steps=10, peak=0.3, schedule="constant") == 0.3
    with pytest.raises(ValueError, match="schedule"):
        learning_rate(0, num_steps=1, peak=1, schedule="linear")


def test_decay_is_for_matrices_only():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = make_optimizer(model, lr=1.0, betas=(0.9, 0.99), weight_decay=0.5)
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decayed[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.5,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


def test_a_large_eps_holds_weights_of_small_gradient():
    layer = nn.Linear(2, 1, bias=False)
    optimizer = make_optimizer(layer, lr=0.1, betas=(0.9, 0.99), weight_decay=0.0, eps=1e-2)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[0.5, 1e-4]])
    optimizer_step(optimizer, layer.parameters(), lr=0.1, grad_clip=1.0, where="x")
    # The first Adam step is lr * g / (|g| + eps); with eps = 1e-8 both weights would move by lr.
    moved = torch.tensor([[0.1 * 0.5 / 0.51, 0.1 * 1e-4 / 1.01e-2]])
    torch.testing.assert_close(layer.weight.detach(), before - moved)


def test_clipping_uses_the_global_norm():
    layer = nn.Linear(1, 2, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[3.0], [4.0]])
    norm = optimizer_step(optimizer, layer.parameters(), lr=0.1, grad_clip=1.0, where="x")
    assert norm == pytest.approx(5.0)
    torch.testing.assert_close(layer.weight.detach(), before - 0.1 * torch.tensor([[0.6], [0.8]]))
    assert layer.weight.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    layer = nn.Linear(2, 1)
    optimizer = make_optimizer(layer, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    before = [p.detach().clone() for p in layer.parameters()]
    for p in layer.parameters():
        p.grad = torch.full_like(p, bad)
    with pytest.raises(TrainingError, match="RL step 7.*checkpoint is intact"):
        optimizer_step(optimizer, layer.parameters(), lr=1.0, grad_clip=1.0, where="RL step 7")
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert not optimizer.state


def test_check_finite():
    check_finite(0.0, "x", "the loss")
    with pytest.raises(TrainingError, match="SFT step 3: the loss is nan"):
        check_finite(math.nan, "SFT step 3", "the loss")
