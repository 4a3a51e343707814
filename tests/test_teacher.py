import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankgrpo.baselines.ease import EaseTeacher, _Ease
from rankgrpo.baselines.popularity import popularity_counts, popularity_lists
from rankgrpo.data.dialogs import dialog_ids, named_items, share_of_dialogs
from rankgrpo.data.samples import Sample, Turn
from rankgrpo.distill.demonstrations import make_demonstrations
from rankgrpo.items.catalog import Catalog, Item

# Item n is "<letter> (2000)"; "A" also exists as a remake of 2020, which is item 12.
LETTERS = "ABCDEFGHIJKL"
CATALOG = Catalog([*(Item(letter, 2000) for letter in LETTERS), Item("A", 2020)])


def sample(id, named, wanted, seen=None):
    """A conversation that names some letters with their year, and wants others."""
    text = " and ".join(f"{letter} (2000)" for letter in named)
    groundtruth = tuple((letter, 2000) for letter in wanted)
    return Sample(id, (Turn("user", f"I like {text}"),), tuple(named if seen is None else seen), groundtruth)


def random_samples(num_samples, seed):
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(num_samples):
        letters = rng.choice(list(LETTERS), size=rng.integers(2, 6), replace=False, p=np.arange(12, 0, -1) / 78)
        samples.append(sample(f"s{number}", letters[:-1], letters[-1:]))
    return samples


def ridge_scores(rows, named, l2, num_items):
    """x B of EASE by its definition: each item regressed on all others, so its own weight is 0."""
    x_RN = np.zeros((len(rows), num_items))
    for row, items in zip(x_RN, rows, strict=True):
        row[items] = 1
    score_SN = np.zeros((len(named), num_items))
    for item in range(num_items):
        others = [other for other in range(num_items) if other != item]
        design = x_RN[:, others]
        weight = np.linalg.solve(design.T @ design + l2 * np.eye(len(others)), design.T @ x_RN[:, item])
        for scores_N, items in zip(score_SN, named, strict=True):
            scores_N[item] = sum(weight[others.index(i)] for i in items if i != item)
    return score_SN


@pytest.mark.parametrize("l2", [0.5, 50.0])
def test_ease_is_a_ridge_regression_of_every_item_on_the_others(l2):
    rows = [
        sorted({LETTERS.index(title) for title in [*s.seen_titles, s.groundtruth[0][0]]}) for s in random_samples(60, 0)
    ]
    named = [[0], [1, 4, 7], [], [11, 2]]
    scores_SN = _Ease.solve(rows, torch.zeros(13), l2).scores(named)
    torch.testing.assert_close(scores_SN, torch.from_numpy(ridge_scores(rows, named, l2, 13)).float())
    assert scores_SN.abs().max() > 1e-3


def test_items_that_never_occur_change_nothing():
    model = _Ease.solve([[1, 3], [3, 5]], torch.zeros(7), 1.0)
    assert model.active_A.tolist() == [1, 3, 5]
    torch.testing.assert_close(model.scores([[3, 6], [6]])[0], model.scores([[3]])[0])
    assert model.scores([[6]]).abs().sum() == 0


def test_lists_are_the_scores_in_order_without_what_was_named():
    train, asked = random_samples(60, 0), random_samples(20, 1)
    rows = [named_items(s, CATALOG) + [LETTERS.index(s.groundtruth[0][0])] for s in train]
    named = [named_items(s, CATALOG) for s in asked]
    popularity_N = popularity_counts(train, CATALOG).numpy()
    score_SN = ridge_scores(rows, named, 2.0, 13) + 0.01 * popularity_N
    teacher = EaseTeacher.fit(train, CATALOG, l2=2.0, popularity_weight=0.01)
    for scores_N, items, ranked in zip(score_SN, named, teacher.rank_all(asked, num_items=5), strict=True):
        scores_N[items] = -np.inf
        assert ranked == np.argsort(-scores_N, kind="stable")[:5].tolist()


def test_cuts_of_one_dialog_belong_together():
    hi, ask, more = Turn("user", "Hi"), Turn("assistant", "What do you like?"), Turn("user", "Heat (1995)")
    samples = [
        Sample("redial-7-3", (hi, ask, more), (), ()),
        Sample("redial-9-1", (hi,), (), ()),
        Sample("redial-7-1", (hi,), (), ()),
        Sample("demo-1", (hi,), (), ()),
        Sample("demo-2", (more,), (), ()),
        Sample("plain", (hi,), (), ()),
        Sample("plain2", (hi,), (), ()),
    ]
    assert dialog_ids(samples) == [0, 1, 0, 2, 3, 4, 5]
    assert dialog_ids([]) == []


def test_the_cuts_of_one_dialog_are_one_row():
    turns = (Turn("user", "A (2000)"), Turn("assistant", "B (2000)?"), Turn("user", "Yes, like C (2000)"))
    cuts = [
        Sample("d-1", turns[:1], ("A",), (("B", 2000), ("D", 2000))),
        Sample("d-3", turns, ("A", "B", "C"), (("D", 2000),)),
    ]
    teacher = EaseTeacher.fit([*cuts, sample("e-1", "E", "F")], CATALOG)
    assert [row for part in teacher._folds for row in part.rows] == [[0, 1, 2, 3], [4, 5]]
    assert popularity_counts(cuts, CATALOG).tolist() == [0, 1, 0, 2] + [0] * 9


def test_a_share_of_dialogs_keeps_their_cuts_together():
    turns = tuple(Turn("user", f"turn {n}") for n in range(3))
    samples = [
        Sample(f"d{dialog}-{cut}", (Turn("user", f"dialog {dialog}"), *turns[:cut]), (), ())
        for cut in range(3)
        for dialog in range(20)
    ]
    shares = [share_of_dialogs(samples, 0.25, seed=seed) for seed in (0, 0, 1)]
    assert shares[0] == shares[1] != shares[2]
    for share in shares:
        assert len(share) == 15 and len({sample.id.split("-")[0] for sample in share}) == 5
        assert share == [sample for sample in samples if sample in share]
    assert share_of_dialogs(samples, 1.0) == samples
    assert len(share_of_dialogs(samples, 0.001)) == 3 and share_of_dialogs([], 0.5) == []


# ------------------------------------------------------------------------------------------------- what was named


@pytest.mark.parametrize(
    ("text", "seen", "expected"),
    [
        ("I like B (2000)", (), [1]),  # a mention counts though it is not listed as seen
        ("I like it", ("B", "Unknown"), [1]),  # a bare seen title counts though the text does not show it
        ("A (2020) and B (2000)", ("B", "A"), [12, 1]),  # the text says which of the remakes
        ("A again", ("A",), [0, 12]),  # it does not
        ("A again", ("A (2020)",), [12]),
        ("A (2000), A (2020)", ("A",), [0, 12]),
        ("B (1999), Hello", (), []),
    ],
)
def test_named_items(text, seen, expected):
    assert named_items(Sample("s", (Turn("user", text),), seen, ()), CATALOG) == expected


def test_a_conversation_without_known_titles_gets_the_popular_items():
    train = [sample("a", "A", "BC"), sample("b", "A", "CD"), sample("c", "AB", "CE")]
    popular = [2, 1, 3, 4, 0, 5, 6, 7, 8, 9, 10, 11, 12]  # C three times; B, D, E once; then catalog order
    nothing = Sample("x", (Turn("user", "Hello"),), ("Unknown",), ())
    for weight in (0.0, 2e-4):
        teacher = EaseTeacher.fit(train, CATALOG, popularity_weight=weight)
        assert teacher.rank_all([nothing], num_items=20) == [popular]
    assert popularity_lists(train, [nothing, sample("y", "CA", "")], CATALOG, num_items=3) == [[2, 1, 3], [1, 3, 4]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0, 2, 5]), st.integers(1, 20))
def test_every_list_holds_different_catalog_items_that_were_not_named(seed, num_folds, num_items):
    samples = random_samples(30, seed)
    teacher = EaseTeacher.fit(samples, CATALOG, num_folds=num_folds, seed=seed)
    for s, ranked in zip(samples, teacher.rank_all(samples, num_items=num_items), strict=True):
        named = named_items(s, CATALOG)
        assert len(ranked) == min(num_items, 13 - len(named))
        assert len(set(ranked)) == len(ranked) and not set(ranked) & set(named)
        assert set(ranked) <= set(range(13))


# ------------------------------------------------------------------------------------------------------- cross-fitting


def test_a_list_of_a_training_sample_comes_from_the_other_folds():
    samples = random_samples(40, 3)
    teacher = EaseTeacher.fit(samples, CATALOG, l2=1.0, num_folds=4, seed=7)
    lists = teacher.rank_all(samples)
    for part in teacher._folds:
        others = EaseTeacher.fit([s for s in samples if s.id not in part.ids], CATALOG, l2=1.0)
        inside = [place for place, s in enumerate(samples) if s.id in part.ids]
        assert len(inside) == 10
        assert [lists[place] for place in inside] == others.rank_all([samples[place] for place in inside])
    new = random_samples(5, 4)
    new = [Sample(f"new{n}", s.conversation, s.seen_titles, s.groundtruth) for n, s in enumerate(new)]
    assert teacher.rank_all(new) == EaseTeacher.fit(samples, CATALOG, l2=1.0).rank_all(new)


def test_cross_fitting_does_not_repeat_a_memorised_ground_truth():
    # K goes with L in one dialog only; everybody else wants C.
    turns = (Turn("user", "K (2000)"), Turn("assistant", "Why?"), Turn("user", "No reason"))
    strange = [Sample(f"k-{n}", turns[:n], ("K",), (("L", 2000),)) for n in (1, 3)]
    samples = [*strange, *(sample(f"p{n}", "AB"[n % 2], "C") for n in range(20))]
    memorised = EaseTeacher.fit(samples, CATALOG, l2=1.0).rank_all(strange, num_items=1)
    honest = EaseTeacher.fit(samples, CATALOG, l2=1.0, num_folds=3).rank_all(strange, num_items=1)
    assert memorised == [[11], [11]] and honest == [[2], [2]]


def test_folds_are_dealt_by_the_seed():
    samples = random_samples(40, 3)
    ids = [[part.ids for part in EaseTeacher.fit(samples, CATALOG, num_folds=4, seed=s)._folds] for s in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]


# ------------------------------------------------------------------------------------------------------ demonstrations


def test_demonstrations_are_lines_of_title_and_year():
    train = [sample("a", "A", "BC"), sample("b", "A", "CD")]
    teacher = EaseTeacher.fit(train, CATALOG)
    (done,) = make_demonstrations(train[:1], teacher, num_items=3)
    assert done.completion == "C (2000)\nB (2000)\nD (2000)"
    assert (done.id, done.conversation, done.groundtruth) == (train[0].id, train[0].conversation, train[0].groundtruth)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l2": 0.0}, "l2 must be > 0"),
        ({"l2": float("nan")}, "l2 must be > 0"),
        ({"popularity_weight": -1.0}, "popularity_weight >= 0"),
        ({"num_folds": 1}, r"num_folds must be 0 \(one model for all\) or 2 to 3"),
        ({"num_folds": 4}, "2 to 3, the number of dialogs; got 4"),
        ({"num_folds": -2}, "got -2"),
    ],
)
def test_impossible_options_are_refused(options, message):
    train = [sample(name, "A", "B") for name in "xyz"]
    with pytest.raises(ValueError, match=message):
        EaseTeacher.fit(train, CATALOG, **options)


def test_samples_that_name_nothing_teach_nothing():
    with pytest.raises(ValueError, match="none of 1 samples names a catalog item"):
        EaseTeacher.fit([Sample("x", (Turn("user", "Hello"),), (), (("Unknown", 2000),))], CATALOG)
    with pytest.raises(ValueError, match="none of 0 samples"):
        EaseTeacher.fit([], CATALOG)
    with pytest.raises(ValueError, match="num_items must be at least 1"):
        EaseTeacher.fit([sample("a", "A", "B")], CATALOG).rank_all([sample("b", "A", "B")], num_items=0)
