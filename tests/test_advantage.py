import math
import statistics

import pytest
import torch

from rankgrpo.advantage import group_advantage
from rankgrpo.loss import rank_grpo_loss

# Shape letters: P prompts, G lists a prompt, K ranks.


def random_rewards(num_prompts=3, group_size=4, num_ranks=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_prompts, group_size, num_ranks, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("eps", "hit", "miss"),
    [
        (0.0, 7 / math.sqrt(8), -1 / math.sqrt(8)),  # mean 1/8, unbiased variance 1/8: +2.475 and -0.354
        (1e-4, 2.474174, -0.353453),
    ],
)
def test_one_hit_in_eight(eps, hit, miss):
    reward_PGK = torch.tensor([0.0, 0, 1, 0, 0, 0, 0, 0], dtype=torch.float64).reshape(1, 8, 1)
    advantage_PGK = group_advantage(reward_PGK, eps=eps)
    assert advantage_PGK.flatten().tolist() == pytest.approx([miss, miss, hit] + [miss] * 5, abs=1e-6)


def test_biased_std_and_centring_only():
    reward_PGK = torch.tensor([[[1.0], [0.0], [0.0], [0.0]]], dtype=torch.float64)
    biased = group_advantage(reward_PGK, ddof=0, eps=0.0).flatten().tolist()
    assert biased == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])
    assert group_advantage(reward_PGK, scale_by_std=False).flatten().tolist() == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale_by_std", [False, True])
def test_agrees_with_a_loop(scale_by_std, ddof):
    reward_PGK = random_rewards()
    advantage_PGK = group_advantage(reward_PGK, scale_by_std=scale_by_std, ddof=ddof)
    std = statistics.stdev if ddof else statistics.pstdev
    for p in range(3):
        for k in range(5):
            group = reward_PGK[p, :, k].tolist()
            scale = std(group) + 1e-4 if scale_by_std else 1.0
            expected = [(reward - statistics.mean(group)) / scale for reward in group]
            assert advantage_PGK[p, :, k].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("scale_by_std", [False, True])
@pytest.mark.parametrize("group_size", [1, 3, 7, 10])
def test_equal_rewards_give_exactly_zero(group_size, scale_by_std):
    """0.1 added up and divided again is not 0.1 for these sizes: the plain formula would leave rounding noise."""
    reward_PGK = torch.full((2, group_size, 3), 0.1)
    reward_PGK[1, :, 1] = 1e6
    assert torch.equal(group_advantage(reward_PGK, scale_by_std=scale_by_std), torch.zeros(2, group_size, 3))


def test_a_constant_rank_does_not_silence_the_others():
    reward_PGK = torch.zeros(1, 4, 2)
    reward_PGK[0, 1, 1] = 1.0
    advantage_PGK = group_advantage(reward_PGK)
    assert torch.equal(advantage_PGK[..., 0], torch.zeros(1, 4))
    assert (advantage_PGK[..., 1] != 0).all()


def test_order_of_the_group_permutes_the_advantages():
    reward_PGK, order_G = random_rewards(), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(group_advantage(reward_PGK[:, order_G]), group_advantage(reward_PGK)[:, order_G])


def test_prompts_do_not_meet():
    reward_PGK = random_rewards()
    torch.testing.assert_close(group_advantage(reward_PGK)[1:2], group_advantage(reward_PGK[1:2]))


def test_a_reward_that_is_not_a_number_shows():
    reward_PGK = torch.zeros(1, 2, 2)
    reward_PGK[0, 0, 0] = torch.nan
    assert group_advantage(reward_PGK).isnan().tolist() == [[[True, False], [True, False]]]


@pytest.mark.parametrize("reduction", ["rank", "token"])
def test_constant_reward_gives_zero_gradient(reduction):
    advantage_PGK = group_advantage(torch.full((1, 3, 2), 0.1))
    logp_BT = torch.tensor([[-1.0, -2.0, -0.3]] * 3, requires_grad=True)
    rank_BT = torch.tensor([[0, 0, 1]] * 3)
    loss, _ = rank_grpo_loss(
        logp_BT, logp_BT.detach() + 0.01, rank_BT, advantage_PGK.flatten(0, 1), reduction=reduction
    )
    loss.backward()
    assert torch.equal(logp_BT.grad, torch.zeros(3, 3))


@pytest.mark.parametrize(
    ("reward", "options", "message"),
    [
        (torch.zeros(4, 2), {}, r"\(P, G, K\)"),
        (torch.zeros(2, 0, 2), {}, "G >= 1"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), {}, "floating point"),
        (torch.zeros(1, 2, 2), {"ddof": 2}, "ddof must be 0"),
        (torch.zeros(1, 2, 2), {"eps": -1.0}, "eps must be >= 0"),
    ],
)
def test_mistakes_are_named(reward, options, message):
    with pytest.raises(ValueError, match=message):
        group_advantage(reward, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Groups by id


def test_groups_by_id_literal():
    # Group 7: rewards 0, 2, 4 (mean 2, unbiased std 2); group 3: 1, 1; group 5 has one list.
    reward_BK = torch.tensor([[0.0], [1.0], [9.0], [2.0], [1.0], [4.0]])
    group_B = torch.tensor([7, 3, 5, 7, 3, 7])
    expected = torch.tensor([[-1.0], [0.0], [0.0], [0.0], [0.0], [1.0]])
    assert group_advantage(reward_BK, group_B, eps=0.0).equal(expected)
    assert group_advantage(reward_BK, group_B, scale_by_std=False).equal(expected * 2)


@pytest.mark.parametrize("options", [{}, {"scale_by_std": False}, {"ddof": 0}, {"eps": 0.1}])
def test_groups_by_id_equal_whole_groups_in_any_order(options):
    generator = torch.Generator().manual_seed(0)
    reward_PGK = torch.rand(5, 4, 3, generator=generator, dtype=torch.float64)
    reward_PGK[1, :, 2] = 0.1  # the mean of four times 0.1 need not be 0.1
    expected = group_advantage(reward_PGK, **options).flatten(0, 1)
    order = torch.randperm(20, generator=generator)
    group_B = torch.tensor([40, -3, 8, 0, 2]).repeat_interleave(4)[order]
    found = group_advantage(reward_PGK.flatten(0, 1)[order], group_B, **options)
    torch.testing.assert_close(found, expected[order])
    assert (found == 0).equal(expected[order] == 0)


def test_groups_of_uneven_size_are_each_their_own():
    generator = torch.Generator().manual_seed(1)
    reward_BK = torch.rand(9, 2, generator=generator)
    group_B = torch.tensor([0, 1, 1, 2, 2, 2, 2, 2, 1])
    found = group_advantage(reward_BK, group_B)
    for group in range(3):
        alone = reward_BK[group_B == group]
        torch.testing.assert_close(found[group_B == group], group_advantage(alone[None])[0])


def test_group_ids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"with group_B, rewards must be \(B, K\) and group_B \(B,\), got \(2, 3, 1\)"):
        group_advantage(torch.zeros(2, 3, 1), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="integer ids, got torch.float32"):
        group_advantage(torch.zeros(2, 3), torch.zeros(2))
