"""Surrogates as weights of units: literals by hand, and the gradients that their papers write."""

import math

import pytest
import torch

from rankgrpo.loss import rank_grpo_loss
from rankgrpo.rollouts.surrogate import NO_CLIP, surrogate_weight

# One list of three units: ratios e^0.2 (of two tokens, 0.1 and 0.3), e^-0.5 and, without tokens, 1.
OLD = torch.tensor([[-1.0, -1.0, -0.2]], dtype=torch.float64)
MOVED = torch.tensor([[0.1, 0.3, -0.5]], dtype=torch.float64)
UNIT = torch.tensor([[0, 0, 1]])
ADVANTAGE = torch.tensor([[2.0, -1.0, 3.0]], dtype=torch.float64)


def weights(kind, moved=MOVED, advantage=ADVANTAGE, **options):
    return surrogate_weight(OLD + moved, OLD, UNIT, advantage, kind=kind, **options)[0].tolist()


def test_cispo_bounds_the_ratio():
    # 1.08 / e^0.2 = 1.08 / 1.221403, 0.94 / e^-0.5 = 0.94 / 0.606531
    assert weights("cispo") == pytest.approx([0.884229, 1.549798, 1.0], abs=1e-6)


def test_sapo_fades_by_the_sign_of_the_advantage():
    # s(0.221403) = 0.555126 -> 4 s (1 - s) = 0.987845; s(1.05 * -0.393469) = 0.398159 -> 0.958513
    assert weights("sapo") == pytest.approx([0.987845, 0.958513, 1.0], abs=1e-6)
    flipped = weights("sapo", advantage=-ADVANTAGE, sapo_tau=(1.0, 4.0))
    # s(4 * 0.221403) = 0.707984 -> 0.826971; s(-0.393469) = 0.402882 -> 0.962273
    assert flipped == pytest.approx([0.826971, 0.962273, 1.0], abs=1e-6)


def test_dppo_drops_what_moves_further_away():
    # e^-0.8 - e^-1 = 0.081450; e^-0.7 - e^-0.2 = -0.322145
    assert weights("dppo") == [1.0, 0.0, 1.0]
    assert weights("dppo", dppo_delta=0.08) == [0.0, 0.0, 1.0]
    assert weights("dppo", dppo_delta=0.33) == [1.0, 1.0, 1.0]
    assert weights("dppo", advantage=-ADVANTAGE, dppo_delta=0.08) == [1.0, 1.0, 1.0]  # both lead back


@pytest.mark.parametrize("kind", ["cispo", "sapo", "dppo"])
def test_at_ratio_one_every_surrogate_is_the_same(kind):
    assert weights(kind, moved=torch.zeros_like(MOVED)) == [1.0, 1.0, 1.0]


def slope(kind, ratio, advantage):
    """d objective / d log w, as the papers have it."""
    if kind == "cispo":
        return min(max(ratio, 0.94), 1.08) * advantage
    if kind == "sapo":
        tau = 1.0 if advantage > 0 else 1.05
        f = lambda r: 4 / tau / (1 + math.exp(-tau * (r - 1))) * advantage  # noqa: E731
        return (f(ratio + 1e-6) - f(ratio - 1e-6)) / 2e-6 * ratio
    return ratio * advantage if ratio > 1 else 0.0


@pytest.mark.parametrize("kind", ["cispo", "sapo", "dppo"])
def test_the_gradient_is_the_papers(kind):
    logp = (OLD + MOVED).requires_grad_()
    weight = surrogate_weight(logp, OLD, UNIT, ADVANTAGE, kind=kind)
    assert not weight.requires_grad
    loss, _ = rank_grpo_loss(logp, OLD, UNIT, ADVANTAGE, weight_BK=weight, denominator=1, **NO_CLIP)
    loss.backward()
    first, second = slope(kind, math.exp(0.2), 2.0), slope(kind, math.exp(-0.5), -1.0)
    assert (-logp.grad[0]).tolist() == pytest.approx([first / 2, first / 2, second], rel=1e-6)


def test_an_unknown_surrogate_is_refused():
    with pytest.raises(ValueError, match="kind must be"):
        weights("ppo")
