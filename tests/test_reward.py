import math
from dataclasses import dataclass

import pytest
import torch

from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.reward import dcg_discounts, list_return, rank_returns, relevance, unlikeliness_reward

# Shape letters: B lists, K ranks.


@dataclass(frozen=True)
class Line:
    """What relevance reads of a ListedItem."""

    title: str | None
    year: int | None


CATALOG = Catalog(
    [
        Item("Heat", 1995),
        Item("Thief", 1981),
        Item("Ronin", 1998),
        Item("Dune", 1984),
        Item("Dune", 2021),
        Item("Amélie", 2001),
    ]
)
HEAT, THIEF, RONIN = ("Heat", 1995), ("Thief", 1981), ("Ronin", 1998)
OLD_DUNE, NEW_DUNE = ("Dune", 1984), ("Dune", 2021)
UNPARSED = (None, None)


def relevance_of(items, groundtruth, seen=(), num_ranks=4, **options):
    lines = [Line(*item) for item in items]
    return relevance(lines, groundtruth, catalog=CATALOG, seen=seen, num_ranks=num_ranks, **options).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Relevance


def test_hits_stay_in_place():
    """A line that names nothing keeps its rank: Thief is at rank 2 in the tokens too."""
    assert relevance_of([HEAT, UNPARSED, THIEF], [THIEF, HEAT]) == [1, 0, 1, 0]
    assert relevance_of([("Solaris", 1972), THIEF], [THIEF, ("Solaris", 1972)]) == [0, 1, 0, 0]


def test_a_title_without_a_year_is_unparsed():
    assert relevance_of([("Heat", None), HEAT], [HEAT]) == [0, 1, 0, 0]


def test_a_repeat_earns_nothing():
    assert relevance_of([HEAT, HEAT, THIEF, HEAT], [HEAT, THIEF]) == [1, 0, 1, 0]


def test_groundtruth_is_a_set():
    assert relevance_of([HEAT, HEAT, RONIN], [HEAT, HEAT, ("heat", 1995)]) == [1, 0, 0, 0]


def test_spelling_is_the_catalogs_business():
    assert relevance_of([("  heat ", 1995), ("AME\u0301LIE", 2001)], [HEAT, ("Amélie", 2001)]) == [1, 1, 0, 0]


def test_items_past_the_list_are_ignored_and_missing_ones_are_zero():
    items = [RONIN, ("Solaris", 1972), UNPARSED, UNPARSED, HEAT]
    assert relevance_of(items, [HEAT]) == [0, 0, 0, 0]
    assert relevance_of(items, [HEAT], num_ranks=5) == [0, 0, 0, 0, 1]
    assert relevance_of([], [HEAT]) == [0, 0, 0, 0]


def test_type_and_shape():
    result = relevance([Line(*HEAT)], [HEAT], catalog=CATALOG, seen=[], num_ranks=2)
    assert result.dtype == torch.float32 and result.shape == (2,)


def test_year_tolerance_is_off_by_default():
    assert relevance_of([("Heat", 1996)], [HEAT]) == [0, 0, 0, 0]
    assert relevance_of([("Heat", 1996)], [HEAT], year_tolerance=1) == [1, 0, 0, 0]
    assert relevance_of([("Heat", 1997)], [HEAT], year_tolerance=1) == [0, 0, 0, 0]
    assert relevance_of([HEAT], [("Heat", 1994)], year_tolerance=1) == [1, 0, 0, 0]


def test_two_years_of_one_item_are_a_repeat_under_tolerance():
    assert relevance_of([("Heat", 1996), HEAT], [HEAT], year_tolerance=1) == [1, 0, 0, 0]


def test_another_film_of_the_title_is_not_it():
    assert relevance_of([OLD_DUNE, NEW_DUNE], [NEW_DUNE]) == [0, 1, 0, 0]


def test_a_seen_title_earns_nothing():
    assert relevance_of([HEAT, THIEF], [HEAT, THIEF], seen=["HEAT "]) == [0, 1, 0, 0]
    assert relevance_of([("Heat", 1996)], [HEAT], seen=["Heat"], year_tolerance=1) == [0, 0, 0, 0]
    assert relevance_of([HEAT], [HEAT], seen=["Heat 2", "not in the catalog"]) == [1, 0, 0, 0]


def test_a_remake_of_a_seen_title_counts_if_the_groundtruth_names_it():
    assert relevance_of([OLD_DUNE, NEW_DUNE], [NEW_DUNE], seen=["Dune"]) == [0, 1, 0, 0]
    # The year of the ground truth is not exact, so it does not say which of the two was meant.
    assert relevance_of([NEW_DUNE], [("Dune", 2020)], seen=["Dune"], year_tolerance=1) == [0, 0, 0, 0]
    assert relevance_of([NEW_DUNE], [("Dune", 2020)], year_tolerance=1) == [1, 0, 0, 0]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="num_ranks must be >= 1"):
        relevance_of([HEAT], [HEAT], num_ranks=0)
    with pytest.raises(ValueError, match="year must be an int"):
        relevance_of([HEAT], [("Heat", "1995")])


# ----------------------------------------------------------------------------------------------------------------------
# Returns


REL_BK = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "gamma", "expected"),
    [
        ("exp_inf", None, [[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]),
        ("exp", math.inf, [[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]),
        ("exp", 2.0, [[1.25, 0.5, 1, 0], [0.125, 0.25, 0.5, 1], [0, 0, 0, 0]]),
        ("exp", 1.0, [[2, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]),
        # 1/log2(2) = 1, 1/log2(4) = 0.5, 1/log2(5) = 0.430676558; positions count from the top of the list
        ("log", None, [[1.5, 0.5, 0.5, 0], [0.430676558] * 4, [0, 0, 0, 0]]),
    ],
)
def test_returns_literals(kind, gamma, expected):
    returns_BK = rank_returns(REL_BK, kind, gamma)
    torch.testing.assert_close(returns_BK, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("kind", "gamma"), [("exp_inf", None), ("exp", 1.7), ("log", None)])
def test_returns_agree_with_the_sums(kind, gamma):
    relevance_BK = torch.randint(2, (6, 20), generator=torch.Generator().manual_seed(0)).double()
    returns_BK = rank_returns(relevance_BK, kind, gamma)
    for b, row in enumerate(relevance_BK.tolist()):
        for k in range(20):
            weights = {
                "exp_inf": lambda j, k=k: float(j == k),
                "exp": lambda j, k=k: 1.7 ** (k - j),
                "log": lambda j: 1 / math.log2(j + 2),
            }
            expected = sum(row[j] * weights[kind](j) for j in range(k, 20))
            assert returns_BK[b, k].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("kind", "gamma"), [("exp_inf", None), ("exp", 3.0), ("log", None)])
def test_equal_lists_have_bitwise_equal_returns(kind, gamma):
    """group_advantage knows a constant reward by equality."""
    relevance_K = torch.randint(2, (20,), generator=torch.Generator().manual_seed(1)).float()
    returns_BK = rank_returns(relevance_K.expand(37, 20), kind, gamma)
    assert torch.equal(returns_BK, returns_BK[:1].expand(37, 20))


def test_returns_are_a_copy():
    relevance_BK = torch.zeros(1, 2)
    rank_returns(relevance_BK)[0, 0] = 1.0
    assert relevance_BK[0, 0] == 0.0


def test_list_return_is_the_dcg():
    torch.testing.assert_close(list_return(REL_BK), torch.tensor([1.5, 0.430676558073, 0.0], dtype=torch.float64))


def test_discounts():
    assert dcg_discounts(5).tolist() == pytest.approx([1.0, 0.630929754, 0.5, 0.430676558, 0.386852807], abs=1e-9)


@pytest.mark.parametrize(
    ("relevance_BK", "options", "message"),
    [
        (REL_BK, {"kind": "dcg"}, "'exp_inf', 'exp' or 'log', got 'dcg'"),
        (REL_BK, {"kind": "exp"}, "needs gamma > 0"),
        (REL_BK, {"kind": "exp", "gamma": 0.0}, "needs gamma > 0"),
        (REL_BK, {"kind": "exp", "gamma": math.nan}, "needs gamma > 0"),
        (REL_BK, {"kind": "log", "gamma": 2.0}, "gamma belongs to kind='exp'"),
        (REL_BK[0], {}, r"\(B, K\)"),
        (REL_BK.int(), {}, "floating point"),
    ],
)
def test_returns_name_mistakes(relevance_BK, options, message):
    with pytest.raises(ValueError, match=message):
        rank_returns(relevance_BK, **options)


def test_unlikeliness_by_hand():
    # One prompt, four lists, two ranks. Rank 0: lists 0, 1 and 3 hit, list 1 the likeliest, list 3 the least likely.
    reward = torch.tensor([[[1.0, 0], [1, 0], [0, 2], [1, 0]]])
    logp = torch.tensor([[[-2.0, -1], [-1, -1], [-9, -1], [-3, -1]]])
    by_rank = unlikeliness_reward(reward, logp, 0.3, among_hits=True)
    torch.testing.assert_close(by_rank[0, :, 0], torch.tensor([1 - 0.3 * 2 / 3, 1 - 0.3, 0, 1 - 0.3 / 3]))
    assert by_rank[0, :, 1].tolist() == pytest.approx([0, 0, 2 * 0.7, 0])  # alone, so the likeliest of one
    by_group = unlikeliness_reward(reward, logp, 0.3, among_hits=False)
    torch.testing.assert_close(by_group[0, :, 0], torch.tensor([1 - 0.3 * 3 / 4, 1 - 0.3, 0, 1 - 0.3 * 2 / 4]))
    assert by_group[0, 2, 1].item() == pytest.approx(2 * (1 - 0.3 * 2.5 / 4))  # four equal ones share places 0 to 3


def test_unlikeliness_zero_changes_nothing_and_order_does_not_matter():
    random = torch.Generator().manual_seed(0)
    reward = (torch.rand(3, 8, 5, generator=random) < 0.4).double()
    logp = torch.randn(3, 8, 5, generator=random).round(decimals=1).double()  # with ties
    assert torch.equal(unlikeliness_reward(reward, logp, 0.0, among_hits=True), reward)
    order = torch.randperm(8, generator=random)
    for among_hits in (True, False):
        whole = unlikeliness_reward(reward, logp, 0.25, among_hits=among_hits)
        torch.testing.assert_close(
            unlikeliness_reward(reward[:, order], logp[:, order], 0.25, among_hits=among_hits), whole[:, order]
        )
        assert ((whole > 0) == (reward > 0)).all() and (whole <= reward).all()
    with pytest.raises(ValueError, match=r"coef must be in \[0, 1\), got 1"):
        unlikeliness_reward(reward, logp, 1.0, among_hits=True)
    with pytest.raises(ValueError, match="both be"):
        unlikeliness_reward(reward, logp[:2], 0.5, among_hits=True)
