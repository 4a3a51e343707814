"""Items of any format: what a catalog row writes, what a line reads as, and which item it names."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankgrpo.data.load import load_catalog, load_dataset
from rankgrpo.data.samples import Sample, Turn, read_samples, write_samples
from rankgrpo.errors import ConfigError, DataError
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.items.format import FILM, ItemFormat, title_line
from rankgrpo.items.lines import LineCatalog, LineMatcher, make_catalog, make_item, open_catalog
from rankgrpo.items.match import TitleMatcher, open_matcher
from rankgrpo.parse import ListedItem, parse_list
from rankgrpo.reward import relevance
from rankgrpo.thoughts import find_mark

BOOK = ItemFormat("{title} by {author}")
BOOKS = [
    {"title": "Emma", "author": "Jane Austen"},
    {"title": "1984", "author": "George Orwell"},
    {"title": "12 Rules for Life", "author": "Jordan B. Peterson"},
    {"title": '"Surely You\'re Joking, Mr. Feynman!"', "author": "Richard Feynman"},
    {"title": "The Hitchhiker's Guide (to the Galaxy)", "author": "Douglas Adams"},
    {"title": "7. Kreuz", "author": "Anna Seghers"},
    {"title": "海辺のカフカ", "author": "村上 春樹"},
    {"title": "EMMA", "author": "Alexander McCall Smith"},
]


def books():
    return make_catalog([make_item(row, BOOK) for row in BOOKS], BOOK)


def titles(text, catalog):
    return [item.title for item in catalog.parse(text)]


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize(
    ("template", "row", "line"),
    [
        ("{title} ({year})", {"title": "Heat", "year": 1995}, "Heat (1995)"),
        ("{title}", {"title": "  two  words ", "year": 1}, "two words"),
        ("{artist} - {title}", {"title": "Song 2", "artist": "Blur"}, "Blur - Song 2"),
        ("{title} by {author}", {"title": "Emma", "author": "Jane Austen"}, "Emma by Jane Austen"),
        ("{sid}", {"sid": "<a_1><b_2>"}, "<a_1><b_2>"),
        ("{Title} #{n}", {"title": "A {title}", "n": 7.0}, "A {title} #7"),
    ],
)
def test_a_row_is_written_by_its_template(template, row, line):
    assert ItemFormat(template).write(row) == line


def test_a_line_of_a_film_has_its_year_and_any_other_is_itself():
    assert title_line("Heat", 1995) == "Heat (1995)" and title_line("Emma by Jane Austen") == "Emma by Jane Austen"
    assert Item("Heat", 1995).line == "Heat (1995)" and books().lines[0] == "Emma by Jane Austen"
    assert FILM.is_film and not BOOK.is_film and not ItemFormat("{title}").is_film


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("Title", "names no column of the catalog"),
        ("{title", "a brace without its partner"),
        ("{}", "without the name of a column"),
        ("{title}\n{year}", "holds a line break"),
    ],
)
def test_a_template_that_writes_no_item_is_an_error(template, problem):
    with pytest.raises(ConfigError, match=problem):
        ItemFormat(template)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"title": "Emma"}, "no author, which data.item = '{title} by {author}' names; the row has title"),
        ({"title": "Emma", "author": "  "}, "an empty author"),
        ({"title": "Emma", "author": "a\nb"}, "holds a line break"),
        ({"title": "Emma", "author": ["a"]}, "author must be text or a number"),
    ],
)
def test_a_row_that_lacks_a_column_is_named_with_its_line(tmp_path, row, message):
    path = tmp_path / "catalog.jsonl"
    path.write_text("\n".join(map(json.dumps, [BOOKS[0], row])))
    with pytest.raises(DataError) as caught:
        open_catalog(path, BOOK)
    assert f"{path}:2: " in str(caught.value) and message in str(caught.value)


def test_a_csv_without_the_column_says_which_are_there(tmp_path):
    path = tmp_path / "catalog.csv"
    path.write_text("title,writer\nEmma,Jane Austen\n")
    with pytest.raises(DataError, match=r"(?s)data.item = '\{title\} by \{author\}'.*author missing in"):
        open_catalog(path, BOOK)
    path.write_text("Title,AUTHOR\nEmma,Jane Austen\nUp,\n")
    with pytest.raises(DataError, match=r"catalog.csv:3: no author"):
        open_catalog(path, BOOK)


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("Emma by Jane Austen", 0),
        ("1. Emma by Jane Austen", 0),
        ("- **Emma by Jane Austen**", 0),
        ("3) *emma  BY jane austen*.", 0),
        ("**Emma by Jane Austen**: a comedy of manners", 0),
        ('2. "Emma by Jane Austen" is a comedy', 0),
        ("Emma by Jane Austen - a comedy of manners", 0),
        ("Emma by Jane Austen – a comedy of manners", 0),
        ("Emma by Jane Austen: a comedy", 0),
        ("1984 by George Orwell", 1),
        ("12. 1984 by George Orwell", 1),
        ("12 Rules for Life by Jordan B. Peterson", 2),
        ("12. 12 Rules for Life by Jordan B. Peterson", 2),
        ('"Surely You\'re Joking, Mr. Feynman!" by Richard Feynman', 3),
        ("“Surely You’re Joking, Mr. Feynman!” by Richard Feynman", 3),
        ("The Hitchhiker's Guide (to the Galaxy) by Douglas Adams", 4),
        ("7. Kreuz by Anna Seghers", 5),
        ("1. 7. Kreuz by Anna Seghers", 5),
        ("10. 海辺のカフカ by 村上 春樹", 6),
        ("Emma by Alexander McCall Smith", 7),
    ],
)
def test_a_line_names_its_item(line, place):
    catalog = books()
    (item,) = catalog.parse(line)
    assert catalog.lookup(item.title, item.year) == place
    assert item.title == catalog.items[place].title and item.year is None and item.chars == (0, len(line))


@pytest.mark.parametrize(
    "line", ["Emma", "Emma by Jane", "Emma by Jane Austen and friends", "Emma by Jane Austen (2)", "by Jane Austen"]
)
def test_a_line_that_is_not_the_item_names_none(line):
    catalog = books()
    assert all(catalog.lookup(item.title) is None for item in catalog.parse(line) if item.title is not None)


def test_a_line_has_the_form_of_the_format_or_no_title():
    assert titles("Here are my picks\n1. Dune by Frank Herbert\nEmma", books()) == [None, "Dune by Frank Herbert", None]
    assert titles("anything at all\n\n2. goes", make_catalog([Item("x")], ItemFormat("{title}"))) == [
        "anything at all",
        "goes",
    ]


def test_ranks_are_the_lines_of_the_parser():
    text = "\n 1. Emma by Jane Austen \r\n\r\nnothing\n\u200b\n"
    assert [item.chars for item in books().parse(text)] == [item.chars for item in parse_list(text)]


def test_what_follows_is_a_comment_only_where_no_item_could_go_on_so():
    pens = ["Gel Pen", "Gel Pen - Blue", "Stapler: Red", "Paper"]
    catalog = make_catalog(map(Item, pens), ItemFormat("{title}"))
    assert catalog.read("Gel Pen - 12 pack")[1] is None and catalog.read("Paper: white")[1] is None
    assert catalog.read("Gel Pen - Blue | a pen")[1] == 1 and catalog.read("Paper; for printers")[1] == 3
    assert catalog.read("**Paper** - white")[1] == 3  # marked by the writer


def test_text_after_the_bracket_that_ends_every_item_is_a_comment():
    ids = ["<a_1><b_2>", "<a_1><b_2><c_3>", "<a_2><b_2>"]
    catalog = make_catalog(map(Item, ids), ItemFormat("{sid}"))
    assert [catalog.read(line)[1] for line in ("<a_1><b_2> pens", "1. <a_1><b_2><c_3> ink", "<a_2><b_3>")] == [
        0,
        1,
        None,
    ]
    labels = make_catalog(map(Item, ["[1]", "[2]", "[12]"]), ItemFormat("{label}"))
    assert [labels.read(line)[1] for line in ("[2]", "[12] about ships", "1. [1]", "[3]")] == [1, 2, 0, None]


def test_items_that_differ_in_case_or_accents_are_never_swapped():
    rows = ["Let It Be", "let it be", "Uber", "Über", "Up"]
    catalog = make_catalog(map(Item, rows), ItemFormat("{title}"))
    assert [catalog.read(f"1. {row}")[1] for row in rows] == [0, 1, 2, 3, 4]
    assert catalog.read("LET IT BE")[1] is None and catalog.read("UP")[1] == 4 and catalog.read("über")[1] == 3
    assert catalog.alike == [(0, 1)]
    assert open_matcher(catalog).match_line("LET IT BE") is None


def test_the_matcher_of_teachers_reads_words_alone():
    matcher = open_matcher(books())
    assert isinstance(matcher, LineMatcher) and isinstance(open_matcher(Catalog([Item("Heat", 1995)])), TitleMatcher)
    assert matcher.match_line("2. The Hitchhikers Guide to the Galaxy, by Douglas Adams") == 4
    assert matcher.match_line("Emma by Jane Austin") is None and matcher.match_line("...") is None


TITLE = (
    st.text(min_size=1, max_size=60)
    .map(lambda s: " ".join(s.split()))
    .filter(
        lambda s: s and len(s.splitlines()) == 1 and s.isprintable() and s.strip("\u200b\u200c\u200d\u2060\ufeff") == s
    )
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(TITLE, min_size=1, max_size=6, unique=True), st.sampled_from(["{title}", "{title} by X", "A - {title}"])
)
def test_every_item_is_read_back_from_its_own_line(names, template):
    item_format = ItemFormat(template)
    names = [name for name in names if find_mark(name) is None]
    catalog = make_catalog([make_item({"title": name}, item_format) for name in names], item_format)
    assert [item.title for item in catalog.parse("\n".join(catalog.lines))] == catalog.lines
    for place, line in enumerate(catalog.lines):
        assert catalog.lookup(line) == place


def test_an_unknown_line_that_goes_on_from_an_item_is_not_that_item():
    """Where ids collide some catalogs give the later ones a further token."""
    catalog = make_catalog(map(Item, ["<a_1><b_2>", "<a_1><b_2><c_1>", "<a_3><b_4>"]), ItemFormat("{sid}"))
    lines = ["<a_1><b_2><c_9>", "<a_1><b_2><c_1><d_1>", "<a_1><b_2> a pen", "<a_1><b_2><c_1> ink", "<a_3><b_4><c_9>"]
    assert [catalog.read(line)[1] for line in lines] == [None, 1, 0, 1, 2]


@pytest.mark.parametrize("row", ["Why <think> Matters", "[THINK]", "A <|channel|> B"])
def test_a_line_that_would_be_taken_for_thoughts_is_refused_with_its_place(tmp_path, row):
    """Of an answer such as "Up\nWhy <think> Matters\nEmma" only the first item would be read."""
    (tmp_path / "catalog.csv").write_text(f"title,author,year\nEmma,Jane Austen,1815\n{row},Z,2001\n")
    for item_format in (ItemFormat("{title}"), FILM):
        with pytest.raises(DataError, match="catalog.csv:3: .* marks thoughts in an answer; write the item without it"):
            open_catalog(tmp_path / "catalog.csv", item_format)
    sample = {"id": "1", "conversation": [{"role": "user", "content": "Hi"}], "seen_titles": [], "groundtruth": [row]}
    (tmp_path / "train.jsonl").write_text(json.dumps(sample | {"candidates": ["Emma", row]}) + "\n")
    with pytest.raises(DataError, match="train.jsonl:1: .* marks thoughts in an answer"):
        read_samples(tmp_path / "train.jsonl", item_format=ItemFormat("{title}"))


# ---------------------------------------------------------------------------------------------------- catalogs, samples


def test_rows_of_one_line_are_one_item(tmp_path):
    path = tmp_path / "catalog.csv"
    path.write_text("title,author,popularity,price\nEmma,Jane Austen,3,9.5\nUp,Z,1,\nEmma ,Jane  Austen,4,8\n")
    catalog, problems = open_catalog(path, BOOK)
    assert [(item.line, item.popularity) for item in catalog] == [("Emma by Jane Austen", 7), ("Up by Z", 1)]
    assert dict(catalog.items[0].fields) == {"title": "Emma", "author": "Jane Austen", "price": "9.5"}
    assert str(problems[0]) == f"{path}:4: 'Emma by Jane Austen' is already on line 2; the two rows are one item"
    with pytest.raises(DataError, match="item 1: x is item 0 again"):
        LineCatalog([Item("x"), Item("x")], ItemFormat("{title}"))


def test_a_catalog_is_written_and_read_again(tmp_path):
    books().to_jsonl(tmp_path / "catalog.jsonl")
    assert open_catalog(tmp_path / "catalog.jsonl", BOOK)[0].items == books().items


def test_an_alias_names_the_item_unless_it_is_anothers_line(tmp_path):
    path = tmp_path / "catalog.jsonl"
    rows = [{"title": "Blur - Song 2", "aliases": ["Blur - Song 2 (Live)", "Blur - Two"]}, {"title": "Blur - Two"}]
    path.write_text("\n".join(map(json.dumps, [*rows, {"title": "Three", "aliases": "Drei|Blur - Song 2 (live)"}])))
    catalog, _ = open_catalog(path, ItemFormat("{title}"))
    assert [catalog.read(line)[1] for line in ("1. drei", "Blur - Two", "Blur - Song 2 (Live)")] == [2, 1, None]
    assert catalog.parse("DREI")[0].title == "Three"


def test_titles_that_were_seen_are_lines_or_titles():
    catalog = books()
    assert catalog.title_indices("emma by jane austen") == (0,)
    assert catalog.title_indices("Emma") == (0, 7) and catalog.title_indices("Ronin") == ()
    with pytest.raises(ValueError, match="year must be None"):
        catalog.lookup("Emma", 1816)


@pytest.mark.parametrize("empty", [float("nan"), None, "", " "])
def test_what_is_not_there_is_no_text(tmp_path, empty):
    item_format = ItemFormat("{title} by {author}")
    with pytest.raises(DataError, match="an empty author, which data.item"):
        make_item({"title": "Emma", "author": empty}, item_format)
    row = {"title": "Emma", "author": "Jane Austen", "genres": float("nan"), "year": float("nan"), "pages": 474.0}
    item = make_item(row, item_format)
    assert item.fields == (("title", "Emma"), ("author", "Jane Austen"), ("pages", "474.0")) and item.genres == ()


def test_mentions_in_text():
    catalog = books()
    text = "I loved 'Emma by Jane Austen', (1984 by George  Orwell) and 7. Kreuz by Anna Seghers! Emma by Jane too."
    assert catalog.find_mentions(text) == [0, 1, 5]
    short = make_catalog(map(Item, ["Her", "It", "A Quiet Place Indeed", "<a_1><b_2>"]), ItemFormat("{title}"))
    assert short.find_mentions("I saw her with it at A quiet place indeed: <a_1><b_2>, <a_2>.") == [2, 3]
    assert short.find_mentions("") == []


def test_the_reward_counts_items_of_any_format():
    catalog = books()
    items = catalog.parse("1. Dune by F\n2. *Emma by Jane Austen*\n3. Emma by Jane Austen\n4. 1984 by George Orwell")
    wanted = [("emma by Jane Austen", None), ("1984 by George Orwell", None)]
    assert relevance(items, wanted, catalog=catalog, seen=[], num_ranks=5).tolist() == [0, 1, 0, 1, 0]
    assert relevance(items, wanted, catalog=catalog, seen=["1984"], num_ranks=3).tolist() == [0, 1, 0]


def folder(path, catalog="title,author\nEmma,Jane Austen\nUp,Z\n", entry="Emma by Jane Austen", **more):
    path.mkdir()
    (path / "catalog.csv").write_text(catalog)
    row = {"conversation": [{"role": "user", "content": "hi"}], "seen_titles": [], "groundtruth": [entry], **more}
    for name in ("train", "validation", "test"):
        (path / f"{name}.jsonl").write_text(json.dumps({"id": name, **row}))
    return path


@pytest.mark.parametrize("entry", ["Emma by Jane Austen", {"title": "Emma", "author": "Jane Austen"}])
def test_ground_truth_is_a_line_or_the_columns(tmp_path, entry):
    dataset = load_dataset(folder(tmp_path / "mine", entry=entry), item_format=BOOK)
    assert dataset.train[0].groundtruth == (("Emma by Jane Austen", None),) and dataset.problems == []
    write_samples(tmp_path / "again.jsonl", dataset.train)
    assert read_samples(tmp_path / "again.jsonl", catalog=dataset.catalog)[0] == dataset.train


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["Emma", "Jane Austen"], "groundtruth[0] must be the line of an item, '{title} by {author}', or an object"),
        ({"title": "Emma"}, "groundtruth[0]: no author"),
        (" ", "groundtruth[0]: title is empty"),
    ],
)
def test_ground_truth_of_another_form_is_named(tmp_path, entry, message):
    with pytest.raises(DataError) as caught:
        load_dataset(folder(tmp_path / "mine", entry=entry), item_format=BOOK)
    assert message in str(caught.value) and "train.jsonl:1" in str(caught.value)


def test_the_demo_has_films():
    with pytest.raises(ConfigError, match="data.item = '{title}': the items of the demo are '{title} \\({year}\\)'"):
        load_catalog("demo", ItemFormat("{title}"))


def test_a_film_read_by_its_catalog_is_the_parsers():
    assert Catalog([Item("Heat", 1995)]).parse("1. Heat (1995)\nHeat") == [
        ListedItem("Heat", 1995, (0, 14)),
        ListedItem(None, None, (15, 19)),
    ]
    assert Sample("a", (Turn("user", "x"),), (), (("Heat", 1995),)).groundtruth == (("Heat", 1995),)
