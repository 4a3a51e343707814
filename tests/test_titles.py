"""Catalogs in library order, and the other titles of an item."""

import json
import os
from pathlib import Path

import pytest

from rankgrpo.data.importers.catalogs import in_natural_order, read_items
from rankgrpo.data.importers.common import Notes, parse_name
from rankgrpo.data.importers.convert import ImportOptions, import_dataset
from rankgrpo.data.load import load_dataset
from rankgrpo.errors import DataError
from rankgrpo.evaluation.health import check_dataset
from rankgrpo.items.catalog import Catalog, Item, parse_year, read_catalog
from rankgrpo.items.match import TitleMatcher
from rankgrpo.items.titles import natural_order, split_names
from rankgrpo.parse import parse_list
from rankgrpo.reward import relevance

REDIAL = Path(os.environ.get("RANKGRPO_REDIAL", Path(__file__).parents[2] / "shared" / "data" / "redial"))
LIBRARY = [
    Item("Matrix, The", 1999),
    Item("Postman, The (Postino, Il)", 1994),
    Item("Seven (a.k.a. Se7en)", 1995),
    Item("Avventura, L' (Adventure, The)", 1960),
    Item("Blade Runner (Director's Cut)", 1982),
    Item("Heat", 1995),
    Item("Good, the Bad and the Ugly, The (Buono, il brutto, il cattivo, Il)", 1966),
    Item("Emma (US)", 1996),
    Item("Day, A (Jour, Un)", 2001),
    Item("A Day", 2001),
]


@pytest.mark.parametrize(
    ("title", "natural"),
    [
        ("Matrix, The", "The Matrix"),
        ("Lord of the Rings: The Return of the King, The", "The Lord of the Rings: The Return of the King"),
        ("Avventura, L'", "L'Avventura"),
        ("Beautiful Mind, A", "A Beautiful Mind"),
        ("The Matrix", None),
        ("Me, Myself & Irene", None),
        ("Yours, mine, a", None),
        ("The", None),
        (", The", None),
    ],
)
def test_articles_move_to_the_front(title, natural):
    assert natural_order(title) == natural


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("Postman, The (Postino, Il)", ("The Postman", ("Il Postino",))),
        ("Seven (a.k.a. Se7en)", ("Seven", ("Se7en",))),
        ("Fall, The (aka Fall Down) (Chute, La)", ("The Fall", ("Fall Down", "La Chute"))),
        ("City (Stadt a.k.a. Town)", ("City", ("Stadt", "Town"))),
        ("Blade Runner (Director's Cut)", ("Blade Runner (Director's Cut)", ())),
        ("Emma (US)", ("Emma (US)", ())),
        ("(500) Days of Summer", ("(500) Days of Summer", ())),
        ("Kill Bill (Part 2)", ("Kill Bill (Part 2)", ())),
    ],
)
def test_titles_in_brackets(title, names):
    assert split_names(title, originals=True) == names
    if "a.k.a." not in title and "aka" not in title:
        assert split_names(title, originals=False)[1] == ()


def test_a_catalog_in_library_order_is_put_right():
    notes = Notes()
    items = in_natural_order(LIBRARY, notes)
    assert [item.title for item in items] == [
        "The Matrix",
        "The Postman",
        "Seven",
        "L'Avventura",
        "Blade Runner (Director's Cut)",
        "Heat",
        "The Good, the Bad and the Ugly",
        "Emma (US)",
        "Day, A (Jour, Un)",  # A Day of that year is another item
        "A Day",
    ]
    assert notes.count("catalog titles in library order, the article moved to the front") == 4
    assert notes.count("catalog titles with others in brackets, by which the item is known too") == 4
    catalog = Catalog(items)
    for title, year, index in (
        ("The Matrix", 1999, 0),
        ("Matrix, The", 1999, 0),
        ("Il Postino", 1994, 1),
        ("Se7en", 1995, 2),
        ("The Adventure", 1960, 3),
        ("Postman, The (Postino, Il)", 1994, 1),
        ("A Day", 2001, 9),
        ("Matrix", 1999, None),
        ("Il Postino", 1995, None),
    ):
        assert catalog.lookup(title, year) == index, title
    matcher = TitleMatcher(catalog)
    for line, index in (("Postino, Il (1994)", 1), ("Il Postino: The Postman (1994)", None), ("Se7en", 2)):
        assert matcher.match_line(line) == index, line
    assert catalog.find_mentions("I liked Il Postino (1994) and Se7en (1995)") == [1, 2]


def test_a_title_that_two_items_share_as_an_alias_is_nobodys():
    catalog = Catalog([Item("One", 2000, aliases=("Both", "Two")), Item("Two", 2000, aliases=("Both",))])
    assert catalog.lookup("Both", 2000) is None and catalog.lookup("Two", 2000) == 1


def test_rewards_know_other_titles_and_a_catalog_left_in_library_order():
    catalog = Catalog([Item("Matrix, The", 1999), Item("Seven", 1995, aliases=("Se7en",))])
    lines = parse_list("The Matrix (1999)\nSe7en (1995)\nSeven (1995)\nMatrix (1999)")
    groundtruth = [("Matrix, The", 1999), ("Seven", 1995)]
    assert relevance(lines, groundtruth, catalog=catalog, seen=(), num_ranks=4).tolist() == [1, 1, 0, 0]
    assert relevance(lines, groundtruth, catalog=catalog, seen=("Se7en",), num_ranks=4).tolist() == [1, 0, 0, 0]


def test_other_titles_are_kept_in_files(tmp_path):
    catalog = Catalog([Item("Seven", 1995, aliases=("Se7en", "Sieben"))])
    catalog.to_jsonl(tmp_path / "catalog.jsonl")
    assert read_catalog(tmp_path / "catalog.jsonl")[0].items == catalog.items
    (tmp_path / "catalog.csv").write_text("title,year,aliases\nSeven,1995,Se7en|Sieben\n")
    assert read_catalog(tmp_path / "catalog.csv")[0].items == catalog.items
    (tmp_path / "catalog.jsonl").write_text('{"title": "Seven", "year": 1995, "aliases": [7]}\n')
    with pytest.raises(
        DataError, match=r"catalog.jsonl:1: aliases must be a list of strings or one string separated by"
    ):
        read_catalog(tmp_path / "catalog.jsonl")


def test_import_names_the_ground_truth_as_the_catalog_does(tmp_path):
    rows = [
        {"conversation": f"I liked film {n}", "groundtruth": ["Matrix, The (1999)", "Postino, Il (1994)"]}
        for n in range(12)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Catalog(LIBRARY).to_jsonl(tmp_path / "films.jsonl")
    done, dataset = import_dataset(
        tmp_path / "mine.jsonl", tmp_path / "out", ImportOptions(catalog=tmp_path / "films.jsonl")
    )
    assert "4 catalog titles in library order, the article moved to the front; the first: 'Matrix, The' is" in done
    assert dataset.train[0].groundtruth == (("The Matrix", 1999), ("The Postman", 1994))
    # Without a catalog, titles come from the ground truth.
    done, dataset = import_dataset(tmp_path / "mine.jsonl", tmp_path / "own", ImportOptions())
    assert dataset.train[0].groundtruth == (("The Matrix", 1999), ("Il Postino", 1994))
    assert [item.title for item in dataset.catalog] == ["The Matrix", "Il Postino"]
    assert [item.popularity for item in dataset.catalog] == [10, 10]


def test_the_health_report_warns_of_library_order(tmp_path):
    row = {"id": "a", "conversation": [{"role": "user", "content": "hi"}], "seen_titles": []}
    for split in ("train", "validation", "test"):
        line = json.dumps(row | {"groundtruth": [["Matrix, The", 1999]]})
        (tmp_path / f"{split}.jsonl").write_text(line + "\n")
    Catalog(LIBRARY[:6]).to_jsonl(tmp_path / "catalog.jsonl")
    warnings = check_dataset(load_dataset(tmp_path), baselines=False).warnings
    assert any(w.startswith("3 of 6 titles are in library order, for example 'Matrix, The'") for w in warnings)


@pytest.mark.parametrize(
    ("value", "year"),
    [("2008-2013", 2008), ("2008–", 2008), ("1995-12-15", 1995), ("1995-12-15T10:00:00", 1995), ("1995/96", 1995)],
)
def test_years_of_spans_and_dates(value, year):
    assert parse_year(value) == year
    assert parse_name("Dexter (2006-2013)") == ("Dexter", 2006)


@pytest.mark.parametrize("value", ["95-12-15", "15-12-1995", "1995 or so", "2008-2013-x"])
def test_what_is_no_year(value):
    with pytest.raises(DataError, match="year must be a whole number"):
        parse_year(value)


def test_rows_are_taken_or_named(tmp_path):
    (tmp_path / "films.csv").write_text(
        "title,year,popularity\nDexter,2006-2013,12.0\nHeat,1995-12-15,3\nOld,1850,1\nOlder,1849,1\nUp,2009,1.5\n"
    )
    notes = Notes()
    items = read_items(tmp_path / "films.csv", notes)
    assert [(item.title, item.year, item.popularity) for item in items] == [("Dexter", 2006, 12), ("Heat", 1995, 3)]
    told = str(notes)
    assert "3 catalog rows that are no item, left out; the first: " in told
    for line, why in (
        (4, "year 1850 is impossible; expected 1870 to 2100"),
        (5, "year 1849"),
        (6, "popularity must be"),
    ):
        assert f"films.csv:{line}: {why}" in told


def test_no_line_of_a_real_catalog_is_lost_in_library_order():
    if not REDIAL.is_dir():
        pytest.skip(f"{REDIAL} is not here; ReDial lies beside the repository where this is measured")
    films = Catalog.from_file(REDIAL / "catalog.jsonl").items
    moved = []
    for film in films:
        article, _, rest = film.title.partition(" ")
        moved.append(f"{rest}, {article}" if article in ("The", "A", "An") and rest else film.title)
    assert sum(a != f.title for a, f in zip(moved, films, strict=True)) > 0.2 * len(films)
    notes = Notes()
    items = in_natural_order([Item(title, film.year) for title, film in zip(moved, films, strict=True)], notes)
    catalog = Catalog(items)
    # The lines that a model would write are the titles in natural order.
    found = [catalog.lookup(film.title, film.year) == index for index, film in enumerate(films)]
    assert sum(found) / len(found) >= 0.999
