"""Logs of what users chose become samples, by hand-made logs whose samples are known."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankgrpo.data.importers.interactions import InteractionOptions, import_interactions
from rankgrpo.data.importers.logs import a_list, read_log
from rankgrpo.data.load import load_dataset
from rankgrpo.errors import DataError
from rankgrpo.evaluation.health import check_dataset
from rankgrpo.items.format import ItemFormat

BOOKS = """id,title,author
1,Emma,Jane Austen
2,Persuasion,Jane Austen
3,Middlemarch,George Eliot
4,Dune,Frank Herbert
5,Ulysses,James Joyce
"""
BY = ItemFormat("{title} by {author}")
E, P, M, D, U = (
    "Emma by Jane Austen",
    "Persuasion by Jane Austen",
    "Middlemarch by George Eliot",
    "Dune by Frank Herbert",
    "Ulysses by James Joyce",
)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def log_of(histories, header="user,item,time", start=0):
    """A log whose rows stand in another order than their times: users take turns, the latest first."""
    rows = []
    for user, items in histories.items():
        rows += [(place + start, user, item) for place, item in enumerate(items)]
    rows.sort(key=lambda row: (-row[0], row[1]))
    return f"{header}\n" + "".join(f"{user},{item},{time}\n" for time, user, item in rows)


def import_log(tmp_path, log, **options):
    catalog = write(tmp_path / "books.csv", BOOKS)
    source = log if isinstance(log, Path) else write(tmp_path / "log.csv", log)
    done = import_interactions(
        source, tmp_path / "out", InteractionOptions(**{"item": BY, "catalog": catalog} | options)
    )
    return done, load_dataset(tmp_path / "out", item_format=options.get("item", BY))


def short(samples):
    return [(s.id, s.seen_titles, tuple(line for line, _ in s.groundtruth)) for s in samples]


def test_the_last_of_every_user_is_the_test(tmp_path):
    done, dataset = import_log(tmp_path, log_of({"ann": "12345", "bob": "31", "eve": "5412"}))
    assert sorted(short(dataset.train)) == [
        ("ann-1", (E,), (P,)),
        ("ann-2", (E, P), (M,)),
        ("bob-1", (M,), (E,)),  # too short to be tested and still to teach
        ("eve-1", (U,), (D,)),
    ]
    assert sorted(short(dataset.validation)) == [("ann-validation", (E, P, M), (D,)), ("eve-validation", (U, D), (E,))]
    assert sorted(short(dataset.test)) == [("ann-test", (E, P, M, D), (U,)), ("eve-test", (U, D, E), (P,))]
    (ann,) = [sample for sample in dataset.test if sample.id == "ann-test"]
    assert [turn.content for turn in ann.conversation] == [f"I chose {E}; {P}; {M}; {D}. What next?"]
    # Of training interactions alone: ann 1, 2, 3; bob 3, 1; eve 5, 4.
    assert {item.title: item.popularity for item in dataset.catalog} == {E: 2, P: 1, M: 2, D: 1, U: 1}
    assert "4 train, 2 validation, 2 test samples over 5 items" in done
    assert {sample.dialog for sample in dataset.train} == {"ann", "bob", "eve"}
    assert not any(w.startswith("leak:") for w in check_dataset(dataset, baselines=False).warnings)


def test_lengths_of_history_and_of_what_is_right(tmp_path):
    log = log_of({"ann": "12345", "bob": "23451"})
    options = {"num_history": 2, "num_next": 1, "num_cuts": 1, "sentence": "Read: {items}", "separator": " / "}
    _, dataset = import_log(tmp_path, log, **options)
    assert sorted(short(dataset.train)) == [("ann-2", (E, P), (M,)), ("bob-2", (P, M), (D,))]
    assert {s.conversation[0].content for s in dataset.test} == {f"Read: {M} / {D}", f"Read: {D} / {U}"}
    again = tmp_path / "again"
    again.mkdir()
    _, dataset = import_log(
        again, log_of({"ann": "1234567", "bob": "12"}, start=1).replace(",6,", ",1,").replace(",7,", ",2,"), num_next=1
    )
    assert dataset.test  # repeats of ann's are left out, five remain


def test_two_are_right(tmp_path):
    write(tmp_path / "more.csv", "id,title\n" + "".join(f"{n},Book number {n}\n" for n in range(1, 9)))
    source = write(tmp_path / "log.csv", log_of({"ann": "12345678", "bob": "87654321"}))
    item = ItemFormat("{title}")
    options = InteractionOptions(item=item, catalog=tmp_path / "more.csv", num_next=2)
    import_interactions(source, tmp_path / "out", options)
    dataset = load_dataset(tmp_path / "out", item_format=item)
    numbers = {
        s.id: tuple("".join(line[-1] for line in lines) for lines in (s.seen_titles, [w for w, _ in s.groundtruth]))
        for s in (*dataset.train, *dataset.validation, *dataset.test)
        if s.id.startswith("ann")
    }
    assert numbers == {
        "ann-1": ("1", "23"),
        "ann-2": ("12", "34"),
        "ann-validation": ("1234", "56"),
        "ann-test": ("123456", "78"),
    }


def test_a_moment_divides_the_log(tmp_path):
    # Ten interactions at times 1 to 10; validation begins at the eighth, the test at the ninth and tenth.
    rows = [
        ("ann", 1),
        ("ann", 2),
        ("bob", 3),
        ("bob", 1),
        ("eve", 2),
        ("ann", 3),
        ("bob", 2),
        ("ann", 4),
        ("bob", 5),
        ("eve", 4),
    ]
    log = "user,item,time\n" + "".join(f"{user},{item},{time}\n" for time, (user, item) in enumerate(rows, start=1))
    _, dataset = import_log(tmp_path, log, split="time", validation_frac=0.1, test_frac=0.2)
    # Quantiles .7 and .8 of ten times are the seventh and the eighth: from there on is validation, and is the test.
    assert sorted(short(dataset.train)) == [("ann-1", (E,), (P,)), ("ann-2", (E, P), (M,)), ("bob-1", (M,), (E,))]
    assert short(dataset.validation) == [("bob-validation", (M, E), (P,))]
    assert sorted(short(dataset.test)) == [
        ("ann-test", (E, P, M), (D,)),
        ("bob-test", (M, E, P), (U,)),
        ("eve-test", (P,), (D,)),
    ]
    assert {item.title: item.popularity for item in dataset.catalog} == {E: 2, P: 2, M: 2, D: 0, U: 0}


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(0, 40)), min_size=12, max_size=60))
@settings(max_examples=40, deadline=None)
def test_nothing_of_validation_or_test_is_learned_from(tmp_path_factory, rows):
    tmp_path = tmp_path_factory.mktemp("log")
    log = "user,item,time\n" + "".join(f"u{user},{item},{time}\n" for user, item, time in rows)
    for split in ("last", "time"):
        folder = tmp_path / split
        folder.mkdir()
        try:
            _, dataset = import_log(folder, log, split=split, num_cuts=100)
        except DataError as error:
            assert "no " in str(error) and "sample" in str(error)
            continue
        taught = {}
        for sample in dataset.train:
            taught.setdefault(sample.dialog, set()).update(
                [*sample.seen_titles, *(line for line, _ in sample.groundtruth)]
            )
        for sample in (*dataset.validation, *dataset.test):
            user = sample.id.split("-")[0]
            wanted = {line for line, _ in sample.groundtruth}
            assert not wanted & set(sample.seen_titles) and not wanted & taught.get(user, set())


def test_cores_ratings_and_repeats(tmp_path):
    histories = {"ann": "1234", "bob": "1234", "eve": "1234", "one": "5"}
    log = log_of(histories)
    rated = "\n".join(
        ["user,item,time,rating", *(f"{line},{5 if ',5,' not in line else 1}" for line in log.splitlines()[1:])]
    )
    done, dataset = import_log(tmp_path, rated + "\nann,1,99,5\n", core=3, min_rating=4)
    assert f"1 ratings below 4, left out; the first: {tmp_path / 'log.csv'}:14" in done
    assert f"1 interactions of a user with an item again, left out; the first: {tmp_path / 'log.csv'}:15" in done
    assert "fewer than 3" not in done
    assert len(dataset.test) == 3 and {line for s in dataset.test for line, _ in s.groundtruth} == {D}
    (tmp_path / "b").mkdir()
    done, dataset = import_log(tmp_path / "b", log_of({**histories, "two": "15", "six": "15"}), core=3)
    # Two and six have two items each; without them 5 is left with one user, who has no other.
    assert "5 interactions of users and items with fewer than 3, left out; the first: 12 of 17 are left" in done


def test_equal_times_and_no_times_keep_the_order_of_the_file(tmp_path):
    rows = [("ann", 4), ("ann", 2), ("ann", 5), ("ann", 1), ("bob", 1), ("bob", 2), ("bob", 3), ("bob", 4)]
    log = "user,item,time\n" + "".join(f"{user},{item},7\n" for user, item in rows)
    _, tied = import_log(tmp_path, log)
    (tmp_path / "b").mkdir()
    done, untimed = import_log(tmp_path / "b", "user,item\n" + "".join(f"{user},{item}\n" for user, item in rows))
    assert tied.test == untimed.test and short(tied.test)[0] == ("ann-test", (D, P, U), (E,))
    assert "1 logs without times, the order of their rows being the order" in done


@pytest.mark.parametrize(
    "times",
    [
        ["2024-01-02", "2024-01-10", "2024-01-09T12:00:00"],
        ["1704153600", "1704844800", "1704801600.0"],
        ["2024-01-02 00:00:00+00:00", "2024-01-10T00:00:00Z", "2024-01-09T14:00:00+02:00"],
    ],
)
def test_times_in_every_form(tmp_path, times):
    path = write(tmp_path / "log.csv", "who,what,when\n" + "".join(f"a,{n},{t}\n" for n, t in enumerate(times)))
    log = read_log(path, "who", "what", "when", None)
    assert log.time_R.tolist() == [1704153600.0, 1704844800.0, 1704801600.0]


def test_names_of_columns_and_files_of_other_kinds(tmp_path):
    rows = log_of({"ann": "1234", "bob": "4321"}, header="Who,What,When")
    columns = {"user": "who", "item": "what", "time": "When"}
    _, dataset = import_log(tmp_path, rows, columns=columns)
    expected = [dataset.train, dataset.validation, dataset.test]
    cells = [line.split(",") for line in rows.splitlines()[1:]]
    objects = [{"Who": who, "What": int(what), "When": int(when)} for who, what, when in cells]
    write(tmp_path / "log.jsonl", "".join(json.dumps(row) + "\n" for row in objects))
    write(tmp_path / "log.tsv", rows.replace(",", "\t"))
    sources = [tmp_path / "log.jsonl", tmp_path / "log.tsv"]
    try:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(objects), tmp_path / "log.parquet")
        sources.append(tmp_path / "log.parquet")
    except ImportError:
        pass
    for source in sources:
        (tmp_path / source.suffix[1:]).mkdir()
        out = tmp_path / source.suffix[1:] / "out"
        import_interactions(source, out, InteractionOptions(item=BY, catalog=tmp_path / "books.csv", columns=columns))
        again = load_dataset(out, item_format=BY)
        assert [again.train, again.validation, again.test] == expected


def test_items_without_a_table_and_films_in_library_order(tmp_path):
    log = log_of({"ann": ["Emma", "Dune", "Heat it", "Up"], "bob": ["Up", "Dune", "Emma", "Heat it"]})
    item = ItemFormat("{title}")
    import_interactions(write(tmp_path / "log.csv", log), tmp_path / "out", InteractionOptions(item=item))
    dataset = load_dataset(tmp_path / "out", item_format=item)
    assert {entry.title for entry in dataset.catalog} == {"Emma", "Dune", "Heat it", "Up"}
    films = """movieId,title\n1,"Matrix, The (1999)"\n2,Heat (1995)\n3,"Postman, The (Postino, Il) (1994)"
4,Up (2009)
5,No year
"""
    write(tmp_path / "movies.csv", films)
    ratings = write(tmp_path / "ratings.csv", log_of({"1": "1234", "2": "4321", "3": "15"}, "userId,movieId,timestamp"))
    options = {"catalog": tmp_path / "movies.csv", "columns": {"item": "movieId", "key": "movieId"}}
    with pytest.raises(DataError, match="movies.csv: 1 row.s. that are no item .--drop-unknown leaves them out"):
        import_interactions(ratings, tmp_path / "films", InteractionOptions(**options))
    done = import_interactions(ratings, tmp_path / "films", InteractionOptions(**options, drop_unknown=True))
    dataset = load_dataset(tmp_path / "films")
    assert [film.title for film in dataset.catalog] == ["The Matrix", "Heat", "The Postman", "Up"]
    assert {s.id: s.groundtruth for s in dataset.test} == {"1-test": (("Up", 2009),), "2-test": (("The Matrix", 1999),)}
    assert "2 catalog titles in library order" in done and "interactions with items that" in done


HISTORIES = """who,history,next
a,"['1', '2']",3
a,"[1, 2, 3]",4
b,2|5,1
c,[4],"[""5"", ""1""]"
d,"[1, 2]",2
e,[],3
"""


def test_rows_with_histories(tmp_path):
    columns = {"user": "who", "item": "next"}
    source = tmp_path / "rows"
    source.mkdir()
    write(source / "train.csv", HISTORIES)
    write(source / "dev.csv", "who,history,next\nf,[1],2\n")
    write(source / "test.csv", "who,history,next\na,[3],1\n")
    done, dataset = import_log(tmp_path, source, columns=columns, num_next=2)
    assert [(s.dialog, s.seen_titles, tuple(line for line, _ in s.groundtruth)) for s in dataset.train] == [
        ("a", (E, P), (M,)),
        ("a", (E, P, M), (D,)),
        ("b", (P, U), (E,)),
        ("c", (D,), (U, E)),
    ]
    assert short(dataset.validation) == [("validation-0", (E,), (P,))] and short(dataset.test) == [
        ("test-0", (M,), (E,))
    ]
    assert {item.title: item.popularity for item in dataset.catalog} == {E: 2, P: 0, M: 1, D: 1, U: 1}
    assert "1 rows whose next item is in the history already, left out" in done
    assert "1 rows without a history, left out" in done


def test_users_of_histories_are_drawn_whole(tmp_path):
    rows = "".join(f"u{n // 2},[{1 + n % 2}],{3 + n % 2}\n" for n in range(40))
    done, dataset = import_log(tmp_path, "user,history,item\n" + rows, validation_frac=0.1, test_frac=0.2)
    users = [{s.dialog.split()[0] for s in dataset.split(name)} for name in ("train", "validation", "test")]
    assert [len(names) for names in users] == [14, 2, 4] and len(set.union(*users)) == 20
    assert "2 splits missing in the source, users drawn from train" in done


def test_users_that_no_column_names_are_not_drawn(tmp_path):
    """Six growing histories a reviewer: dealt row by row, the answer of one would stand in the history of the next."""
    rows = "".join(
        f'r{who},"{[(who + n) % 5 + 1 for n in range(end)]}",{(who + end) % 5 + 1}\n'
        for who in range(10)
        for end in range(1, 5)
    )
    source = write(tmp_path / "rows.csv", "reviewer,history,item\n" + rows)
    message = (
        "rows.csv: no validation rows, and no column of the user.* There is reviewer, history, item; say --columns"
    )
    with pytest.raises(DataError, match=message):
        import_log(tmp_path, source)
    _, dataset = import_log(tmp_path, source, columns={"user": "reviewer"})
    users = [{s.dialog.split()[0] for s in dataset.split(name)} for name in ("train", "validation", "test")]
    assert [len(names) for names in users] == [8, 1, 1] and len(set.union(*users)) == 10
    (tmp_path / "b").mkdir()
    _, dataset = import_log(tmp_path / "b", source, columns={"user": "none"})  # every row is said to be a user
    assert [len(dataset.split(name)) for name in ("train", "validation", "test")] == [32, 4, 4]
    missing = write(tmp_path / "missing.csv", "user,history,item\na,[1],2\n,[1],2\nb,[1],\n")
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match=r"(?s)missing.csv:3: user is empty.*missing.csv:4: item is empty"):
        import_log(tmp_path / "c", missing)


@pytest.mark.parametrize("options", [{"core": 5}, {"min_rating": 4}, {"min_rating": 4, "split": "time"}])
def test_a_filter_that_leaves_nothing_is_named(tmp_path, options):
    rows = [f"{user},{item},{item},1" for user in "ab" for item in range(1, 5)]
    log = "\n".join(["user,item,time,rating", *rows]) + "\n"
    left_out = "8 interactions of users and items" if "core" in options else "8 ratings below 4, left out"
    with pytest.raises(DataError, match=rf"log.csv: no train sample .*{left_out}"):
        import_log(tmp_path, log, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("num_rows", [3, 3000])
def test_logs_of_another_encoding_are_named(tmp_path, encoding, num_rows):
    rows = "".join(f"ann,Book {n},{n}\n" for n in range(num_rows))
    source = tmp_path / "log.csv"
    source.write_text(f"user,item,time\n{rows}ann,Caf\u00e9,9\n", encoding=encoding)
    with pytest.raises(DataError, match=r"log.csv:\d+: unreadable CSV.*'utf-8' codec.*; save it as UTF-8 text"):
        import_interactions(source, tmp_path / "out", InteractionOptions(item=ItemFormat("{title}")))


def test_cells_that_pandas_left_empty_and_text_stored_as_bytes(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'rankgrpo[import]'")
    parquet = pytest.importorskip("pyarrow.parquet")
    users, items = [7.0] * 4 + [8.0] * 4, [b"Emma", b"Dune", "Am\u00e9lie".encode(), b"Up"] * 2
    item = ItemFormat("{title}")

    def attempt(users, items, name="log"):
        parquet.write_table(pyarrow.table({"user": users, "item": items}), tmp_path / f"{name}.parquet")
        import_interactions(tmp_path / f"{name}.parquet", tmp_path / name, InteractionOptions(item=item))
        return load_dataset(tmp_path / name, item_format=item)

    dataset = attempt(users, items)
    assert {entry.title for entry in dataset.catalog} == {"Emma", "Dune", "Am\u00e9lie", "Up"}
    assert {sample.dialog for sample in dataset.train} == {"7", "8"}
    with pytest.raises(DataError, match="bad.parquet:2: user is empty"):
        attempt([7.0, float("nan")], [b"Emma", b"Dune"], "bad")
    with pytest.raises(DataError, match="bytes.parquet: column item, from row 1 on: bytes that are no UTF-8 text"):
        attempt([7.0, 7.0], [b"Emma", b"\xff\xfe"], "bytes")
    rows = {
        "user": ["a", "b", "c"],
        "history": [[b"Emma"], [b"Up", b"Dune"], [b"Up"]],
        "item": [b"Up", b"Emma", b"Emma"],
    }
    parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet")
    import_interactions(tmp_path / "rows.parquet", tmp_path / "rows", InteractionOptions(item=item))
    dataset = load_dataset(tmp_path / "rows", item_format=item)
    assert {item.title for item in dataset.catalog} == {"Emma", "Dune", "Up"}


@pytest.mark.parametrize(
    ("log", "options", "message"),
    [
        (
            "user,item,time\na,1,1\na,9,2\n",
            {},
            r"log.csv:3: item '9' is not in .*books.csv .column id.; .*--drop-unknown",
        ),
        (
            "user,item,time\na,1,01/02/2024\n",
            {},
            r"log.csv:2: time '01/02/2024' is neither a number nor a date such as",
        ),
        ("user,item,time\na,1,1\na,2,2024-01-01\n", {}, r"times are numbers in some rows and dates in others .'1' and"),
        ("user,item,time\na,1,nan\n", {}, "log.csv:2: time 'nan' is neither"),
        ("user,item,time\n,1,1\n", {}, "log.csv:2: user is empty"),
        ("user,item,time\na,,1\n", {}, "log.csv:2: item is empty"),
        ("user,thing,time\na,1,1\n", {}, r"no column of the item; there is user, thing, time; say --columns item=NAME"),
        (
            "user,item,time\na,1,1\n",
            {"columns": {"item": "thing"}},
            r"log.csv: no column thing; there is user, item, time",
        ),
        ("user,item,time\na,1,1,1\n", {}, "log.csv:2: 4 cells for 3 columns"),
        ("user,item,time\n", {}, "log.csv: no interaction in this log"),
        ("user,item,time\na,1,1\na,2,2\n", {}, "no validation sample"),
        ("user,item\na,1\na,2\n", {"split": "time"}, "log.csv: --split time needs a column of times"),
        ("user,item\na,1\n", {"min_rating": 3}, "log.csv: --min-rating needs a column of ratings"),
        ("user,item,rating\na,1,good\n", {"min_rating": 3}, "log.csv:2: rating must be a number, got 'good'"),
        ("user,history,item\na,7,1\n", {}, "log.csv:2: item '7' is not in"),
        ("user,history,item\na,[[1]],1\n", {}, "log.csv:2: history must be a list of items"),
        ("user,item\na,1\n", {"columns": {"usr": "x"}}, "--columns: usr is no field; fields are user, item, time"),
        ("user,item\na,1\n", {"num_next": 0}, "num_next must be at least 1, got 0"),
        ("user,item\na,1\n", {"sentence": "hi"}, "must say where the items go: {items}"),
        ("user,item\na,1\n", {"validation_frac": 0.6}, "validation_frac must be between 0 and 0.5"),
        ("user,item\na,1\n", {"item": ItemFormat("{name}")}, "books.csv:2: no name, which data.item = '{name}' names"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, log, options, message):
    with pytest.raises(DataError, match=message):
        import_log(tmp_path, log, **options)
    assert not (tmp_path / "out").exists()


def test_item_tables_that_cannot_be_used(tmp_path):
    log = write(tmp_path / "log.csv", log_of({"ann": "1234", "bob": "4321"}))

    def attempt(text, suffix=".csv"):
        table = write(tmp_path / f"table{suffix}", text)
        import_interactions(log, tmp_path / "out", InteractionOptions(item=BY, catalog=table))

    with pytest.raises(DataError, match="table.csv:3: id '1' is another item above; the keys of a table are unique"):
        attempt("id,title,author\n1,Emma,Austen\n1,Dune,Herbert\n")
    with pytest.raises(DataError, match="table.csv:3: no id, by which the log names an item"):
        attempt("id,title,author\n1,Emma,Austen\n,Dune,Herbert\n")
    with pytest.raises(DataError, match="a table is a .csv, .tsv, .jsonl, .parquet file, got '.txt'"):
        attempt("id,title,author\n", ".txt")
    with pytest.raises(DataError, match="exists; remove it"):
        (tmp_path / "out").mkdir()
        attempt("id,title,author\n1,Emma,Austen\n")


def test_the_options_of_a_log_belong_to_a_log(tmp_path):
    from rankgrpo.evaluation.data_cli import LogArgs, import_

    log = write(tmp_path / "log.csv", log_of({"ann": "1234", "bob": "4321"}))
    catalog = write(tmp_path / "books.csv", BOOKS)
    args = LogArgs(item=BY.template, num_history=1)
    with pytest.raises(ValueError, match="belong to --format interactions"):
        import_(str(log), tmp_path / "out", log=args)
    with pytest.raises(DataError, match="a log of choices is imported by --format interactions"):
        import_(str(log), tmp_path / "out", catalog=catalog, log=LogArgs(item=BY.template))
    with pytest.raises(DataError, match="--sha256 belongs to a URL"):
        import_(str(log), tmp_path / "out", format="interactions", catalog=catalog, log=args, sha256="0" * 64)
    import_(str(log), tmp_path / "out", format="interactions", catalog=catalog, log=args)
    dataset = load_dataset(tmp_path / "out", item_format=BY)
    assert {s.conversation[0].content for s in dataset.test} == {f"I chose {M}. What next?", f"I chose {P}. What next?"}


def test_lists_in_cells():
    assert (
        a_list("['a', 'b, c']", "x") == ["a", "b, c"]
        and a_list('["a"]', "x") == ["a"]
        and a_list("a|b", "x") == ["a", "b"]
    )
    for bad in (7, None, "[1, [2]]", [None], "[(1, 2)]"):
        with pytest.raises(DataError, match="x must be a list of items"):
            a_list(bad, "x")


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("['Item 24' 'Item 26']", ["Item 24", "Item 26"]),
        ("""["it's" 'say "x"'\n 'Am\u00e9lie, x']""", ["it's", 'say "x"', "Am\u00e9lie, x"]),
        ("['a' 'b'\n 'c']", ["a", "b", "c"]),
        ("[1 2 3]", [1, 2, 3]),
        ("[ 1 -2]", [1, -2]),
        ("[1. 2.]", [1.0, 2.0]),
        ("['a']", ["a"]),
        ("[]", []),
        ("[REC]", ["[REC]"]),
        ("[REC] (2007)|[12 Monkeys]|[2001 (1968)]", ["[REC] (2007)", "[12 Monkeys]", "[2001 (1968)]"]),
        ('["[untitled, live]"]', ["[untitled, live]"]),
    ],
)
def test_lists_as_numpy_prints_them(text, items):
    assert a_list(text, "x") == items


@pytest.mark.parametrize(
    "text",
    [
        "['a' 'b', 'c']",  # Python would read 'ab' and 'c'
        "['it''s' 'b']",
        "[0 1 2 ... 97 98 99]",
        "[np.str_('a'), np.str_('b')]",
        "[array(['a', 'b'], dtype=object) array(['c'], dtype=object)]",
        "[1. nan]",
        "[Item 24, Item 26]",
        "['a', 'b",
        "[{'a': 'x' 'y'}]",
    ],
)
def test_lists_that_cannot_be_read_are_refused(tmp_path, text):
    source = write(tmp_path / "log.csv", 'user,history,item\na,1,2\nb,"' + text.replace('"', '""') + '",2\n')
    with pytest.raises(DataError, match=r"(?s)log.csv:3: history .* cannot be read as one; write it as JSON: ..a., .b"):
        import_interactions(source, tmp_path / "out", InteractionOptions(item=ItemFormat("{title}")))


def test_rows_of_the_table_that_come_out_alike_are_one_item(tmp_path):
    write(tmp_path / "books.csv", BOOKS + "6,Emma,Jane Austen\n")
    source = write(tmp_path / "log.csv", log_of({"ann": "6234", "bob": "4321"}))
    done = import_interactions(source, tmp_path / "out", InteractionOptions(item=BY, catalog=tmp_path / "books.csv"))
    dataset = load_dataset(tmp_path / "out", item_format=BY)
    assert "1 rows of the item table that come out as one line, taken as one item" in done and len(dataset.catalog) == 5
    assert {s.id: s.seen_titles for s in dataset.test}["ann-test"] == (E, P, M)


def test_films_alike_but_for_case_are_one_film(tmp_path):
    films = write(
        tmp_path / "films.csv", "id,title,year\n1,Heat,1995\n2,Up,2009\n3,Ronin,1998\n4,Thief,1981\n5,HEAT,1995\n"
    )
    log = write(tmp_path / "log.csv", log_of({"ann": "5234", "bob": "4321"}))
    done = import_interactions(log, tmp_path / "out", InteractionOptions(catalog=films))
    dataset = load_dataset(tmp_path / "out")
    assert f"taken as one item; the first: {films}:6: 'HEAT (1995)'" in done
    assert [film.line for film in dataset.catalog] == ["Heat (1995)", "Up (2009)", "Ronin (1998)", "Thief (1981)"]
    assert {s.id: s.groundtruth for s in dataset.test} == {
        "ann-test": (("Thief", 1981),),
        "bob-test": (("Heat", 1995),),
    }
    names = {"ann": ["Heat (1995)", "Up (2009)", "Ronin (1998)"], "bob": ["HEAT (1995)", "Ronin (1998)", "Up (2009)"]}
    log = write(tmp_path / "names.csv", log_of({who: [*titles, "Thief (1981)"] for who, titles in names.items()}))
    import_interactions(log, tmp_path / "named", InteractionOptions())
    assert len(load_dataset(tmp_path / "named").catalog) == 4
