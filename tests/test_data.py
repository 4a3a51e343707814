import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankgrpo.data.load import load_dataset
from rankgrpo.data.order import BatchOrder
from rankgrpo.data.samples import Sample, Turn, read_samples, write_samples
from rankgrpo.errors import DataError
from rankgrpo.items.catalog import Catalog, Item

CATALOG = Catalog([Item("Heat", 1995), Item("Ronin", 1998), Item("Up", 2009)])


def row(**changes):
    base = {
        "id": "a-1",
        "conversation": [{"role": "user", "content": "Something like Heat (1995)?"}],
        "seen_titles": ["Heat"],
        "groundtruth": [["Ronin", 1998]],
    }
    return {key: value for key, value in (base | changes).items() if value is not ...}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows), encoding="utf-8")
    return path


def write_folder(folder, **files):
    """A good data set of one sample a split, with files replaced; None leaves a file out."""
    rows = {split: [row(id=f"{split}-1")] for split in ("train", "validation", "test")}
    rows["catalog"] = [{"title": item.title, "year": item.year} for item in CATALOG]
    for name, content in (rows | files).items():
        if content is not None:
            write(folder / f"{name}.jsonl", *content)
    return folder


# ------------------------------------------------------------------------------------------------------------ reading


def test_a_good_file(tmp_path):
    path = write(
        tmp_path / "train.jsonl",
        row(
            groundtruth=[["Ronin", "1998"], [" Up ", 2009]], completion="Up (2009)", split="train", groundtruth_turn=[]
        ),
        row(id="b", seen_titles=[], conversation=[{"role": "assistant", "content": ""}]),
    )
    samples, problems = read_samples(path, catalog=CATALOG)
    assert problems == []
    assert samples[0] == Sample(
        id="a-1",
        conversation=(Turn("user", "Something like Heat (1995)?"),),
        seen_titles=("Heat",),
        groundtruth=(("Ronin", 1998), ("Up", 2009)),
        completion="Up (2009)",
    )
    assert samples[1].conversation == (Turn("assistant", ""),) and samples[1].completion is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"id": "x"', "broken JSON"),
        ("17", "expected a JSON object, got a number"),
        (row(id=...), "missing id"),
        (row(conversation=..., groundtruth=...), "missing conversation, groundtruth"),
        (row(id=7), "id must be a non-empty string, got 7"),
        (row(id=""), "id must be a non-empty string"),
        (row(), "id 'a-1' is already on line 1"),
        (row(conversation=[]), "conversation is empty"),
        (row(conversation="hello"), "conversation must be a list, got a string"),
        (row(conversation=["hello"]), "conversation[0] must be an object with role and content, got a string"),
        (row(conversation=[{"role": "user"}]), "conversation[0] must be an object with role and content"),
        (
            row(conversation=[{"role": "user", "content": ""}, {"role": "system", "content": ""}]),
            "conversation[1].role must be one of ['user', 'assistant'], got 'system'",
        ),
        (row(conversation=[{"role": ["user"], "content": ""}]), "conversation[0].role must be one of"),
        (row(conversation=[{"role": "user", "content": None}]), "conversation[0].content must be a string, got null"),
        (row(seen_titles="Heat"), "seen_titles must be a list, got a string"),
        (row(seen_titles=["Heat", 3]), "seen_titles[1]: title must be a string, got a number"),
        (row(groundtruth={}), "groundtruth must be a list, got an object"),
        (row(groundtruth=[["Ronin"]]), "groundtruth[0] must be [title, year], got ['Ronin']"),
        (row(groundtruth=[["Up", 2009], ["Ronin", None]]), "groundtruth[1]: year must be a whole number, got None"),
        (row(groundtruth=[["Ronin", 98]]), "groundtruth[0]: year 98 is impossible"),
        (row(groundtruth=[["", 1998]]), "groundtruth[0]: title is empty"),
        (row(completion=["Up (2009)"]), "completion must be a string, got a list"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path, bad, message):
    path = write(tmp_path / "train.jsonl", row(), "", bad, row(id="c"))
    with pytest.raises(DataError) as caught:
        read_samples(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}:3: ") and message in problem
    assert problem in str(caught.value)


def test_every_bad_line_is_listed(tmp_path):
    path = write(tmp_path / "train.jsonl", row(), row(id=1), row(id="b"), "oops", row(id="b"))
    with pytest.raises(DataError) as caught:
        read_samples(path)
    assert [problem.split(":")[1] for problem in caught.value.problems] == ["2", "4", "5"]


def test_soft_problems_name_file_and_line_and_keep_the_sample(tmp_path):
    path = write(
        tmp_path / "test.jsonl",
        row(groundtruth=[["Ronin", 1998], ["Ronin", "1998"]]),
        row(id="b", groundtruth=[], mood="sad"),
        row(id="c", groundtruth=[["Ronin", 1999]], seen_titles=["Heet"], mood="glad"),
        row(id="d", split="train", conversation=[{"role": "user", "content": "Hi", "name": "Ann"}]),
    )
    samples, problems = read_samples(path, catalog=CATALOG)
    assert [sample.id for sample in samples] == ["a-1", "b", "c", "d"]
    assert samples[0].groundtruth == (("Ronin", 1998),)
    assert [str(problem) for problem in problems] == [
        f"{path}:1: a-1: ground truth names an item twice; kept once",
        f"{path}:2: unknown field 'mood' is not used (reported once)",
        f"{path}:2: b: ground truth is empty; the sample is left out of training and evaluation",
        f"{path}:3: c: ground truth Ronin (1999) is not in the catalog and can never be a hit",
        f"{path}:3: c: seen title 'Heet' is not in the catalog",
        f"{path}:4: unknown field 'conversation.name' is not used (reported once)",
        f"{path}:4: d: split says 'train', the file is test.jsonl",
    ]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TITLE = TEXT.map(lambda text: "T" + " ".join(text.split()))
SAMPLE = st.builds(
    Sample,
    id=TEXT.map(lambda text: "i" + text),
    conversation=st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), TEXT), min_size=1).map(tuple),
    seen_titles=st.lists(TITLE, max_size=3).map(tuple),
    groundtruth=st.lists(st.tuples(TITLE, st.integers(1900, 2020)), unique=True, max_size=3).map(tuple),
    completion=st.none() | TEXT,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(SAMPLE, unique_by=lambda sample: sample.id, max_size=4))
def test_written_and_read_again(tmp_path_factory, samples):
    path = tmp_path_factory.mktemp("samples") / "new" / "rows.jsonl"
    write_samples(path, samples)
    assert read_samples(path)[0] == samples


# ----------------------------------------------------------------------------------------------------------- data sets


def test_a_folder(tmp_path):
    dataset = load_dataset(write_folder(tmp_path / "mine", train=[row(), row(id="b", groundtruth=[]), row(id="c")]))
    assert dataset.name == "mine"
    assert [sample.id for sample in dataset.train] == ["a-1", "c"]
    assert dataset.split("validation") == dataset.validation and dataset.test[0].id == "test-1"
    assert dataset.num_dropped == {"train": 1, "validation": 0, "test": 0}
    assert dataset.catalog.items == CATALOG.items
    assert len(dataset.problems) == 1 and "train.jsonl:2: b: ground truth is empty" in str(dataset.problems[0])
    with pytest.raises(ValueError, match="split must be one of"):
        dataset.split("dev")


def test_catalog_as_csv(tmp_path):
    folder = write_folder(tmp_path, catalog=None)
    (folder / "catalog.csv").write_text("title,year\nRonin,1998\n", encoding="utf-8")
    dataset = load_dataset(folder)
    assert dataset.catalog.items == (Item("Ronin", 1998),)
    assert sum("seen title 'Heat' is not in the catalog" in str(problem) for problem in dataset.problems) == 3


def test_num_train_takes_a_seeded_subset_in_file_order(tmp_path):
    folder = write_folder(tmp_path, train=[row(id=f"s{n:03d}") for n in range(100)])
    chosen = [s.id for s in load_dataset(folder, num_train=30, seed=1).train]
    assert len(set(chosen)) == 30 and chosen == sorted(chosen)
    assert chosen == [s.id for s in load_dataset(folder, num_train=30, seed=1).train]
    assert chosen != [s.id for s in load_dataset(folder, num_train=30, seed=2).train]
    with pytest.raises(DataError, match="num_train is 101, but there are 100 usable"):
        load_dataset(folder, num_train=101)
    with pytest.raises(ValueError, match="num_train must be at least 1"):
        load_dataset(folder, num_train=0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"validation": None}, r"missing validation\.jsonl; there is catalog\.jsonl, test\.jsonl, train\.jsonl"),
        ({"catalog": None}, r"missing catalog\.jsonl or catalog\.csv"),
        (dict.fromkeys(("train", "validation", "test", "catalog")), "there is nothing; a data set is a folder with"),
        ({"train": []}, r"train\.jsonl: no usable sample; every split needs at least one"),
        ({"test": [row(groundtruth=[])]}, r"test\.jsonl: no usable sample \(1 have an empty ground truth\)"),
    ],
)
def test_an_unusable_folder_says_what_is_missing(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        load_dataset(write_folder(tmp_path, **files))


def test_no_folder_at_all(tmp_path):
    with pytest.raises(DataError, match="does not exist; a data set is a folder .* or the word demo"):
        load_dataset(tmp_path / "redail")
    with pytest.raises(DataError, match="is a file; a data set is a folder"):
        load_dataset(write(tmp_path / "train.jsonl", row()))


def test_two_catalogs_are_one_too_many(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "catalog.csv").write_text("title,year\nRonin,1998\n", encoding="utf-8")
    with pytest.raises(DataError, match="keep the one that counts"):
        load_dataset(folder)


def test_a_catalog_that_matches_no_ground_truth(tmp_path):
    folder = write_folder(tmp_path, catalog=[{"title": "Ronin (1998)", "year": 1998}])
    with pytest.raises(DataError, match=r"none of the 3 .* every reward would be 0\. Ground truth: Ronin \(1998\), .*"):
        load_dataset(folder)


def test_bad_lines_of_all_files_come_in_one_error(tmp_path):
    with pytest.raises(DataError) as caught:
        load_dataset(write_folder(tmp_path, train=[row(), "x"], test=["y"]))
    places = [problem.split(": ")[0].rsplit("/", 1)[1] for problem in caught.value.problems]
    assert places == ["train.jsonl:2", "test.jsonl:1"]


# ------------------------------------------------------------------------------------------------ order of batches

SIZES = st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 1 << 40))


@given(SIZES)
def test_every_sample_comes_once_an_epoch(sizes):
    num_samples, batch_size, seed = sizes
    order = BatchOrder(num_samples, batch_size, seed)
    num_steps = -(-3 * num_samples // batch_size)
    stream = [index for step in range(num_steps) for index in order.global_indices(step)]
    for epoch in range(3):
        assert sorted(stream[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))
    assert 0 <= len(stream) - 3 * num_samples < batch_size


@given(SIZES, st.integers(1, 6), st.integers(0, 50))
def test_shares_of_all_processes_are_the_single_process_batch_in_order(sizes, dp_world, step):
    num_samples, more, seed = sizes
    batch_size = dp_world + more
    whole = BatchOrder(num_samples, batch_size, seed).indices(step)
    parts = [BatchOrder(num_samples, batch_size, seed, rank, dp_world).indices(step) for rank in range(dp_world)]
    assert [index for part in parts for index in part] == whole
    assert all(len(part) in (batch_size // dp_world, -(-batch_size // dp_world)) for part in parts)


@given(SIZES, st.lists(st.integers(0, 30), min_size=1))
def test_a_step_does_not_depend_on_the_steps_before_it(sizes, steps):
    one_by_one = {step: BatchOrder(*sizes).global_indices(step) for step in range(31)}
    assert all(BatchOrder(*sizes).global_indices(step) == one_by_one[step] for step in steps)


def test_the_order_changes_with_seed_and_epoch_and_is_fair():
    epochs = [BatchOrder(50, 50, seed=3).global_indices(epoch) for epoch in range(200)]
    assert len({tuple(epoch) for epoch in epochs}) == 200
    assert BatchOrder(50, 50, seed=4).global_indices(0) != epochs[0]
    # 200 draws of one in 50: 4 expected at the front, and more than 16 has odds of 1e-6 a sample.
    assert max(Counter(epoch[0] for epoch in epochs).values()) <= 16


def test_the_order_is_the_same_on_every_machine():
    assert BatchOrder(8, 5, seed=1).global_indices(0) + BatchOrder(8, 5, seed=1).global_indices(1) == [
        2,
        0,
        1,
        4,
        5,
        6,
        7,
        3,
        7,
        1,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 0), "at least 1"),
        ((5, 0, 0), "at least 1"),
        ((5, 1, -1), "seed at least 0"),
        ((5, 4, 0, 2, 2), r"dp_rank must be in \[0, 2\), got 2"),
        ((5, 2, 0, 0, 3), "batch_size 2 must be at least the number of processes 3"),
    ],
)
def test_impossible_orders_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchOrder(*arguments)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="step must be >= 0"):
        BatchOrder(5, 2, 0).indices(-1)
