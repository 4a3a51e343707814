"""Tables of samples as people bring them: cues, lists, ids of dialogs, the rows of the release."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from rankgrpo.baselines.ease import EaseTeacher
from rankgrpo.data.dialogs import dialog_ids
from rankgrpo.data.importers.convert import ImportOptions, import_dataset
from rankgrpo.data.importers.tables import read_tables
from rankgrpo.data.importers.turns import read_turns
from rankgrpo.data.load import load_dataset
from rankgrpo.data.prompt import format_prompt
from rankgrpo.data.samples import Candidate, Sample, Turn, read_samples, write_samples
from rankgrpo.errors import DataError
from rankgrpo.evaluation.health import check_dataset
from rankgrpo.items.format import ItemFormat

REDIAL = Path(os.environ.get("RANKGRPO_REDIAL", Path(__file__).parents[2] / "shared" / "data" / "redial"))
HI, ASK, MORE = Turn("user", "Hi, films like Heat?"), Turn("assistant", "Slow or fast?"), Turn("user", "Fast")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def only_split(imported):
    (samples,) = imported.splits.values()
    return samples


@pytest.mark.parametrize(
    ("value", "turns"),
    [
        ("User: Hi, films like Heat?\nSystem: Slow or fast?\nUser: Fast\nSystem: ", (HI, ASK, MORE)),
        ("User: Hi, films like Heat? System: Slow or fast? User: Fast System:", (HI, ASK, MORE)),
        ("SEEKER: Hi, films like Heat? RECOMMENDER: Slow or fast?", (HI, ASK)),
        ("Hi, films like Heat?", (HI,)),
        ("The system: it failed. User: none", (Turn("user", "The system: it failed. User: none"),)),
        (["Hi, films like Heat?", "Slow or fast?", "Fast"], (HI, ASK, MORE)),
        (["User: Hi, films like Heat?", "System: Slow or fast?", "User: Fast", "System:"], (HI, ASK, MORE)),
        ('["Hi, films like Heat?", "Slow or fast?", "Fast", ""]', (HI, ASK, MORE)),
        ("['Hi, films like Heat?', 'Slow or fast?']", (HI, ASK)),
        ("['Hi, films like Heat?' 'Slow or fast?']", (HI, ASK)),
        (
            "[{'role': 'user', 'content': 'Hi, films like Heat?'}\n {'role': 'bot', 'content': 'Slow or fast?'}]",
            (HI, ASK),
        ),
        ("['90s films, please]", (Turn("user", "['90s films, please]"),)),
        ([{"from": "human", "value": HI.content}, {"from": "gpt", "value": ASK.content}], (HI, ASK)),
        ([{"speaker": "Seeker", "text": HI.content}, {"speaker": "Recommender", "text": ""}], (HI,)),
        (
            [
                {"role": "system", "content": "You help."},
                {"role": "user", "content": HI.content},
                {"role": "assistant", "content": ASK.content},
            ],
            (HI, ASK),
        ),
        ([{"role": "user", "content": HI.content}, {"role": "system", "content": ASK.content}], (HI, ASK)),
        ([{"role": "user", "content": format_prompt((HI, ASK, MORE), 20)}], (HI, ASK, MORE)),
        (format_prompt((HI, ASK, MORE), 20) + "SYSTEM: \n", (HI, ASK, MORE)),
        ("System: ", ()),
        (["User:", ""], ()),
        ("", ()),
    ],
)
def test_conversations_in_every_shape(value, turns):
    assert read_turns(value) == turns


@pytest.mark.parametrize(
    "value",
    [
        7,
        None,
        {},
        [],
        [["a"]],
        "[array(['a', 'b']) array(['c'])]",
        [{"role": "user"}],
        [{"role": "judge", "content": "x"}],
    ],
)
def test_what_is_no_conversation(value):
    with pytest.raises(DataError, match="conversation"):
        read_turns(value)


def cut_rows(cue, ids=False):
    """Rows of two dialogs: each is cut before every answer, and ends in the cue of the next speaker."""
    dialogs = {
        "a": ["Hello", "What do you like?", "Heat (1995)", "Try Ronin (1998)", "Seen it"],
        "b": ["Hello", "Which genre?", "Cartoons", "Up (2009)?", "No"],
    }
    rows = []
    for name, said in dialogs.items():
        for end in (1, 3, 5):
            lines = [f"{('User', 'System')[place % 2]}: {text}" for place, text in enumerate(said[:end])]
            row = {"context": "\n".join([*lines, *cue]), "groundtruth": ["Thief (1981)"]}
            rows.append(row | ({"talk": name} if ids else {}))
    return rows


def test_a_cue_is_no_turn_and_strangers_hellos_stay_apart(tmp_path):
    plain = only_split(read_tables(write(tmp_path / "a.jsonl", cut_rows([])), columns={"conversation": "context"}))
    cued = only_split(
        read_tables(write(tmp_path / "a.jsonl", cut_rows(["System: "])), columns={"conversation": "context"})
    )
    assert plain == cued and all(sample.conversation[-1].role == "user" for sample in cued)
    # Hello of a, the rest of a, Hello of b, the rest of b: whose a Hello is, nothing says.
    assert dialog_ids(cued) == [0, 1, 1, 2, 3, 3]


def test_a_column_says_the_dialog(tmp_path):
    columns = {"conversation": "context", "dialog": "talk"}
    samples = only_split(read_tables(write(tmp_path / "a.jsonl", cut_rows(["System: "], ids=True)), columns=columns))
    assert [sample.dialog for sample in samples] == ["a"] * 3 + ["b"] * 3
    assert dialog_ids(samples) == [0, 0, 0, 1, 1, 1] and len({sample.id for sample in samples}) == 6
    write_samples(tmp_path / "kept.jsonl", samples)
    assert read_samples(tmp_path / "kept.jsonl") == (samples, [])
    (tmp_path / "kept.jsonl").write_text(
        '{"id": "x", "conversation": [], "seen_titles": [], "groundtruth": [], "dialog": 7}'
    )
    with pytest.raises(DataError, match="dialog must be a string, got a number"):
        read_samples(tmp_path / "kept.jsonl")


def test_an_id_that_rows_share_is_the_dialogs(tmp_path):
    path = write(tmp_path / "a.jsonl", [row | {"id": row["talk"]} for row in cut_rows([], ids=True)])
    imported = read_tables(path, columns={"conversation": "context"})
    assert [(sample.id, sample.dialog) for sample in only_split(imported)] == [
        (f"{name}-{number}", name) for name in "ab" for number in (1, 2, 3)
    ]
    assert "2 ids that several rows share, taken for those of their dialogs; the first: " in str(imported.notes)
    with pytest.raises(DataError, match="a.jsonl:2: id 'a' is there before; with a column of dialogs"):
        read_tables(path, columns={"conversation": "context", "dialog": "talk"})
    unique = write(tmp_path / "b.jsonl", [row | {"id": n} for n, row in enumerate(cut_rows([]))])
    assert only_split(read_tables(unique, columns={"conversation": "context"}))[3].id == "3"


def test_files_numbered_from_0_each_share_no_dialog(tmp_path):
    for split, films in (("train", ["Up", "Heat"]), ("validation", ["Heat", "Up"]), ("test", ["Up", "Up"])):
        rows = [
            {"id": n, "conversation": f"{split} {n}", "groundtruth": [[film, 2009]]} for n, film in enumerate(films)
        ]
        write(tmp_path / f"{split}.jsonl", rows)
    done, dataset = import_dataset(tmp_path, tmp_path / "out", ImportOptions())
    assert [sample.id for sample in dataset.test] == ["test-0", "test-1"] and "ids that several rows share" not in done
    assert "6 ids that several splits have, the name of the split put before; the first: " in done
    assert all(sample.dialog is None for sample in (*dataset.train, *dataset.validation, *dataset.test))
    assert not any(w.startswith("leak:") for w in check_dataset(dataset, baselines=False).warnings)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_tables_of_another_encoding_are_named(tmp_path, encoding):
    (tmp_path / "a.csv").write_text("conversation,groundtruth\nCaf\u00e9?,Up (2009)\n", encoding=encoding)
    with pytest.raises(
        DataError, match=r"a.csv:1: unreadable CSV from here on: 'utf-8' codec.*; save it as UTF-8 text"
    ):
        read_tables(tmp_path / "a.csv")


def test_a_column_of_a_usual_name_is_the_dialogs(tmp_path):
    rows = [{"conversation": f"User: film {n}", "groundtruth": ["Up (2009)"], "conv_id": n // 2} for n in range(4)]
    assert dialog_ids(only_split(read_tables(write(tmp_path / "a.jsonl", rows)))) == [0, 0, 1, 1]
    bad = write(tmp_path / "b.jsonl", [rows[0] | {"conv_id": ["x"]}])
    with pytest.raises(DataError, match="b.jsonl:1: dialog must be the id of a dialog, got a list"):
        read_tables(bad)


def test_openings_of_strangers():
    hello, long = Turn("user", "Hello"), Turn("user", "I am after a slow film about thieves in a large city at night")

    def sample(number, *turns):
        return Sample(f"rows-{number}", turns, (), ())

    # Two hellos alone, and two conversations that go on from it.
    strangers = [
        sample(0, hello),
        sample(1, hello),
        sample(2, hello, ASK, MORE),
        sample(3, hello, MORE),
        sample(4, hello),
    ]
    assert dialog_ids(strangers) == [0, 1, 2, 3, 4]
    # Said at length it is one question with several answers; alone and once it is the dialog's own.
    assert dialog_ids([sample(0, long), sample(1, long), sample(2, long, ASK, MORE), sample(3, long, MORE)]) == [0] * 4
    assert dialog_ids([sample(0, hello), sample(1, hello, ASK, MORE)]) == [0, 0]


def test_rows_that_are_only_a_cue_are_left_out(tmp_path):
    rows = [{"conversation": "System: ", "groundtruth": ["Up (2009)"]}, *cut_rows([])]
    rows = [{"conversation": row.get("conversation", row.get("context")), "groundtruth": ["Up (2009)"]} for row in rows]
    imported = read_tables(write(tmp_path / "a.jsonl", rows))
    assert len(only_split(imported)) == 6
    assert "1 rows that hold no more than the cue of the next speaker, left out; the first: " in str(imported.notes)
    assert "a.jsonl:1" in str(imported.notes) and "standard input" not in str(imported.notes)


def released_row(turns, title, completion=None):
    row = {
        "prompt": [{"role": "user", "content": format_prompt(turns, 20)}],
        "seen_titles": ["Heat"],
        "groundtruth_with_release_year": [[title, "1998"]],
    }
    return row if completion is None else row | {"completion": [{"role": "assistant", "content": completion}]}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".lines.json"])
def test_rows_of_the_release_in_other_files(tmp_path, suffix):
    rows = [
        released_row((HI, ASK, MORE), "Ronin", "Ronin (1998)\nThief (1981)"),
        released_row((HI,), "Up", "Up (2009)"),
    ]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pip install 'rankgrpo[import]'")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        write(path, rows)
    first, second = only_split(read_tables(path))
    assert (first.conversation, second.conversation) == ((HI, ASK, MORE), (HI,))
    assert (first.groundtruth, first.seen_titles) == ((("Ronin", 1998),), ("Heat",))
    assert (first.completion, second.completion) == ("Ronin (1998)\nThief (1981)", "Up (2009)")


def test_files_that_are_not_whole(tmp_path):
    (tmp_path / "a.json").write_text('[{"conversation": "hi"')
    with pytest.raises(DataError, match="a.json:1: broken JSON"):
        read_tables(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('[{"conversation": "hi", "groundtruth": ["Up (2009)"]}, 7]')
    with pytest.raises(DataError, match="b.json:2: expected a JSON object, got a number"):
        read_tables(tmp_path / "b.json")
    pytest.importorskip("pyarrow", reason="pip install 'rankgrpo[import]'")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="c.parquet: not a whole parquet file .* copy it again"):
        read_tables(tmp_path / "c.parquet")


def test_lists_in_csv_cells(tmp_path):
    cells = ["['Like Heat?', 'Slow?']", "['Ronin (1998)', 'Up (2009)']", '[""Heat""]']
    quoted = ",".join(f'"{cell}"' for cell in cells)
    (tmp_path / "a.csv").write_text(f"context,groundtruth,seen_titles\n{quoted}\n")
    (sample,) = only_split(read_tables(tmp_path / "a.csv", columns={"conversation": "context"}))
    assert sample.conversation == (Turn("user", "Like Heat?"), Turn("assistant", "Slow?"))
    assert sample.groundtruth == (("Ronin", 1998), ("Up", 2009)) and sample.seen_titles == ("Heat",)


def test_drawn_splits_keep_dialogs_whole(tmp_path):
    rows = []
    for dialog in range(20):
        for end in (1, 2, 3):
            said = ["Hello", f"What about genre {dialog}?", f"Film {dialog} it is"][:end]
            rows.append({"conversation": said, "groundtruth": ["Up (2009)", "Heat (1995)"], "dialog_id": dialog})
    _, dataset = import_dataset(write(tmp_path / "a.jsonl", rows), tmp_path / "out", ImportOptions(test_frac=0.2))
    names = [{sample.dialog for sample in dataset.split(name)} for name in ("train", "validation", "test")]
    assert [len(dialogs) for dialogs in names] == [14, 2, 4] and len(set.union(*names)) == 20
    assert not any(w.startswith("leak:") for w in check_dataset(dataset, baselines=False).warnings)


def test_conversations_about_items_of_another_format(tmp_path):
    (tmp_path / "books.csv").write_text("title,author\nEmma,Jane Austen\nDune,Frank Herbert\n,Nobody\n")
    entries = ["emma by  Jane Austen", {"title": "Dune", "author": "Frank Herbert"}]
    rows = [{"conversation": f"User: book {n}", "groundtruth": [entries[n % 2]]} for n in range(12)]
    options = ImportOptions(item=ItemFormat("{title} by {author}"), catalog=tmp_path / "books.csv")
    done, dataset = import_dataset(write(tmp_path / "a.jsonl", rows), tmp_path / "out", options)
    samples = [*dataset.train, *dataset.validation, *dataset.test]
    assert {line for s in samples for line, _ in s.groundtruth} == {"Emma by Jane Austen", "Dune by Frank Herbert"}
    assert sum(item.popularity for item in dataset.catalog) == len(dataset.train) == 10
    assert "books.csv:4: an empty title" in done or "books.csv:4: no title" in done
    with pytest.raises(DataError, match="need a catalog with these columns: --catalog FILE"):
        import_dataset(tmp_path / "a.jsonl", tmp_path / "new", replace(options, catalog=None))
    bad = write(tmp_path / "b.jsonl", [{"conversation": "hi", "groundtruth": [7]}])
    with pytest.raises(DataError, match="groundtruth holds 7, expected lines '{title} by {author}'"):
        import_dataset(bad, tmp_path / "new", options)


def test_weights_candidates_and_further_columns_are_kept(tmp_path):
    (tmp_path / "books.csv").write_text("title\n" + "".join(f"Book {n}\n" for n in range(9)))
    wanted = [{"title": "Book 6", "weight": 4}, {"title": "book 7", "weight": 1}, {"title": "Book 8", "weight": 0}]
    offered = [{"title": "Book 6", "text": "Ships."}, "book 7", {"item": "Book 8"}]
    rows = [
        {"conversation": f"User: book {n}", "groundtruth": wanted, "candidates": offered, "mood": "sad", "tags": ["a"]}
        for n in range(10)
    ]
    options = ImportOptions(item=ItemFormat("{title}"), catalog=tmp_path / "books.csv")
    done, dataset = import_dataset(write(tmp_path / "a.jsonl", rows), tmp_path / "out", options)
    for sample in (*dataset.train, *dataset.validation, *dataset.test):
        assert sample.groundtruth == (("Book 6", None), ("Book 7", None)) and sample.weights == (4, 1)
        assert sample.candidates == (Candidate("Book 6", None, "Ships."), Candidate("Book 7"), Candidate("Book 8"))
        assert sample.fields == (("mood", "sad"),)
    assert (
        f"1 columns that are no field, kept for prompts that name them; the first: {tmp_path / 'a.jsonl'}: mood" in done
    )
    assert "neither text nor numbers, left out" in done and "a.jsonl: tags" in done
    bad = write(tmp_path / "b.jsonl", [rows[0] | {"candidates": ["Book 6", "Book 7", "Book 70"]}])
    with pytest.raises(DataError, match="b.jsonl:1: candidate 'Book 70' is not in the catalog; every candidate is"):
        import_dataset(bad, tmp_path / "new", options)


def test_weights_and_candidates_of_films(tmp_path):
    wanted = [["Seven (a.k.a. Se7en)", 1995, 4], {"title": "Up", "year": "2009", "weight": 0.5}, ["Heat", 1995, 0]]
    offered = ["Heat (1995)", ["Seven (a.k.a. Se7en)", 1995], "Up (2009)", "Alien"]
    rows = [{"said": f"User: film {n}", "right": wanted, "candidates": offered} for n in range(10)]
    options = ImportOptions(columns={"conversation": "said", "groundtruth": "right"})
    done, dataset = import_dataset(write(tmp_path / "a.jsonl", rows), tmp_path / "out", options)
    assert "10 candidates without a year, left out; the first: " in done and "a.jsonl:1: 'Alien'" in done
    sample = dataset.test[0]
    assert sample.groundtruth == (("Seven", 1995), ("Up", 2009)) and sample.weights == (4, 0.5)
    assert sample.candidates == (Candidate("Heat", 1995), Candidate("Seven", 1995), Candidate("Up", 2009))
    assert {item.line for item in dataset.catalog} == {"Seven (1995)", "Up (2009)", "Heat (1995)"}
    again = replace(options, columns={})
    _, copy = import_dataset(tmp_path / "out" / "train.jsonl", tmp_path / "again", again)
    assert copy.train[0].weights == (4, 0.5) and copy.train[0].candidates == sample.candidates


# ----------------------------------------------------------------------------------------------------------------------
# The leak check, on real dialogs


@pytest.fixture(scope="module")
def redial():
    if not REDIAL.is_dir():
        pytest.skip(f"{REDIAL} is not here; ReDial lies beside the repository where this is measured")
    dataset = load_dataset(REDIAL)
    return replace(dataset, train=dataset.train[:3000])


def recall_out_of_fold(samples, catalog):
    from rankgrpo.evaluation.evaluate import score_items

    teacher = EaseTeacher.fit(samples, catalog, num_folds=5)
    return float(score_items(samples, teacher.rank_all(samples), catalog).metrics["recall@20"].double().mean())


@pytest.mark.slow
def test_dialogs_told_apart_wrongly_are_warned_of(redial, tmp_path):
    """Rows without ids, as text that ends in a cue: read right they say what the true ids say."""
    rows = [
        {
            "conversation": "".join(
                f"{'User' if turn.role == 'user' else 'System'}: {' '.join(turn.content.split())}\n"
                for turn in sample.conversation
            )
            + "System: ",
            "groundtruth": [list(item) for item in sample.groundtruth],
            "seen_titles": list(sample.seen_titles),
        }
        for sample in redial.train
    ]
    samples = only_split(read_tables(write(tmp_path / "rows.jsonl", rows)))
    true_dialogs = len(set(dialog_ids(redial.train)))
    assert abs(len(set(dialog_ids(samples))) - true_dialogs) <= 0.01 * true_dialogs
    true = recall_out_of_fold(redial.train, redial.catalog)
    assert abs(recall_out_of_fold(samples, redial.catalog) - true) < 0.02
    assert not any("fitted without" in w for w in check_dataset(replace(redial, train=samples)).warnings)
    # Each row a dialog of its own: the next cut of a dialog, in another fold, betrays what is right.
    torn = [replace(sample, dialog=str(place)) for place, sample in enumerate(redial.train)]
    assert recall_out_of_fold(torn, redial.catalog) > 1.5 * true
    (warning,) = [w for w in check_dataset(replace(redial, train=torn)).warnings if "fitted without" in w]
    assert warning.startswith("leak: EASE finds") and "--columns dialog=NAME" in warning
