"""Packing: literal index maps, and properties every pack and plan must have."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankgrpo.model.packing import Group, build_pack, plan_micro_batches

ids = st.lists(st.integers(1, 50), min_size=1, max_size=6)
groups_of_ids = st.lists(st.builds(Group, ids, st.lists(ids, min_size=1, max_size=4)), min_size=1, max_size=5)

MIXED = [
    Group([1, 2, 3], [[4, 5], [6]]),
    Group([10, 11], [[12, 13]]),  # one list: stays one causal sequence behind everything shared
    Group([7], [[8], [9, 7, 8]]),
]


def test_pack_literal():
    pack = build_pack(MIXED)
    # rows: 0-2 prompt of the first group, 3 prompt of the third, 4-6 and 7-10 their lists, 11-14 the one-list group
    assert pack.input_ids_1N.tolist() == [[1, 2, 3, 7, 4, 5, 6, 8, 9, 7, 8, 10, 11, 12, 13]]
    assert pack.position_ids_1N.tolist() == [[0, 1, 2, 0, 3, 4, 3, 1, 1, 2, 3, 0, 1, 2, 3]]
    assert pack.target_ids_M.tolist() == [4, 5, 6, 12, 13, 8, 9, 7, 8]
    assert pack.source_row_M.tolist() == [2, 4, 2, 12, 13, 3, 3, 8, 9]
    assert pack.slot_M.tolist() == [0, 1, 3, 6, 7, 9, 12, 13, 14]
    assert pack.token_ids_BT.tolist() == [[4, 5, 0], [6, 0, 0], [12, 13, 0], [8, 0, 0], [9, 7, 8]]
    assert pack.mask_BT.tolist() == [[True, True, False], [True, False, False]] + [
        [True, True, False],
        [True, False, False],
        [True, True, True],
    ]


def test_layout_literal():
    layout = build_pack(MIXED).layout
    assert layout.own.q_sizes == layout.own.k_sizes == [3, 1, 2, 1, 1, 3, 4]
    assert layout.own.cu_q.tolist() == [0, 3, 4, 6, 7, 8, 11, 15]
    assert (layout.cross.q_sizes, layout.cross.k_sizes) == ([3, 4], [3, 1])
    assert (layout.cross.cu_q.tolist(), layout.cross.cu_k.tolist()) == ([0, 3, 7], [0, 3, 4])
    assert layout.cross_rows == slice(4, 11)
    assert (layout.num_tokens, layout.max_length) == (15, 5)
    assert build_pack([MIXED[1]]).layout.cross is None


def test_token_counts():
    pack = build_pack([Group([1] * 700, [[2] * 230] * 8)])
    assert (pack.tokens_shared, pack.tokens_dense) == (700 + 8 * 230, 8 * 930)
    assert (pack.tokens_shared, pack.tokens_dense) == (2540, 7440)
    alone = build_pack([Group([1, 2], [[3]])])
    assert alone.tokens_shared == alone.tokens_dense == 3


@settings(deadline=None, max_examples=60)
@given(groups_of_ids)
def test_every_target_is_predicted_from_the_token_before_it(groups):
    pack = build_pack(groups)
    rows = [(group.prompt_ids, ids) for group in groups for ids in group.completion_ids]
    sequence_ids = [p + c for p, c in rows]
    where = [(b, t) for b, (_, c) in enumerate(rows) for t in range(len(c))]
    assert len(where) == len(pack.source_row_M)
    for m, (b, t) in enumerate(where):
        at = len(rows[b][0]) + t
        source = pack.source_row_M[m]
        assert pack.target_ids_M[m] == sequence_ids[b][at] == pack.token_ids_BT[b, t]
        assert pack.input_ids_1N[0, source] == sequence_ids[b][at - 1]
        assert pack.position_ids_1N[0, source] == at - 1
    assert int(pack.mask_BT.sum()) == len(where)
    assert pack.input_ids_1N.shape[1] == pack.tokens_shared == sum(pack.layout.own.q_sizes)


@settings(deadline=None, max_examples=60)
@given(groups_of_ids, st.integers(1, 60))
def test_plan_keeps_groups_whole_within_the_budget(groups, budget):
    plan = plan_micro_batches(groups, budget)
    assert sorted(i for members in plan for i in members) == list(range(len(groups)))
    for members in plan:
        assert members == sorted(members) and members
        assert len(members) == 1 or sum(groups[i].tokens_shared for i in members) <= budget


def sized(*sizes: int) -> list[Group]:
    return [Group([1] * (size - 1), [[2]]) for size in sizes]


def test_plan_is_balanced_and_minimal():
    assert plan_micro_batches(sized(9, 2, 8, 3, 7, 4), 11) == [[0, 1], [2, 3], [4, 5]]
    assert plan_micro_batches(sized(5, 5, 5, 5), 15) == [[0, 2], [1, 3]]  # 10 + 10, not 15 + 5
    assert plan_micro_batches(sized(4, 4, 4), 12) == [[0, 1, 2]]
    assert plan_micro_batches([], 12) == []


def test_plan_oversize_group():
    assert plan_micro_batches(sized(4, 50, 5), 10) == [[1], [0, 2]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Group([], [[1]]), "prompt token"),
        (lambda: Group([1], []), "at least one list"),
        (lambda: Group([1], [[2], []]), r"lists \[1\] have none"),
        (lambda: build_pack([]), "at least one group"),
        (lambda: plan_micro_batches(sized(4), 0), "token_budget"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
