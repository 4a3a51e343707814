"""Rank advantages carried by trainers that hold one number a token: spread over tokens, neighbours kept apart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankgrpo.loss import rank_grpo_loss
from rankgrpo.units import Units, hide_units, make_units, token_advantage, units_from_advantage

# Shape letters: B lists, T tokens, K ranks, U units.

RANK_BT = torch.tensor([[0, 0, 1, 2, 2, 2, -1], [0, 1, 1, 3, 3, -1, -1], [-1] * 7])
ADVANTAGE_BK = torch.tensor([[1.5, -2.0, 0.75, 0.0], [0.1, 0.1, 3.0, 0.1], [1.0, 1.0, 1.0, 1.0]])


def draw(seed=0, shape=(3, 7)):
    return -torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.1


def gradient(logp_BT, old_BT, units):
    logp_BT = logp_BT.clone().requires_grad_()
    loss, metrics = rank_grpo_loss(
        logp_BT, old_BT, units.unit_BT, units.advantage_BU, weight_BK=units.weight_BU, denominator=units.denominator
    )
    loss.backward()
    return logp_BT.grad, metrics


def test_token_advantage_literal():
    expected = [[0.75, 0.75, -2.0, 0.25, 0.25, 0.25, 0.0], [0.1, 0.05, 0.05, 0.05, 0.05, 0, 0], [0.0] * 7]
    torch.testing.assert_close(token_advantage(RANK_BT, ADVANTAGE_BK), torch.tensor(expected))
    whole = token_advantage(RANK_BT, ADVANTAGE_BK, mean_by_rank=False)
    assert whole[0].tolist() == [1.5, 1.5, -2.0, 0.75, 0.75, 0.75, 0.0]


def test_token_advantage_has_the_gradient_of_the_loss_on_policy():
    logp_BT = draw().requires_grad_()
    rank_grpo_loss(logp_BT, None, RANK_BT, ADVANTAGE_BK)[0].backward()
    theirs_BT = draw().requires_grad_()
    ratio_BT = (theirs_BT - theirs_BT.detach()).exp()
    (-(ratio_BT * token_advantage(RANK_BT, ADVANTAGE_BK)).sum() / 12).backward()
    torch.testing.assert_close(theirs_BT.grad, logp_BT.grad)


def test_token_advantage_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="rank_BT must be integer"):
        token_advantage(RANK_BT.float(), ADVANTAGE_BK)
    with pytest.raises(ValueError, match=r"advantage_BK must be floating point \(3, K\)"):
        token_advantage(RANK_BT, ADVANTAGE_BK[:2])


def test_hidden_units_literal():
    """Equal neighbours (0.1, 0.1) and a 0 stay apart; rank 2 of the second list has no token and no unit."""
    rank_BT = torch.tensor([[0, 0, 1, 2, -1], [0, 1, 3, 3, 3]])
    advantage_BK = torch.tensor([[0.1, 0.1, 0.0, 9.0], [2.0, 0.0, 9.0, 0.0]])
    units = Units(rank_BT, advantage_BK, torch.ones(2, 4), 8)
    hidden_BT = hide_units(units)
    assert (hidden_BT.view(torch.int32) & 15).tolist() == [[0, 0, 8, 0, 0], [0, 8, 0, 0, 0]]
    assert hidden_BT[0, 4] == 0 and hidden_BT[0, 3] == hidden_BT[1, 2] == 2.0**-100
    found = units_from_advantage(hidden_BT, torch.ones(2, 5), num_ranks=4)
    assert found.unit_BT.tolist() == [[0, 0, 1, 2, -1], [0, 1, 2, 2, 2]]
    expected = torch.tensor([[0.1, 0.1, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(found.advantage_BU, expected, rtol=1e-6, atol=0.0)
    assert found.denominator == 8


@pytest.mark.parametrize("factors", [(3.0,), (1 / 3,), (-0.1, 7.0, 1e-3), (2.0**-19,), (1e5, 1e-6)])
def test_hidden_units_survive_factors(factors):
    """Next to the top of a binade, where the last place is smallest beside the number, and everywhere else."""
    generator = torch.Generator().manual_seed(0)
    value = 1.0 + torch.rand(4096, 1, generator=generator)
    value[:32] = torch.nextafter(torch.tensor(2.0), torch.tensor(0.0)) - torch.arange(32)[:, None] * 2.0**-23
    advantage_BK = torch.cat([value, value, value + 2.0**-22, torch.zeros_like(value), torch.zeros_like(value)], 1)
    rank_BT = torch.arange(5).repeat_interleave(2).expand(4096, 10)
    hidden_BT = hide_units(Units(rank_BT, advantage_BK, torch.ones(4096, 5), 1))
    for factor in factors:
        hidden_BT = hidden_BT * factor
    found = units_from_advantage(hidden_BT, torch.ones(4096, 10), num_ranks=5)
    assert found.unit_BT.equal(rank_BT)
    scaled_BK = advantage_BK * float(torch.tensor(factors, dtype=torch.float64).prod())
    torch.testing.assert_close(found.advantage_BU[:, :5], scaled_BK, rtol=2e-6, atol=0.0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_hidden_units_come_back(data):
    """Loss gradient and clipping are those of the units that were hidden, off-policy, with penalties and gaps."""
    num_tokens, num_ranks = 12, 3
    values = st.sampled_from([0.0, 0.1, -0.1, 1.0, 1e-38, -3.7, 1e6])
    rank_BT, eos_BT = torch.full((2, num_tokens), -1), torch.zeros(2, num_tokens, dtype=torch.bool)
    for row in range(2):
        length = data.draw(st.integers(0, num_tokens))
        steps = data.draw(st.lists(st.sampled_from([0, 0, 1, 2]), min_size=length, max_size=length))
        rank_BT[row, :length] = torch.tensor(steps, dtype=torch.int64).cumsum(0)
        if length and data.draw(st.booleans()):
            eos_BT[row, length - 1] = True
        gaps = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)))
        rank_BT[row] = torch.where(gaps & ~eos_BT[row], -1, rank_BT[row])
    advantage_BK = torch.tensor([[data.draw(values) for _ in range(num_ranks)] for _ in range(2)])
    units = make_units(rank_BT, eos_BT, advantage_BK, num_ranks=num_ranks)
    found = units_from_advantage(hide_units(units), torch.ones(2, num_tokens), num_ranks=num_ranks)
    same_BTT = (units.unit_BT[:, :, None] == units.unit_BT[:, None]) & (units.unit_BT >= 0)[:, :, None]
    assert same_BTT.equal((found.unit_BT[:, :, None] == found.unit_BT[:, None]) & (found.unit_BT >= 0)[:, :, None])
    old_BT = draw(1, (2, num_tokens))
    logp_BT = old_BT + 0.15 * (draw(2, (2, num_tokens)) + 0.6)
    (ours, mine), (theirs, other) = gradient(logp_BT, old_BT, units), gradient(logp_BT, old_BT, found)
    torch.testing.assert_close(theirs, ours, rtol=2e-6, atol=1e-18)
    for name in ("ratio/mean", "ratio/num_units"):
        torch.testing.assert_close(other[name], mine[name])


def test_weights_are_folded_into_hidden_advantages():
    eos_BT = torch.zeros(RANK_BT.shape, dtype=torch.bool)
    units = make_units(RANK_BT, eos_BT, ADVANTAGE_BK[:, :1], unit="token", num_ranks=4)
    found = units_from_advantage(hide_units(units), RANK_BT >= 0, num_ranks=1)
    torch.testing.assert_close(gradient(draw(), draw(1), found)[0], gradient(draw(), draw(1), units)[0])


def test_the_mask_of_the_host_is_kept():
    units = Units(RANK_BT, ADVANTAGE_BK, torch.ones_like(ADVANTAGE_BK), 12)
    mask_BT = torch.ones(3, 7)
    mask_BT[0, 2] = 0
    assert units_from_advantage(hide_units(units), mask_BT, num_ranks=4).unit_BT[0].tolist() == [0, 0, -1, 1, 1, 1, -1]


def test_what_cannot_be_hidden_is_refused():
    parted = Units(torch.tensor([[0, 1, 0]]), torch.ones(1, 2), torch.ones(1, 2), 2)
    with pytest.raises(ValueError, match="parted by those of another"):
        hide_units(parted)
    broken = Units(torch.tensor([[0, 1, 1]]), torch.tensor([[1.0, torch.nan]]), torch.ones(1, 2), 2)
    with pytest.raises(ValueError, match="not finite"):
        hide_units(broken)
    large = Units(torch.tensor([[0]]), torch.tensor([[2.0**100]]), torch.ones(1, 1), 2)
    with pytest.raises(ValueError, match="2.100 or more"):
        hide_units(large)
    with pytest.raises(ValueError, match="must be float32"):
        units_from_advantage(torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(1, 3), num_ranks=2)
    with pytest.raises(ValueError, match="mask_BT must be"):
        units_from_advantage(torch.ones(1, 3), torch.ones(1, 4), num_ranks=2)
