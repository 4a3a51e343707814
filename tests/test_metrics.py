import math
from itertools import combinations

import numpy as np
import pytest
import torch

from rankgrpo import metrics
from rankgrpo.metrics import (
    bootstrap_interval,
    gini,
    hit_rate_by_rank,
    ndcg_at_k,
    paired_bootstrap,
    recall_at_k,
    union_chance,
    union_recall,
)

# Shape letters: B samples, K ranks.


def hits_at(*ranks, num_ranks=20):
    """Hits at the given places, counted from 1."""
    hits_K = torch.zeros(num_ranks)
    hits_K[[rank - 1 for rank in ranks]] = 1.0
    return hits_K


# ----------------------------------------------------------------------------------------------------------------------
# Recall and NDCG


@pytest.mark.parametrize(
    ("hits", "num_groundtruth", "k", "recall", "ndcg"),
    [  # d_1..d_5 = 1, .630930, .5, .430677, .386853; sums: 1, 1.630930, 2.130930, 2.561606, 2.948459
        (hits_at(1), 1, 5, 1.0, 1.0),
        (hits_at(2), 1, 5, 1.0, 0.630930),
        (hits_at(1, 3), 2, 5, 1.0, 0.919721),  # 1.5 / 1.630930
        (hits_at(1, 3), 3, 5, 2 / 3, 0.703918),  # 1.5 / 2.130930
        (hits_at(2, 6), 2, 5, 0.5, 0.386853),  # .630930 / 1.630930; rank 6 is past 5
        (hits_at(1, 2, 3, 4, 5), 13, 5, 5 / 13, 1.0),  # the ideal list has 5 places, not 13
        (hits_at(1), 10, 20, 0.1, 0.220092),  # 1 / 4.543559: one of ten found is no perfect list
        (hits_at(20), 1, 5, 0.0, 0.0),  # 19 lines outside the catalog are not skipped ...
        (hits_at(20), 1, 20, 1.0, 0.227670),  # ... 1 / log2(21)
        (hits_at(1, 3, 6), 13, 20, 3 / 13, 0.346605),  # (1 + .5 + .356207) / 5.355379; compacted it would be .398
        (hits_at(), 4, 10, 0.0, 0.0),
    ],
)
def test_literals(hits, num_groundtruth, k, recall, ndcg):
    hits_BK, num_groundtruth_B = hits[None], torch.tensor([num_groundtruth])
    assert recall_at_k(hits_BK, num_groundtruth_B, k).tolist() == pytest.approx([recall], abs=1e-6)
    assert ndcg_at_k(hits_BK, num_groundtruth_B, k).tolist() == pytest.approx([ndcg], abs=1e-6)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_agrees_with_a_loop(k):
    generator = torch.Generator().manual_seed(0)
    hits_BK = (torch.rand(50, 20, generator=generator) < 0.2).float()
    num_groundtruth_B = hits_BK.sum(1).long() + torch.randint(1, 9, (50,), generator=generator)
    recall_B, ndcg_B = recall_at_k(hits_BK, num_groundtruth_B, k), ndcg_at_k(hits_BK, num_groundtruth_B, k)
    assert recall_B.dtype == ndcg_B.dtype == torch.float64
    for b, count in enumerate(num_groundtruth_B.tolist()):
        places = [place for place in range(1, k + 1) if hits_BK[b, place - 1]]
        ideal = sum(1 / math.log2(place + 1) for place in range(1, min(count, k) + 1))
        assert recall_B[b].item() == pytest.approx(len(places) / count)
        assert ndcg_B[b].item() == pytest.approx(sum(1 / math.log2(place + 1) for place in places) / ideal)


def test_one_sample_without_a_batch():
    assert recall_at_k(hits_at(1, 2), torch.tensor(4), 5).item() == 0.5
    assert ndcg_at_k(hits_at(2).tolist(), 1, 5).item() == pytest.approx(1 / math.log2(3))


def test_hit_rate_by_rank():
    hits_BK = torch.stack([hits_at(1, 3, num_ranks=4), hits_at(1, num_ranks=4)])
    assert hit_rate_by_rank(hits_BK).tolist() == [1.0, 0.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="B >= 1"):
        hit_rate_by_rank(torch.zeros(0, 4))


@pytest.mark.parametrize(
    ("hits_BK", "num_groundtruth_B", "k", "message"),
    [
        (torch.zeros(1, 20), torch.tensor([0]), 5, "num_groundtruth must be >= 1"),
        (torch.zeros(1, 20), torch.tensor([1.0]), 5, "integers"),
        (torch.zeros(1, 20), torch.tensor([1, 2]), 5, "shape"),
        (torch.zeros(1, 20), torch.tensor([1]), 21, "k must be in 1..20"),
        (torch.zeros(1, 20), torch.tensor([1]), 0, "k must be in 1..20"),
        (torch.full((1, 20), 0.5), torch.tensor([20]), 5, "0 or 1"),
        (torch.ones(1, 20), torch.tensor([3]), 2, "counted twice"),
    ],
)
@pytest.mark.parametrize("metric", [recall_at_k, ndcg_at_k])
def test_mistakes_are_named(metric, hits_BK, num_groundtruth_B, k, message):
    with pytest.raises(ValueError, match=message):
        metric(hits_BK, num_groundtruth_B, k)


# ----------------------------------------------------------------------------------------------------------------------
# Several lists


@pytest.mark.parametrize("num_drawn", [1, 2, 3, 5])
def test_union_recall_is_the_mean_over_all_choices_of_lists(num_drawn):
    """5 lists that hit these items of a ground truth of 6, every subset of them in turn."""
    lists = [{"a", "b"}, {"a"}, set(), {"a", "c"}, {"d"}]
    unions = [set().union(*chosen) for chosen in combinations(lists, num_drawn)]
    brute = sum(len(union) / 6 for union in unions) / len(unions)
    holding = [sum(item in found for found in lists) for item in "abcd"]
    recall_B = union_recall([holding, []], [6, 2], num_lists=5, num_drawn=num_drawn)
    assert recall_B.tolist() == pytest.approx([brute, 0.0])


def test_union_of_one_list_is_the_mean_recall_and_of_all_lists_the_union():
    assert union_recall([[3, 1]], [4], num_lists=4, num_drawn=1).tolist() == [(3 + 1) / 4 / 4]
    assert union_recall([[3, 1]], [4], num_lists=4, num_drawn=4).tolist() == [2 / 4]


def test_union_recall_of_few_lists_is_unbiased_for_lists_sampled_anew():
    """Every list holds the item with chance .3: of 3 sampled, pairs hold it with chance 1 - .7^2 on average."""
    chance_M = union_chance(3, 2)
    binomial = [math.comb(3, c) * 0.3**c * 0.7 ** (3 - c) for c in range(4)]
    assert float(chance_M @ torch.tensor(binomial, dtype=torch.float64)) == pytest.approx(1 - 0.7**2)


def test_union_chance_of_many_lists_does_not_overflow():
    assert union_chance(2048, 1024)[[0, 1, 2048]].tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("num_drawn", [0, 6])
def test_a_union_of_more_lists_than_there_are_is_refused(num_drawn):
    with pytest.raises(ValueError, match=f"1 to 5 lists, as many as were sampled, got {num_drawn}"):
        union_chance(5, num_drawn)


def test_more_found_than_there_is_to_find_is_refused():
    with pytest.raises(ValueError, match="sample 1: 2 items found of a ground truth of 1"):
        union_recall([[1], [1, 1]], [1, 1], num_lists=2, num_drawn=1)


def test_gini():
    assert gini([5, 5, 5]) == pytest.approx(0)
    assert gini([0, 0, 0, 7]) == pytest.approx(3 / 4)
    counts = [4, 0, 1, 9, 2]  # half the mean absolute difference over the mean
    differences = sum(abs(a - b) for a in counts for b in counts) / len(counts) ** 2
    assert gini(counts) == pytest.approx(differences / 2 / (sum(counts) / len(counts)))
    for nothing in ([], [0, 0], [-1, 2]):
        with pytest.raises(ValueError, match="Gini"):
            gini(nothing)


# ----------------------------------------------------------------------------------------------------------------------
# Bootstrap


def test_bootstrap_of_two_values_by_enumeration():
    """Means of a resample of (0, 1) are 0, 1/2, 1 with probability 1/4, 1/2, 1/4."""
    assert bootstrap_interval([0.0, 1.0]) == (0.5, 0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], level=0.4) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("level", "z"), [(0.95, 1.959964), (0.8, 1.281552)])
def test_bootstrap_of_many_values_is_the_normal_interval(level, z):
    values = np.random.default_rng(1).exponential(size=4000)
    mean, low, high = bootstrap_interval(values, level=level, num_resamples=4000)
    error = values.std() / math.sqrt(len(values))
    assert mean == pytest.approx(values.mean())
    assert (high - mean) / error == pytest.approx(z, rel=0.08)
    assert (mean - low) / error == pytest.approx(z, rel=0.08)


def test_bootstrap_of_a_constant_has_no_width():
    assert bootstrap_interval(torch.full((9,), 0.25)) == (0.25, 0.25, 0.25)


def test_bootstrap_is_reproducible_and_follows_its_seed():
    values = np.random.default_rng(0).random(100)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(torch.tensor(values), seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_every_resample_counts_when_they_come_in_chunks(monkeypatch):
    """2,000 resamples of 3 at a time: a chunk forgotten or drawn anew with the same seed would move the bounds."""
    values = np.random.default_rng(1).exponential(size=300)
    whole = bootstrap_interval(values)
    monkeypatch.setattr(metrics, "MAX_DRAWS", 1000)
    chunks = list(metrics._draws(300, 2000, seed=0))
    assert [len(chunk) for chunk in chunks] == [3] * 666 + [2]
    assert len({chunk[0].tobytes() for chunk in chunks}) == 667
    assert bootstrap_interval(values) == pytest.approx(whole, rel=0.02)


def test_pairing_cancels_what_samples_share():
    base = np.random.default_rng(2).random(200)
    assert paired_bootstrap(base + 0.125, base) == pytest.approx((0.125, 0.125, 0.125))
    assert paired_bootstrap(base, base + 0.125) == pytest.approx((-0.125, -0.125, -0.125))
    assert paired_bootstrap(1.5 * base, base, relative=True) == pytest.approx((0.5, 0.5, 0.5))


def test_paired_difference_is_the_interval_of_the_differences():
    generator = np.random.default_rng(3)
    a, b = generator.random(100), generator.random(100)
    assert paired_bootstrap(a, b, seed=5) == pytest.approx(bootstrap_interval(a - b, seed=5))


def test_relative_difference_is_of_means_not_a_mean_of_ratios():
    gain, low, high = paired_bootstrap([1.0, 5.0], [2.0, 2.0], relative=True)
    assert (gain, low, high) == (0.5, -0.5, 1.5)


def test_relative_difference_to_a_baseline_that_can_vanish_has_no_upper_bound():
    gain, low, high = paired_bootstrap([1.0, 1.0], [0.0, 1.0], relative=True)
    assert (gain, low, high) == (1.0, 0.0, math.inf)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "non-empty"),
        ([[1.0]], {}, "vector"),
        ([1.0, math.nan], {}, "finite"),
        ([1.0], {"level": 1.0}, "level"),
        ([1.0], {"num_resamples": 0}, "num_resamples"),
    ],
)
def test_bootstrap_names_mistakes(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **options)
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(values, values, **options)


def test_paired_bootstrap_names_mistakes():
    with pytest.raises(ValueError, match="same samples, got 2 and 3"):
        paired_bootstrap([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="relative=False"):
        paired_bootstrap([1.0], [0.0], relative=True)
