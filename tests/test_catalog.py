import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankgrpo.errors import DataError
from rankgrpo.items.catalog import Catalog, Item, normalise_title, read_catalog

THING = [Item("The Thing", 1951), Item("The Thing", 1982), Item("The Thing", 2011), Item("Heat", 1995)]


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Star Wars: Episode II – Attack of the Clones", "star wars: episode ii - attack of the clones"),
        ("Ocean’s Eleven", "Ocean's  Eleven"),
        ("“Crocodile” Dundee", '"crocodile" dundee'),
        ("Am\u00e9lie", "Ame\u0301lie"),  # composed and decomposed accent
        ("Spider\u2011Man", "Spider-Man"),
        ("\ufeffHeat\u00a0", "heat"),
        ("Ｈｅａｔ", "heat"),
        ("Die Straße", "DIE STRASSE"),
        ("O´Brother", "O'Brother"),
    ],
)
def test_spellings_of_one_title_have_one_key(one, other):
    assert normalise_title(one) == normalise_title(other)


@pytest.mark.parametrize(
    ("one", "other"), [("Alien", "Aliens"), ("Amélie", "Amelie"), ("The Ring", "Ring"), ("M*A*S*H", "MASH")]
)
def test_different_titles_keep_different_keys(one, other):
    assert normalise_title(one) != normalise_title(other)


@given(st.text())
def test_normalising_twice_is_normalising_once(text):
    once = normalise_title(text)
    assert normalise_title(once) == once


@pytest.mark.parametrize(
    ("year", "tolerance", "expected"),
    [
        (1982, 0, 1982),
        (1983, 0, None),
        (1983, 1, 1982),
        (1950, 1, 1951),
        (1966, 14, None),
        (1966, 15, 1951),
        (1966, 20, 1951),
        (2012, 40, 2011),
    ],
)
def test_lookup_takes_the_nearest_year_within_the_tolerance(year, tolerance, expected):
    catalog = Catalog(THING)
    index = catalog.lookup("the thing", year, year_tolerance=tolerance)
    assert (None if index is None else catalog.items[index].year) == expected


def test_an_exact_year_beats_every_other_and_the_later_year_beats_the_earlier():
    catalog = Catalog([Item("Emma", 1996), Item("Emma", 1997), Item("Emma", 1998)])
    assert catalog.lookup("Emma", 1997, year_tolerance=2) == 1
    assert Catalog([Item("Emma", 1996), Item("Emma", 1998)]).lookup("Emma", 1997, year_tolerance=2) == 1
    assert Catalog([Item("Emma", 1998), Item("Emma", 1996)]).lookup("Emma", 1997, year_tolerance=2) == 0


@given(st.lists(st.integers(1980, 2000), unique=True, min_size=1), st.integers(1975, 2005), st.integers(0, 6))
def test_lookup_equals_a_scan_over_all_items(years, year, tolerance):
    catalog = Catalog(Item("X", y) for y in years)
    near = [(abs(y - year), -y, index) for index, y in enumerate(years) if abs(y - year) <= tolerance]
    assert catalog.lookup("x", year, year_tolerance=tolerance) == (min(near)[2] if near else None)


def test_membership_and_titles():
    catalog = Catalog(THING)
    assert len(catalog) == 4 and list(catalog) == THING
    assert ("HEAT", 1995) in catalog and ("Heat", 1996) not in catalog and ("Ronin", 1998) not in catalog
    assert catalog.title_indices("the thing") == (0, 1, 2)
    assert catalog.title_indices("The Thing (1982)") == (1,)
    assert catalog.title_indices("Ronin") == catalog.title_indices("The Thing (1983)") == ()
    assert catalog.title_key("HEAT") == "heat"


def test_a_title_that_looks_like_title_and_year_is_taken_as_it_stands():
    assert Catalog([Item("Class of (1984)", 1982), Item("Class of", 1984)]).title_indices("Class of (1984)") == (0,)


@pytest.mark.parametrize("year", ["1995", 1995.0, None, True])
def test_a_year_that_is_no_int_is_an_error_and_not_a_miss(year):
    with pytest.raises(ValueError, match="year must be an int.*'Heat'"):
        Catalog(THING).lookup("Heat", year)


def test_a_negative_tolerance_is_an_error():
    with pytest.raises(ValueError, match="year_tolerance"):
        Catalog(THING).lookup("Heat", 1995, year_tolerance=-1)


def test_one_item_twice_is_an_error():
    with pytest.raises(DataError, match=r"item 2: HEAT \(1995\) is item 0 again"):
        Catalog([Item("Heat", 1995), Item("Heat", 1986), Item("HEAT", 1995)])


def test_mentions_in_text():
    catalog = Catalog([*THING, Item("Thing", 1982), Item("It", 2017), Item("2001: A Space Odyssey", 1968)])
    text = (
        "I like The Thing (1982), It(2017) and *Heat* (1995); 2001: A Space  Odyssey (1968) too. Heat (1995)! It (1990)"
    )
    assert [catalog.items[i].title for i in catalog.find_mentions(text)] == [
        "The Thing",
        "It",
        "Heat",
        "2001: A Space Odyssey",
    ]
    assert catalog.find_mentions("I saw it, The Thing and Heat, 1995") == []
    assert Catalog([]).find_mentions("Heat (1995)") == []


# ------------------------------------------------------------------------------------------------------------- files


def test_jsonl_with_every_field(tmp_path):
    path = write(
        tmp_path / "catalog.jsonl",
        '{"title": " Heat ", "year": "1995", "popularity": 3, "genres": ["Crime", "Drama"], "plot": "A thief."}',
        "",
        '{"title": "Ronin", "year": 1998.0, "genres": "Crime|Action", "keywords": ["paris", "cars"], "text": "More."}',
        '{"title": "Up", "year": 2009, "popularity": null, "genres": null}',
    )
    catalog, problems = read_catalog(path)
    assert [str(problem) for problem in problems] == []
    assert catalog.items == (
        Item("Heat", 1995, 3, ("Crime", "Drama"), "A thief."),
        Item("Ronin", 1998, 0, ("Crime", "Action"), "paris, cars\nMore."),
        Item("Up", 2009),
    )


def test_csv_equals_jsonl(tmp_path):
    path = tmp_path / "catalog.csv"
    path.write_bytes(
        b"\xef\xbb\xbfTitle, year ,popularity,genres,plot\r\n"
        b'"Good, the Bad",1966.0,2,Western; Drama,"Two\r\nlines"\r\n'
        b"\r\n"
        b"Up,2009,,,\r\n"
        b"Heat,1995\r\n"
    )
    items = (Item("Good, the Bad", 1966, 2, ("Western", "Drama"), "Two\r\nlines"), Item("Up", 2009), Item("Heat", 1995))
    assert Catalog.from_file(path).items == items


@pytest.mark.parametrize("genres", ["Crime|Drama", "['Crime', 'Drama']", "['Crime' 'Drama']", '[""Crime"", ""Drama""]'])
def test_lists_in_cells(tmp_path, genres):
    cell = genres.replace("Crime", "Hitze").replace("Drama", "Hot [live]")
    path = write(tmp_path / "catalog.csv", "title,year,genres,aliases", f'Heat,1995,"{genres}","{cell}"')
    (item,) = Catalog.from_file(path)
    assert item.genres == ("Crime", "Drama") and item.aliases == ("Hitze", "Hot [live]")


def test_written_and_read_again(tmp_path):
    items = [Item('"Heat"', 1995, 4, ("Crime",), "line\u2028one\nline two"), Item("Amélie", 2001)]
    Catalog(items).to_jsonl(tmp_path / "new" / "catalog.jsonl")
    assert Catalog.from_file(tmp_path / "new" / "catalog.jsonl").items == tuple(items)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["catalog.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"title": "A", "year": 1869}', "year 1869 is impossible; expected 1870 to 2100"),
        ('{"title": "A", "year": 2101}', "year 2101 is impossible"),
        ('{"title": "The Wall", "year": 201}', "year 201 is impossible"),
        ('{"title": "A", "year": "soon"}', "year must be a whole number, got 'soon'"),
        ('{"title": "A", "year": 1995.5}', "year must be a whole number, got 1995.5"),
        ('{"title": "A", "year": true}', "year must be a whole number, got True"),
        ('{"title": "A", "year": NaN}', "missing year"),  # as pandas writes null
        ('{"title": "A", "year": Infinity}', "year must be a whole number"),
        ('{"title": "A"}', "missing year"),
        ('{"year": 1995}', "missing title"),
        ('{"title": " ", "year": 1995}', "title is empty"),
        ('{"title": 12, "year": 1995}', "title must be a string, got a number"),
        ('{"title": "A\\nB", "year": 1995}', "holds a line break"),
        ('{"title": "\\ud800", "year": 1995}', "half a surrogate pair"),
        ('{"title": "A", "year": 1995, "popularity": -1}', "popularity must be >= 0, got -1"),
        ('{"title": "A", "year": 1995, "popularity": "many"}', "popularity must be a whole number"),
        ('{"title": "A", "year": 1995, "genres": [1]}', "genres must be a list of strings or one string"),
        ('{"title": "A", "year": 1995, "genres": "[{\'id\': 1}]"}', "genres must be a list of strings or one string"),
        (
            '{"title": "A", "year": 1995, "genres": "[\'a\' \'b\', \'c\']"}',
            "genres \"['a' 'b', 'c']\" looks like a list",
        ),
        ('{"title": "A", "year": 1995, "plot": {}}', "plot must be a string or a list of strings, got an object"),
        ('{"title": "A", "year": 1995', "broken JSON: Expecting ',' delimiter at column 28"),
        ('["A", 1995]', "expected a JSON object, got a list"),
        ("[" * 100_000, "unreadable JSON"),
        ('{"title": "HEAT", "year": "1995"}', r"HEAT (1995) is already on line 1; keep one"),
    ],
)
def test_a_bad_jsonl_line_is_named_with_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "catalog.jsonl", '{"title": "Heat", "year": 1995}', line)
    with pytest.raises(DataError) as caught:
        Catalog.from_file(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}:2: ") and message in problem
    assert problem in str(caught.value)


def test_bytes_that_are_no_utf8_are_named_with_file_and_line(tmp_path):
    path = tmp_path / "catalog.jsonl"
    path.write_bytes(b'{"title": "Heat", "year": 1995}\n{"title": "Am\xe9lie", "year": 2001}\n')
    with pytest.raises(DataError, match=r"catalog\.jsonl:2: not UTF-8 \(byte 13 of the line\)"):
        Catalog.from_file(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name,year\nHeat,1995\n",
            ":1: the first line must name comma-separated columns title and year; title missing",
        ),
        ("title,year,title\nHeat,1995,x\n", ":1: the first line names a column twice"),
        ('title,year\n"Two\nlines",1995\nHeat,199\n', ":4: year 199 is impossible"),
        ("title,year\nGood, the Bad,1966\n", ":2: 3 cells for 2 columns; quote cells that hold a comma"),
        ('title,year\nHeat,1995\n"Up,2009\nRonin,1998\n', ":3: unreadable CSV from here on"),
        ("title,year\n,1995\n", ":2: missing title"),
    ],
)
def test_a_bad_csv_row_is_named_with_file_and_line(tmp_path, text, message):
    path = tmp_path / "catalog.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        Catalog.from_file(path)
    assert f"{path}{message}" in str(caught.value)


def test_all_bad_rows_are_collected_and_twenty_are_shown(tmp_path):
    path = write(tmp_path / "catalog.jsonl", *(json.dumps({"title": f"T{n}", "year": 1}) for n in range(25)))
    with pytest.raises(DataError) as caught:
        Catalog.from_file(path)
    message = str(caught.value)
    assert len(caught.value.problems) == 25
    assert f"{path}:20: " in message and f"{path}:21: " not in message and message.endswith("and 5 more")


def test_unknown_columns_are_reported_once(tmp_path):
    row = {"title": "Heat", "year": 1995, "director": "Mann"}
    path = write(tmp_path / "catalog.jsonl", json.dumps(row), json.dumps({**row, "title": "Ali"}))
    (problem,) = read_catalog(path)[1]
    assert str(problem) == f"{path}:1: unknown catalog field 'director' is not used (reported once)"


@pytest.mark.parametrize("name", ["catalog.pkl", "catalog"])
def test_other_file_types_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"a catalog is a \.jsonl or a \.csv file"):
        Catalog.from_file(write(tmp_path / name, "x"))


def test_missing_and_empty_files_say_what_is_needed(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        Catalog.from_file(tmp_path / "catalog.csv")
    with pytest.raises(DataError, match="the catalog is empty"):
        Catalog.from_file(write(tmp_path / "catalog.jsonl", "", ""))
    with pytest.raises(DataError, match="the catalog is empty"):
        Catalog.from_file(write(tmp_path / "catalog.csv", "title,year"))


def test_the_very_line_of_an_item_names_it_whatever_it_looks_like():
    films = [
        ("7. Kreuz", 1955),
        ("Kreuz", 1955),
        ('"Q"', 2001),
        ("- Minus -", 1958),
        ("Run (1982) Cut", 2007),
        ("Heat", 1995),
    ]
    catalog = Catalog([Item(title, year) for title, year in films])
    assert [(i.title, i.year) for i in catalog.parse("\n".join(catalog.lines))] == films
    assert [catalog.lookup(i.title, i.year) for i in catalog.parse("\n".join(catalog.lines))] == list(range(6))
    assert [(i.title, i.year) for i in catalog.parse("2. Heat (1995)\n7. Kreuz (1955) \n8. Kreuz (1955)")] == [
        ("Heat", 1995),
        ("7. Kreuz", 1955),
        ("Kreuz", 1955),
    ]
