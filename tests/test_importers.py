import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from rankgrpo.data.importers.catalogs import read_items
from rankgrpo.data.importers.common import Notes, parse_groundtruth, parse_name, parse_seen
from rankgrpo.data.importers.convert import ImportOptions, import_dataset
from rankgrpo.data.importers.download import download, fetch_if_url
from rankgrpo.data.importers.redial import read_redial
from rankgrpo.data.importers.saved import parse_prompt, read_saved
from rankgrpo.data.importers.tables import read_tables
from rankgrpo.data.load import load_dataset
from rankgrpo.data.prompt import format_prompt
from rankgrpo.data.samples import Turn
from rankgrpo.errors import DataError
from rankgrpo.evaluation.evaluate import score_completions
from rankgrpo.items.catalog import Catalog, Item

# ----------------------------------------------------------------------------------------------------------------------
# ReDial. The conversation is made up; the fields are those of the release.

SEEKER, RECOMMENDER = 956, 957


def form(suggested, seen, liked):
    return {"suggested": suggested, "seen": seen, "liked": liked}


def conversation(number, *texts, mentions=None, seeker=(), recommender=()):
    """A line of train_data.jsonl; texts of the seeker begin with "S:", the recommender's with "R:"."""
    senders = {"S": SEEKER, "R": RECOMMENDER}
    return {
        "movieMentions": mentions if mentions is not None else [],
        "respondentQuestions": dict(recommender) or [],
        "messages": [
            {"timeOffset": place, "text": text[3:], "senderWorkerId": senders[text[0]], "messageId": 1000 + place}
            for place, text in enumerate(texts)
        ],
        "conversationId": str(number),
        "respondentWorkerId": RECOMMENDER,
        "initiatorWorkerId": SEEKER,
        "initiatorQuestions": dict(seeker) or [],
    }


MENTIONS = {
    "1": "Heat  (1995)",
    "2": "Ronin (1998) ",
    "3": "Thief (1981)",
    "4": None,
    "5": "Some TV show",
    "6": "It (201)",
    "8": "Up (2009)",
}
FULL = conversation(
    391,
    "S: Hi there",
    "S: I love @1!",
    "R: Try @2, or @5",
    "R: or @4.",
    "S: Seen it. And @3?",
    "R: @3 is great, @7 too, @6 and @8",
    mentions=MENTIONS,
    seeker={"1": form(0, 1, 1), "2": form(1, 1, 1), "3": form(0, 2, 2), "7": form(1, 0, 0), "8": form(1, 0, 2)},
    recommender={"1": form(0, 1, 1), "2": form(1, 1, 2), "3": form(1, 0, 1), "7": form(1, 0, 1), "8": form(1, 0, 1)},
)
OTHERS = [
    conversation(n, "S: Hi", f"R: {film}", mentions={"1": "Heat (1995)"}) for n, film in ((400, "@1"), (17990, "@1"))
]
TEST = conversation(9001, "R: Hello, do you know @2?", "S: Yes", "R: @1", mentions={"2": "Ronin (1998)"})
NAMES = "movieId,movieName,nbMentions\n1,Heat  (1995),9\n7,Speed (1994),3\n"


def write_redial(folder, train=(FULL, *OTHERS), test=(TEST,), names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}_data.jsonl").write_text(lines, encoding="utf-8")
    (folder / "movies_with_mentions.csv").write_text(names, encoding="utf-8")
    return folder


def zipped(folder, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, f"redial_dataset/{file.name}")
    return path


def test_a_redial_conversation_turn_by_turn(tmp_path):
    imported = read_redial(write_redial(tmp_path / "redial"))
    first, second = (sample for sample in imported.splits["train"] if sample.id.startswith("redial-391-"))
    assert first.id == "redial-391-1" and second.id == "redial-391-3"
    assert first.conversation == (Turn("user", "Hi there I love Heat (1995)!"),)
    assert first.seen_titles == ("Heat",)
    # Speed is disliked; Thief was named by the seeker first; It has no possible year, the show none at all.
    assert first.groundtruth == (("Ronin", 1998), ("Up", 2009))
    assert second.groundtruth == (("Up", 2009),)
    assert second.conversation[1:] == (
        Turn("assistant", "Try Ronin (1998), or Some TV show or @4."),
        Turn("user", "Seen it. And Thief (1981)?"),
    )
    assert second.seen_titles == ("Heat", "Ronin", "Some TV show", "Thief")
    assert imported.notes.count("films without a year, never ground truth") == 1
    assert imported.notes.count("films with an impossible year, never ground truth") == 1
    assert imported.notes.count("mentions of a film without a name, left as they are") == 1


@pytest.mark.parametrize(
    ("choice", "groundtruth"),
    [
        ("named", [("Ronin", 1998), ("Speed", 1994), ("Up", 2009)]),
        ("accepted", [("Ronin", 1998), ("Up", 2009)]),
        ("liked", [("Ronin", 1998), ("Up", 2009)]),
        ("unseen", [("Up", 2009)]),
    ],
)
def test_redial_forms_choose_the_ground_truth(tmp_path, choice, groundtruth):
    imported = read_redial(write_redial(tmp_path / "redial"), choice=choice)
    samples = {sample.id: sample for split in imported.splits.values() for sample in split}
    first = samples.get("redial-391-1", samples["redial-391-3"])  # Ronin, alone in the first turn, was seen
    assert list(first.groundtruth) == groundtruth


def test_redial_splits_and_films(tmp_path):
    imported = read_redial(write_redial(tmp_path / "redial"))
    ids = {name: [sample.id for sample in samples] for name, samples in imported.splits.items()}
    assert ids["validation"] == ["redial-17990-1"]  # by number: as text, 400 would be the newest
    assert "redial-400-1" in ids["train"]
    assert ids["test"] == ["redial-9001-2"]  # the first turn has no conversation before it
    assert imported.splits["test"][0].seen_titles == ("Ronin",)
    assert [(item.title, item.year, item.popularity) for item in imported.items] == [
        ("Up", 2009, 2),
        ("Heat", 1995, 1),
        ("Ronin", 1998, 1),
        ("Speed", 1994, 0),
        ("Thief", 1981, 0),
    ]


def test_redial_archive_becomes_a_data_set(tmp_path):
    archive = zipped(write_redial(tmp_path / "files"), tmp_path / "redial_dataset.zip")
    summary, _ = import_dataset(archive, tmp_path / "out", ImportOptions())
    dataset = load_dataset(tmp_path / "out")
    assert len(dataset.catalog) == 5 and all("'Some TV show' is not in the catalog" in str(p) for p in dataset.problems)
    assert summary.startswith("imported ReDial")
    assert sorted(os.listdir(tmp_path / "out")) == ["catalog.jsonl", "test.jsonl", "train.jsonl", "validation.jsonl"]
    folder, again = import_dataset(tmp_path / "files", tmp_path / "again", ImportOptions())
    assert "ReDial" in folder and again.test == dataset.test
    for name in os.listdir(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_redial_as_hugging_face_lists_it(tmp_path):
    listed = FULL | {
        "movieMentions": [{"movieId": key, "movieName": name} for key, name in MENTIONS.items()],
        "initiatorQuestions": [{"movieId": key} | value for key, value in FULL["initiatorQuestions"].items()],
        "respondentQuestions": [{"movieId": key} | value for key, value in FULL["respondentQuestions"].items()],
    }
    plain = read_redial(write_redial(tmp_path / "a"))
    assert read_redial(write_redial(tmp_path / "b", train=(listed, *OTHERS))).splits == plain.splits


def test_a_damaged_archive_is_refused(tmp_path):
    archive = zipped(write_redial(tmp_path / "files"), tmp_path / "redial_dataset.zip")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a whole zip archive .* download it again"):
        import_dataset(archive, tmp_path / "out", ImportOptions())
    archive.write_bytes(whole[:200] + bytes(byte ^ 255 for byte in whole[200:220]) + whole[220:])
    with pytest.raises(DataError, match="damaged|not a whole zip archive"):
        import_dataset(archive, tmp_path / "out", ImportOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "redial_dataset.zip"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("messages"), "missing messages"),
        (lambda row: row.update(conversationId="x"), "conversationId must be a number, got 'x'"),
        (lambda row: row["messages"][0].update(senderWorkerId=1), r"messages\[0\].senderWorkerId is neither"),
        (lambda row: row.update(movieMentions="1"), "movieMentions must be an object, got a string"),
    ],
)
def test_wrong_redial_lines_are_named(tmp_path, change, message):
    row = json.loads(json.dumps(FULL))
    change(row)
    folder = write_redial(tmp_path / "redial", train=(OTHERS[0], row))
    with pytest.raises(DataError, match=rf"train_data.jsonl:2: {message}"):
        read_redial(folder)


def test_a_cut_off_redial_file_is_named(tmp_path):
    folder = write_redial(tmp_path / "redial")
    text = (folder / "train_data.jsonl").read_text()
    (folder / "train_data.jsonl").write_text(text[:-40])
    with pytest.raises(DataError, match=r"the copy is cut off:\n.*train_data.jsonl:3: broken JSON"):
        read_redial(folder)
    (folder / "test_data.jsonl").unlink()
    with pytest.raises(DataError, match="test_data.jsonl missing; ReDial has"):
        read_redial(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Folders of save_to_disk

TURNS = (
    Turn("user", "Something like Heat (1995)?\nOr {braces}"),
    Turn("assistant", "Slow or fast?"),
    Turn("user", "Fast"),
)


def saved_row(turns=TURNS, groundtruth=(("Ronin", "1998"),), completion=None, seen=("Heat",)):
    row = {
        "prompt": [{"role": "user", "content": format_prompt(turns, 20)}],
        "seen_titles": list(seen),
        "groundtruth_with_release_year": [list(pair) for pair in groundtruth],
    }
    if completion is not None:
        row["completion"] = [{"role": "assistant", "content": completion}]
    return row


def write_saved(folder, rows, num_files=2):
    """What datasets.Dataset.save_to_disk writes: Arrow streams and the state that names them."""
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'rankgrpo[import]'")
    folder.mkdir(parents=True)
    names = [f"data-{place:05}-of-{num_files:05}.arrow" for place in range(num_files)]
    table = pyarrow.Table.from_pylist(rows)
    for place, name in enumerate(names):
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table.take([i for i in range(len(rows)) if i * num_files // len(rows) == place]))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def write_release(root):
    other = (Turn("user", "Cartoons please"),)
    plain = [saved_row(), saved_row(groundtruth=[("Thief", "1981")]), saved_row(other, [("Up", "2009")], seen=())]
    write_saved(root / "grpo" / "grpo_dataset" / "train", plain)
    write_saved(root / "sft_dataset" / "train", [saved_row(completion="Ronin (1998)\nThief (1981)")], num_files=1)
    write_saved(root / "sft_dataset" / "validation", [saved_row(completion="Heat (1995)")], num_files=1)
    write_saved(root / "sft_dataset" / "test", [saved_row(completion="Heat (1995)")], num_files=1)
    (root / "sft_dataset" / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    catalog = [("Ronin", 1998), ("Thief", 1981), ("Up", 2009), ("The Wall", 201), ("ronin", 1998)]
    (root / "gt_catalog.pkl").write_bytes(pickle.dumps(catalog))
    return root


def test_prompts_of_the_release_are_cut_open():
    assert parse_prompt(format_prompt(TURNS, 20)) == TURNS
    for text, message in (
        ("Hello", "the prompt does not say 'Here is the conversation:'"),
        ("Here is the conversation: hi\nUSER: there", "expected turns that begin with USER: or SYSTEM:"),
        ("Here is the conversation: ", "expected turns"),
    ):
        with pytest.raises(DataError, match=message):
            parse_prompt(text)


def test_the_release_as_a_whole(tmp_path):
    summary, _ = import_dataset(write_release(tmp_path / "processed_datasets"), tmp_path / "out", ImportOptions())
    dataset = load_dataset(tmp_path / "out")
    first, second, third = dataset.train
    assert first.conversation == second.conversation == TURNS and first.id != second.id
    assert (first.groundtruth, second.groundtruth) == ((("Ronin", 1998),), (("Thief", 1981),))
    assert (first.completion, second.completion) == ("Ronin (1998)\nThief (1981)", None)
    assert [len(dataset.validation), len(dataset.test)] == [1, 1]
    assert [(item.title, item.popularity) for item in dataset.catalog] == [("Ronin", 1), ("Thief", 1), ("Up", 1)]
    assert "1 catalog rows that are no item, left out; the first" in summary and "year 201 is impossible" in summary
    assert "1 catalog rows that name an item again" in summary


def test_what_datasets_itself_writes(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the datasets package is not installed")
    parts = {name: datasets.Dataset.from_list([saved_row(completion="Heat (1995)")] * 3) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")
    splits = read_saved(tmp_path / "data").splits
    assert {name: len(samples) for name, samples in splits.items()} == {"train": 3, "test": 3}
    assert splits["train"][2].conversation == TURNS and splits["train"][2].groundtruth == (("Ronin", 1998),)
    assert [sample.id for sample in splits["train"]] == ["data-train-0", "data-train-1", "data-train-2"]


def test_years_of_the_release(tmp_path):
    groundtruth = [("Ronin", "1998"), ("Thief", ""), ("Heat", "95"), ("Up", "n/a"), ("Ronin", "1998")]
    row = saved_row(groundtruth=groundtruth, seen=("Heat", "", "Heat"))
    imported = read_saved(write_saved(tmp_path / "train", [row], num_files=1))
    assert imported.splits["train"][0].seen_titles == ("Heat",)
    assert imported.notes.count("seen titles that are none, left out") == 1
    assert imported.splits["train"][0].groundtruth == (("Ronin", 1998),)
    assert imported.notes.count("ground-truth entries without a possible year, left out") == 2
    assert imported.notes.count("ground-truth entries without a year, left out") == 1


def test_damaged_and_mixed_saved_folders(tmp_path):
    root = write_release(tmp_path / "release")
    folder = root / "sft_dataset" / "test"
    arrow = folder / "data-00000-of-00001.arrow"
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[:-200])
    with pytest.raises(DataError, match="data-00000-of-00001.arrow: not a whole Arrow stream .* copy it again"):
        read_saved(root)
    arrow.unlink()
    with pytest.raises(DataError, match="missing, of 1 files that state.json names; copy it again"):
        read_saved(root)
    arrow.write_bytes(whole)
    (folder / "state.json").unlink()
    with pytest.raises(DataError, match="Arrow files without state.json"):
        read_saved(root)
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError, match="state.json: not what save_to_disk writes"):
        read_saved(root)
    write_saved(root / "more" / "train", [saved_row()], num_files=1)
    with pytest.raises(DataError, match="several folders for train: .*; name the one to import"):
        read_saved(root)
    write_saved(tmp_path / "odd" / "part7", [saved_row()], num_files=1)
    with pytest.raises(DataError, match="part7: its name is no split"):
        read_saved(tmp_path / "odd")
    write_saved(tmp_path / "columns" / "train", [{"text": "hi"}], num_files=1)
    with pytest.raises(DataError, match="column groundtruth_with_release_year and prompt and seen_titles missing"):
        read_saved(tmp_path / "columns")
    write_saved(tmp_path / "prompts" / "train", [saved_row() | {"prompt": [{"role": "user", "content": "Hi"}]}], 1)
    with pytest.raises(DataError, match=r"row 0: the prompt does not say"):
        read_saved(tmp_path / "prompts")
    with pytest.raises(DataError, match="no saved data set here"):
        read_saved(tmp_path / "columns" / "nothing")


# ----------------------------------------------------------------------------------------------------------------------
# JSONL and CSV


def write_table(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_csv_under_names_of_its_own(tmp_path):
    (tmp_path / "dialogs.csv").write_text(
        "Dialog,Liked,Part\n"
        '"User: I like Heat (1995)\nAssistant: Try Ronin\nUser: more",Ronin (1998)|Thief,train\n'
        "hello there,Up (2009),dev\n"
        "and again,Heat (1995),test\n",
        encoding="utf-8",
    )
    (tmp_path / "films.csv").write_text("Name,Year\nRonin,1998\nThief,1981.0\nUp,2009\nHeat,1995\n,1990\n")
    options = ImportOptions(
        columns={"conversation": "dialog", "groundtruth": "liked", "split": "part"}, catalog=tmp_path / "films.csv"
    )
    with pytest.raises(DataError, match=r"films.csv: no item in this catalog"):
        import_dataset(tmp_path / "dialogs.csv", tmp_path / "out", options)
    (tmp_path / "films.csv").write_text("Title,Year\nRonin,1998\nThief,1981.0\nUp,2009\nHeat,1995\n,1990\n")
    summary, _ = import_dataset(tmp_path / "dialogs.csv", tmp_path / "out", options)
    dataset = load_dataset(tmp_path / "out")
    (sample,) = dataset.train
    assert [turn.role for turn in sample.conversation] == ["user", "assistant", "user"]
    assert sample.groundtruth == (("Ronin", 1998), ("Thief", 1981)) and sample.seen_titles == ()
    assert sample.id == "dialogs-2"
    assert dataset.validation[0].groundtruth == (("Up", 2009),) and dataset.test[0].groundtruth == (("Heat", 1995),)
    assert "1 ground-truth entries without a year, taken from the catalog" in summary


def test_jsonl_in_chat_form_and_missing_splits(tmp_path):
    rows = [
        {
            "conversation": [{"role": "Human", "content": f"I like film {place}"}],
            "groundtruth": [["Heat", "1995"], "Ronin (1998)"],
            "seen_titles": ["Up (2009)", ["Thief", 1981]],
        }
        for place in range(20)
    ]
    write_table(tmp_path / "mine.jsonl", rows)
    options = ImportOptions(validation_frac=0.2, test_frac=0.25)
    summary, _ = import_dataset(tmp_path / "mine.jsonl", tmp_path / "out", options)
    dataset = load_dataset(tmp_path / "out")
    assert [len(dataset.train), len(dataset.validation), len(dataset.test)] == [12, 4, 4]
    assert dataset.train[0].seen_titles == ("Up (2009)", "Thief (1981)")
    assert [(item.title, item.popularity) for item in dataset.catalog] == [("Heat", 12), ("Ronin", 12)]
    assert "2 splits missing in the source, drawn from train" in summary
    import_dataset(tmp_path / "mine.jsonl", tmp_path / "again", options)
    assert (tmp_path / "again" / "test.jsonl").read_bytes() == (tmp_path / "out" / "test.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"dialog": "hi", "groundtruth": []}, r"missing conversation \(conversation\); there is dialog, groundtruth"),
        ({"conversation": [], "groundtruth": []}, "conversation must be a list of turns or a text"),
        (
            {"conversation": [{"role": "judge", "content": "x"}], "groundtruth": []},
            r"role must be one of .* got 'judge'",
        ),
        ({"conversation": [{"role": "user"}], "groundtruth": []}, r"conversation\[0\] must be an object with role"),
        ({"conversation": "hi", "groundtruth": 7}, "groundtruth must be a list, or one string"),
        ({"conversation": "hi", "groundtruth": [7]}, "groundtruth holds 7, expected .title, year. or"),
        ({"conversation": "hi", "groundtruth": [["Heat", 1995, "2"]]}, "expected .title, year. or"),
        ({"conversation": "hi", "groundtruth": [["Heat", 1995, -1]]}, "the weight must be a number of 0 or more"),
        ({"conversation": "hi", "groundtruth": [["Heat", 1995, 2], "Heat (1995)"]}, "weighs 2 before and 1 here"),
        (
            {"conversation": "hi", "groundtruth": ["Heat (1995)"], "candidates": "Up (2009)|Ronin (1998)"},
            "the ground truth Heat .1995. is not among the 2 candidates",
        ),
        (
            {"conversation": "hi", "groundtruth": [], "candidates": [["Up", 2009], "Up (2009)"]},
            "is a candidate already",
        ),
        ({"conversation": "hi", "groundtruth": [], "split": "holdout"}, "split must be one of train"),
        ({"conversation": "hi", "groundtruth": [], "completion": 1}, "completion must be a string"),
        ({"conversation": "hi", "groundtruth": [], "seen_titles": [[]]}, r"seen_titles holds \[\], expected titles"),
    ],
)
def test_wrong_rows_are_named(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"rows.jsonl:1: .*{message}"):
        read_tables(write_table(tmp_path / "rows.jsonl", [row]))


# ----------------------------------------------------------------------------------------------------------------------
# Catalogs, names, formats


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Evil()), "refused, it wants to import posix.system"),
        (pickle.dumps([("Heat", 1995), Evil()]), "refused, it wants to import"),
        (pickle.dumps([Path("x")]), "refused, it wants to import pathlib"),
        (pickle.dumps([("Heat", 1995)])[:-6], "not a whole pickle"),
        (b"", "not a whole pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a whole pickle"),
        (pickle.dumps({"Heat": 1995}), "expected a pickled list or set of"),
        (pickle.dumps([7, "x"]), "no item in this catalog"),
    ],
)
def test_pickles_that_are_no_plain_catalog(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "catalog.pkl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_items(tmp_path / "catalog.pkl", Notes())
    assert not (tmp_path / "evil").exists()


def test_a_pickled_set_has_one_order(tmp_path):
    films = [(f"Film {place}", str(1900 + place)) for place in range(50)]
    (tmp_path / "catalog.pkl").write_bytes(pickle.dumps(set(films)))
    assert [(item.title, item.year) for item in read_items(tmp_path / "catalog.pkl", Notes())] == sorted(
        (title, int(year)) for title, year in films
    )


def test_names_and_ground_truth():
    assert parse_name(" Heat   (1995) ") == ("Heat", 1995)
    assert parse_name("Apollo (13)") == ("Apollo (13)", None)
    assert parse_name("[REC] [2007]") == ("[REC]", 2007)
    with pytest.raises(DataError, match="year 201 is impossible"):
        parse_name("The Wall (201)")
    notes = Notes()
    assert parse_groundtruth("Heat (1995)\n| Heat (1995)|Up", None, notes, "row 1") == ((("Heat", 1995),), ())
    assert str(notes) == "1 ground-truth entries without a year, left out; the first: row 1: 'Up'"


@pytest.mark.parametrize(
    ("text", "films"),
    [
        ("['Heat (1995)' 'Ronin (1998)']", ["Heat (1995)", "Ronin (1998)"]),  # as numpy prints an array
        ("[['Heat' '1995']\n ['Ronin' '1998']]", ["Heat (1995)", "Ronin (1998)"]),
        ("[('Heat', 1995), ('Ronin', 1998)]", ["Heat (1995)", "Ronin (1998)"]),
        ("Other 13 (2001), Next 13 (2002)", ["Other 13 (2001)", "Next 13 (2002)"]),
        (
            "Heat (1995); Ronin (1998) / Up (2009)|Thief (1981)",
            ["Heat (1995)", "Ronin (1998)", "Up (2009)", "Thief (1981)"],
        ),
        (["Heat (1995), Ronin (1998)"], ["Heat (1995)", "Ronin (1998)"]),
        ("The Good, the Bad and the Ugly (1966)", ["The Good, the Bad and the Ugly (1966)"]),
        ("1984 (1956) (1984)", ["1984 (1956) (1984)"]),
        ("Dune (1984), Messiah (2001)", ["Dune (1984), Messiah (2001)"]),  # the catalog has a film of this name
    ],
)
def test_films_of_one_text(text, films):
    catalog = Catalog([Item("Heat", 1995), Item("Dune (1984), Messiah", 2001)])
    notes = Notes()
    groundtruth, weights = parse_groundtruth(text, catalog, notes, "row 1")
    assert [f"{title} ({year})" for title, year in groundtruth] == films and weights == ()
    assert list(parse_seen(text, catalog, notes, "row 1")) == films
    assert notes.count("films whose title holds a year, taken as one film each") == ("1956" in text)


def test_the_year_of_a_seen_film_says_which_was_seen(tmp_path):
    (tmp_path / "films.csv").write_text("title,year\nThe Thing,1982\nThe Thing,2011\nHeat,1995\n")
    rows = [
        {"conversation": f"film {n}", "groundtruth": [["The Thing", 1982], ["Heat", 1995]], "seen_titles": seen}
        for n, seen in enumerate(4 * [[["The Thing", 1982]], ["The Thing (1982)"], [["The Thing", 201]]])
    ]
    options = ImportOptions(catalog=tmp_path / "films.csv")
    _, dataset = import_dataset(write_table(tmp_path / "a.jsonl", rows), tmp_path / "out", options)
    hits = {}
    for sample in (*dataset.train, *dataset.validation, *dataset.test):
        text = "The Thing (1982)\nHeat (1995)\nThe Thing (2011)"
        scores = score_completions([sample], [text], dataset.catalog, num_ranks=3)
        hits[sample.seen_titles] = scores.hits.tolist()
    # Of a year that is none the title is kept, and a bare title lets what the ground truth names count.
    assert hits == {("The Thing (1982)",): [[0, 1, 0]], ("The Thing",): [[1, 1, 0]]}


def test_unknown_and_mixed_sources(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="does not exist; what can be imported"):
        import_dataset(tmp_path / "none", out, ImportOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="which holds nothing: not a known format"):
        import_dataset(tmp_path / "empty", out, ImportOptions())
    mixed = write_redial(tmp_path / "mixed")
    write_table(mixed / "train.jsonl", [{"conversation": "hi", "groundtruth": ["Heat (1995)"]}])
    with pytest.raises(DataError, match="looks like redial and table at once; say which by --format"):
        import_dataset(mixed, out, ImportOptions())
    assert "ReDial" in import_dataset(mixed, out, ImportOptions(format="redial"))[0]
    with pytest.raises(DataError, match="out exists; remove it, or name another folder"):
        import_dataset(mixed, out, ImportOptions(format="redial"))
    with pytest.raises(DataError, match="--columns belongs to tables"):
        import_dataset(mixed, tmp_path / "new", ImportOptions(format="redial", columns={"id": "key"}))
    write_table(tmp_path / "none.jsonl", [{"conversation": "hi", "groundtruth": ["Heat"]}])
    with pytest.raises(
        DataError, match="no training sample with ground truth\n  1 ground-truth entries without a year"
    ):
        import_dataset(tmp_path / "none.jsonl", tmp_path / "new", ImportOptions())
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Downloads


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    server = HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "served"))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path / "served"
    server.shutdown()
    thread.join()
    server.server_close()


def test_downloads_are_what_was_asked_for(tmp_path, server):
    url, served = server
    content = b"x" * 3_000_000
    (served / "file.zip").write_bytes(content)
    checksum = hashlib.sha256(content).hexdigest()
    with pytest.raises(DataError, match=f"another file than asked for: its sha256 is {checksum}"):
        download(f"{url}/file.zip", "0" * 64, tmp_path / "kept")
    assert not list((tmp_path / "kept").iterdir())
    path = fetch_if_url(f"{url}/file.zip", checksum.upper(), tmp_path / "kept")
    assert path.read_bytes() == content
    (served / "file.zip").unlink()
    assert fetch_if_url(f"{url}/file.zip", checksum, tmp_path / "kept") == path
    with pytest.raises(DataError, match="not fetched .* download it by other means"):
        download(f"{url}/other.zip", checksum, tmp_path / "kept")
    for source, sha256, message in (
        (f"{url}/file.zip", None, "a URL needs --sha256"),
        ("file.zip", checksum, "--sha256 belongs to a URL"),
        (f"{url}/file.zip", "abc", "must be the 64 hexadecimal digits"),
    ):
        with pytest.raises(DataError, match=message):
            fetch_if_url(source, sha256, tmp_path / "kept")


@pytest.mark.slow
def test_the_command(tmp_path):
    archive = zipped(write_redial(tmp_path / "files"), tmp_path / "redial_dataset.zip")
    words = [sys.executable, "-m", "rankgrpo", "data", "import", str(archive), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "imported ReDial" in done.stdout and (tmp_path / "out" / "train.jsonl").is_file()
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "exists; remove it" in done.stderr and "Traceback" not in done.stderr
