import pytest
import torch
from tiny_world import byte_rollout, byte_scorer

from rankgrpo.config import RlConfig
from rankgrpo.data.samples import Sample, Turn
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.rollouts.score import Scorer, score_groups
from rankgrpo.runtime.distributed import Parallel
from rankgrpo.runtime.means import Means
from rankgrpo.sampler.base import Rollout

CATALOG = Catalog([Item("Heat", 1995), Item("Ronin", 1998), Item("Thief", 1981), Item("Alien", 1979)])
EXAMPLE = Sample("a", (Turn("user", "I like Alien (1979)"),), ("Alien",), (("Heat", 1995), ("Thief", 1981)))
ALONE = Parallel(0, 1, torch.device("cpu"))


def score(*texts, **settings):
    means = Means()
    group = [text if isinstance(text, Rollout) else byte_rollout(text) for text in texts]
    rl = RlConfig(group_size=len(group), **settings)
    return score_groups([group], [EXAMPLE], byte_scorer(CATALOG, rl, 3), means), means.reduce(ALONE)


FULL = "Ronin (1998)\nHeat (1995)\nThief (1981)"
MISS = "Ronin (1998)\nAlien (1979)\nRonin (1998)"


def test_rewards_and_advantages_by_rank():
    scored, means = score(FULL, MISS)
    assert scored.reward_PGK.tolist() == [[[0, 1, 1], [0, 0, 0]]]
    half = 0.5 / (2**-0.5 + 1e-4)
    torch.testing.assert_close(scored.advantage_PGU, torch.tensor([[[0, half, half], [0, -half, -half]]]))
    assert scored.carries_gradient == [True]
    assert means["reward/mean"] == pytest.approx(2 / 6)
    assert (means["reward/rank_00"], means["reward/rank_01"]) == (0.0, 0.5)
    assert means["reward/zero_std_frac"] == pytest.approx(1 / 3)
    assert (means["reward/zero_std_rank_00"], means["reward/zero_std_rank_02"]) == (1.0, 0.0)
    assert (means["list/hit_frac"], means["list/hits_mean"]) == (0.5, 1.0)


def test_returns_and_units():
    scored, _ = score(FULL, MISS, returns="exp", gamma=2.0)
    assert scored.reward_PGK[0, 0].tolist() == [0.75, 1.5, 1.0]
    scored, means = score(FULL, MISS, unit="list")
    assert scored.advantage_PGU.shape == (1, 2, 1)
    assert "reward/zero_std_rank_00" not in means


def test_a_repeat_costs_the_advantage_of_its_own_rank():
    plain, _ = score(FULL, MISS)
    punished, _ = score(FULL, MISS, repeat_penalty=-0.25)
    assert (punished.advantage_PGU - plain.advantage_PGU).tolist() == [[[0, 0, 0.125], [0, 0, -0.125]]]
    assert punished.reward_PGK.tolist() == plain.reward_PGK.tolist()
    outside, _ = score("Nowhere (2050)\nNOWHERE (2050)\nwhat", FULL.replace("Heat", "Hot"), repeat_penalty=-0.5)
    assert outside.advantage_PGU[0, :, :2].tolist() == [[0, -0.25], [0, 0.25]]
    assert score(MISS, MISS, repeat_penalty=-0.5)[0].carries_gradient == [False]


def test_what_a_list_is_made_of():
    _, means = score("Heat (1995)\nno year\nNowhere (2050)\nHeat (1995)", byte_rollout("", finished=False))
    assert means["list/items_mean"] == 2.0
    assert means["list/parsed_frac"] == 3 / 4
    assert means["list/in_catalog_frac"] == 2 / 4
    assert means["list/duplicate_frac"] == 1 / 4
    assert means["list/finished_frac"] == 0.5
    assert means["policy/entropy"] == 0.5


@pytest.mark.parametrize(
    ("texts", "settings", "carries"),
    [
        ((MISS, MISS), {}, False),
        (("Ronin (1998)", MISS), {}, True),  # stopped early
        (("Ronin (1998)", MISS), {"early_eos_penalty": 0.0}, False),
        ((MISS + "\nAlien (1979)", MISS), {}, True),  # overflows
        ((MISS + "\nAlien (1979)", MISS), {"overflow_penalty": 0.0}, False),
        ((byte_rollout("Ronin (1998)", finished=False), MISS), {}, False),  # cut off, not stopped
        ((MISS, MISS), {"full_list_bonus": 0.1}, True),
        (("Ronin (1998)", MISS), {"unit": "list"}, False),
    ],
)
def test_which_groups_carry_a_gradient(texts, settings, carries):
    assert score(*texts, **settings)[0].carries_gradient == [carries]


class OneTokenALine:
    """Stands for a segmenter of lists with one token a line."""

    def __call__(self, ids_BT, mask_BT):
        return torch.where(mask_BT, torch.arange(ids_BT.shape[1]), -1)


def test_unlikely_hits_count_more_and_only_among_hits():
    likely = Rollout([1, 2, 3], [-0.1, -0.2, -0.3], FULL, True)
    unlikely = Rollout([1, 2, 3], [-0.1, -2.0, -0.3], FULL, True)
    miss = Rollout([1, 2], [-0.1, -0.1], MISS, True)
    group, rl = [likely, unlikely, miss], RlConfig(group_size=3, unlikeliness=0.5, scale_by_std=False)
    scorer = Scorer.open(CATALOG, rl, 3, OneTokenALine(), [0])
    scored = score_groups([group], [EXAMPLE], scorer, Means())
    # Rank 1: factors 1 - .5 (likeliest of two hits) and 1 - .5 / 2; rank 2: both equally likely, 1 - .5 * 1.5 / 2.
    first, second, third = torch.tensor([0.5, 0.75, 0]), torch.tensor([0.625, 0.625, 0]), scored.advantage_PGU[0].T
    torch.testing.assert_close(third, torch.stack([torch.zeros(3), first - first.mean(), second - second.mean()]))
    assert scored.reward_PGK[0, 0].tolist() == [0, 1, 1]  # what is logged is what was earned
