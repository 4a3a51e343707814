import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rankgrpo.baselines.ranking import best_items
from rankgrpo.distill import remap
from rankgrpo.distill.reflect import ReflectScores
from rankgrpo.distill.remap import HeldScores, RemapScores, SelectedScores, rank_samples

NUM_ITEMS, NUM_KNOWN, NUM_SAMPLES, SIZE = 7, 10, 9, 4


def world(seed=0, sparse=False):
    """Lists over 10 items of which 7 are in the catalog, some empty, one with a repeat; random unit rows."""
    generator = torch.Generator().manual_seed(seed)
    lists = [torch.randperm(NUM_KNOWN, generator=generator)[: n % 5].tolist() for n in range(NUM_SAMPLES)]
    lists[3] = [8, 2, 8, 2, 5]
    item_UD = F.normalize(torch.randn(NUM_KNOWN, SIZE, generator=generator), dim=1)
    context_SD = F.normalize(torch.randn(NUM_SAMPLES, SIZE, generator=generator), dim=1)
    if sparse:
        item_UD, context_SD = (torch.where(rows.abs() > 0.4, rows, 0.0) for rows in (item_UD, context_SD))
    return lists, item_UD, context_SD


def oracle(lists, item_UD, context_SD, item_weight, context_weight):
    """Eq. 10 as it is written, with dense matrices."""
    position_SU = np.zeros((len(lists), NUM_KNOWN))
    for sample, items in enumerate(lists):
        for rank, item in enumerate(items, start=1):
            if not position_SU[sample, item]:
                position_SU[sample, item] = 1 / np.sqrt(rank)
    items, contexts = item_UD.double().numpy(), context_SD.double().numpy()
    similarity_UN = items @ items[:NUM_ITEMS].T
    exact_UN = np.eye(NUM_KNOWN)[:, :NUM_ITEMS]
    return position_SU @ (item_weight * similarity_UN + exact_UN) + context_weight * contexts @ items[:NUM_ITEMS].T


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("item_weight", "context_weight"), [(1.0, 1.0), (0.0, 0.5), (0.3, 0.0)])
def test_remap_is_equation_10(sparse, item_weight, context_weight):
    lists, item_UD, context_SD = world(sparse=sparse)
    expected = oracle(lists, item_UD, context_SD, item_weight, context_weight)
    rows = (item_UD.to_sparse(), context_SD.to_sparse()) if sparse else (item_UD, context_SD)
    scores = RemapScores(lists, NUM_ITEMS, *rows, item_weight, context_weight)
    np.testing.assert_allclose(scores.block(range(NUM_SAMPLES)), expected, atol=1e-6)
    np.testing.assert_allclose(scores.block([4, 1]), expected[[4, 1]], atol=1e-6)


def test_by_hand():
    # Catalog items a = (1, 0) and b = (.6, .8); the teacher lists x = (0, 1), which the catalog lacks, then a.
    item_UD = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    scores = RemapScores([[2, 0]], 2, item_UD, torch.tensor([[0.8, 0.6]]), 1.0, 1.0)
    second = 2**-0.5
    expected = [[0.0 + second * 1 + second + 0.8, 0.8 + second * 0.6 + 0.6 * 0.8 + 0.8 * 0.6]]
    torch.testing.assert_close(scores.block([0]), torch.tensor(expected))


def test_without_embeddings_only_listed_catalog_items_score():
    lists, *_ = world()
    scores = RemapScores(lists, NUM_ITEMS).block(range(NUM_SAMPLES))
    assert scores[3].tolist() == pytest.approx([0, 0, 2**-0.5, 0, 0, 5**-0.5, 0])  # the repeats count once
    assert (scores[0] == 0).all() and lists[0] == []


def test_ratings_are_added_times_gamma_to_what_they_rate():
    lists, item_UD, context_SD = world()
    remapped = RemapScores(lists, NUM_ITEMS, item_UD, context_SD)
    ratings = [{} for _ in lists]
    ratings[2] = {0: 2, 5: -1}
    expected = remapped.block(range(NUM_SAMPLES))
    expected[2, 0] += 1.0
    expected[2, 5] -= 0.5
    reflected = ReflectScores(HeldScores.hold(remapped), ratings, gamma=0.5)
    torch.testing.assert_close(reflected.block(range(NUM_SAMPLES)), expected)
    torch.testing.assert_close(reflected.block([2]), expected[[2]])  # asking twice adds once
    torch.testing.assert_close(SelectedScores(reflected, [5, 2]).block([1]), expected[[2]])


def test_blocks_change_nothing(monkeypatch):
    lists, item_UD, context_SD = world()
    scores = RemapScores(lists, NUM_ITEMS, item_UD, context_SD)
    excluded = [[n % NUM_ITEMS] for n in range(NUM_SAMPLES)]
    order_N = torch.arange(NUM_ITEMS)
    whole = rank_samples(scores, range(NUM_SAMPLES), excluded, order_N, 3)
    held = HeldScores.hold(scores).scores_SN
    monkeypatch.setattr(remap, "BLOCK_SCORES", 2 * NUM_ITEMS + 1)
    sizes = [len(block) for block in remap.blocks(range(NUM_SAMPLES), NUM_ITEMS)]
    assert sizes == [2, 2, 2, 2, 1]
    assert rank_samples(scores, range(NUM_SAMPLES), excluded, order_N, 3) == whole
    torch.testing.assert_close(HeldScores.hold(scores).scores_SN, held)
    some = rank_samples(scores, [6, 1], excluded, order_N, 3, adjust=lambda s_BN, block: s_BN.neg_())
    assert some == rank_samples(HeldScores(-held), [6, 1], excluded, order_N, 3) != [whole[6], whole[1]]


@settings(deadline=None)
@given(st.data())
def test_best_items_are_those_of_a_stable_sort(data):
    num_items = data.draw(st.integers(1, 8))
    value = st.sampled_from([-1.0, 0.0, 0.5, 2.0])  # few values, so that many are equal
    rows = data.draw(st.lists(st.lists(value, min_size=num_items, max_size=num_items), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(num_items)))
    excluded = [data.draw(st.lists(st.integers(0, num_items - 1), unique=True)) for _ in rows]
    wanted = data.draw(st.integers(1, 9))
    expected = [
        [item for item in sorted(order, key=lambda item: -row[item]) if item not in left_out][:wanted]
        for row, left_out in zip(rows, excluded, strict=True)
    ]
    assert best_items(torch.tensor(rows), excluded, torch.tensor(order), wanted) == expected


def test_a_list_has_at_least_one_item():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        best_items(torch.zeros(1, 2), [[]], torch.arange(2), 0)
