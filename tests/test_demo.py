"""The demo world: facts by hand, the promises about samples checked on the text, and baselines measured here."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rankgrpo.data import demo
from rankgrpo.data.demo import words
from rankgrpo.data.demo.world import CATALOG_PATH
from rankgrpo.data.load import load_dataset
from rankgrpo.data.samples import SPLITS
from rankgrpo.items.catalog import Catalog
from rankgrpo.parse import parse_list

NUM_RANKS = 20


@pytest.fixture(scope="module")
def dataset():
    return demo.make_demo(num_train=1500, num_validation=20, num_test=400, seed=0)


@pytest.fixture(scope="module")
def samples(dataset):
    return [sample for name in SPLITS for sample in dataset.split(name)]


def text_of(sample):
    return "\n".join(turn.content for turn in sample.conversation)


def bare(seen_title):
    return re.sub(r" \(\d{4}\)$", "", seen_title)


def names(text, title):
    """Whether the text holds the title as whole words, written as in the catalog."""
    return re.search(rf"(?<!\w){re.escape(title)}(?!\w)", text) is not None


# ----------------------------------------------------------------------------------------------------------------------
# The catalog file


def test_rows_are_complete_and_well_typed():
    rows = [json.loads(line) for line in CATALOG_PATH.read_text(encoding="utf-8").splitlines()]
    assert 500 <= len(rows) <= 600
    for row in rows:
        assert list(row) == ["title", "year", "director", "genres", "keywords", "fame"], row
        assert row["title"] == row["title"].strip() and row["director"] == row["director"].strip()
        assert 1895 <= row["year"] <= 2025
        assert 1 <= row["fame"] <= 100
        assert row["genres"] and len(set(row["genres"])) == len(row["genres"])
        assert 3 <= len(set(row["keywords"])) == len(row["keywords"]) <= 6, row
    assert len({(row["title"], row["year"]) for row in rows}) == len(rows)
    assert [row["year"] for row in rows] == sorted(row["year"] for row in rows)


def test_vocabularies_are_shared():
    films = demo.demo_films()
    genres = Counter(genre for film in films for genre in film.genres)
    keywords = Counter(keyword for film in films for keyword in film.keywords)
    assert set(genres) == set(words.GENRE_NOUNS) and min(genres.values()) >= 15
    assert min(keywords.values()) >= 3
    spoken = words.MOODS.keys() | words.TAILS.keys()
    assert not spoken - keywords.keys(), "phrases for keywords that no film has"
    assert not words.MOODS.keys() & words.TAILS.keys()


@pytest.mark.parametrize(
    ("title", "year", "director"),
    [
        ("Stalker", 1979, "Andrei Tarkovsky"),
        ("Vertigo", 1958, "Alfred Hitchcock"),
        ("Seven Samurai", 1954, "Akira Kurosawa"),
        ("Amélie", 2001, "Jean-Pierre Jeunet"),
        ("WALL·E", 2008, "Andrew Stanton"),
        ("8½", 1963, "Federico Fellini"),
        ("Cléo from 5 to 7", 1962, "Agnès Varda"),
        ("The Good, the Bad and the Ugly", 1966, "Sergio Leone"),
        ("O Brother, Where Art Thou?", 2000, "Joel and Ethan Coen"),
        ("Dune", 1984, "David Lynch"),
        ("Dune", 2021, "Denis Villeneuve"),
        ("Nosferatu", 1922, "F. W. Murnau"),
        ("Nosferatu", 2024, "Robert Eggers"),
        ("Solaris", 1972, "Andrei Tarkovsky"),
        ("Solaris", 2002, "Steven Soderbergh"),
    ],
)
def test_facts(title, year, director):
    assert [film.director for film in demo.demo_films() if (film.title, film.year) == (title, year)] == [director]


def test_lines_are_read_back():
    """A line that names an item, alone or inside a sentence, is that item for the parser and for the catalog."""
    catalog = demo.demo_catalog()
    for index, item in enumerate(catalog):
        line = f"{item.title} ({item.year})"
        (listed,) = parse_list(line)
        assert catalog.lookup(listed.title, listed.year) == index, line
        assert catalog.find_mentions(f"I loved {line}, more please") == [index], line


def test_catalog_text_tells_the_facts():
    item = demo.demo_catalog().items[demo.demo_catalog().lookup("Stalker", 1979)]
    assert item.genres == ("Science Fiction", "Drama")
    assert item.text == "directed by Andrei Tarkovsky; slow burn, mind-bending, post-apocalypse, eerie, poetic"
    assert item.popularity == 0


# ----------------------------------------------------------------------------------------------------------------------
# Determinism


def test_same_arguments_same_data():
    first, again = demo.make_demo(30, 5, 5, seed=3), demo.make_demo(30, 5, 5, seed=3)
    assert (first.train, first.validation, first.test) == (again.train, again.validation, again.test)
    assert first.catalog.items == again.catalog.items
    assert first.train != demo.make_demo(30, 5, 5, seed=4).train


def test_users_do_not_depend_on_how_many_there_are():
    small, large = demo.make_demo(10, 3, 4, seed=1), demo.make_demo(40, 9, 11, seed=1)
    assert (small.train, small.validation, small.test) == (large.train[:10], large.validation[:3], large.test[:4])


def test_splits_and_seeds_are_different_users():
    conversations = [demo.make_sample(seed, name, 0).conversation for seed in range(4) for name in SPLITS]
    assert len(set(conversations)) == 12


def test_other_processes_make_the_same_data():
    """Sets of strings iterate in another order in every process; nothing may depend on it."""
    script = "from rankgrpo.data import demo; print([demo.make_sample(5, 'train', i) for i in range(20)])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
            encoding="utf-8",
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert outputs == {f"{[demo.make_sample(5, 'train', i) for i in range(20)]}\n"}


# ----------------------------------------------------------------------------------------------------------------------
# What a sample promises


def test_conversations_alternate_and_end_with_the_user(samples):
    assert Counter(len(sample.conversation) for sample in samples).keys() == {1, 3, 5}
    for sample in samples:
        roles = [turn.role for turn in sample.conversation]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert all(turn.content.strip() == turn.content != "" for turn in sample.conversation)
        assert not re.search(r"[{}|]|  |\.\.$|\b(None|nan)\b", text_of(sample).replace("...", "")), text_of(sample)


def test_conversations_are_short(samples):
    num_words = [len(text_of(sample).split()) for sample in samples]
    assert 30 <= np.median(num_words) <= 70
    assert max(num_words) <= 120


def test_ground_truth_is_in_the_catalog_and_new(dataset, samples):
    assert {len(sample.groundtruth) for sample in samples} == set(range(3, 11))
    for sample in samples:
        assert all(entry in dataset.catalog for entry in sample.groundtruth)
        titles = [title for title, _ in sample.groundtruth]
        assert len(set(titles)) == len(titles)
        assert not set(titles) & {bare(seen) for seen in sample.seen_titles}


def test_seen_titles_are_what_the_text_names(dataset, samples):
    catalog = dataset.catalog
    num_bare = 0
    for sample in samples:
        text = text_of(sample)
        seen = [catalog.title_indices(title) for title in sample.seen_titles]
        assert seen and all(len(indices) == 1 for indices in seen), "a seen title names exactly one item"
        assert all(names(text, bare(title)) for title in sample.seen_titles), (sample.seen_titles, text)
        with_year = catalog.find_mentions(text)
        assert with_year == [index for (index,) in seen if index in with_year], "in order of mention, and no others"
        num_bare += len(seen) - len(with_year)
    num_seen = sum(len(sample.seen_titles) for sample in samples)
    assert 0.05 < num_bare / num_seen < 0.3


def test_text_does_not_name_the_ground_truth(samples):
    """Beyond titles inside other titles ("Alien" in "Alien 3") and names of directors ("M. Night Shyamalan")."""
    directors = {film.director for film in demo.demo_films()}
    for sample in samples:
        text = text_of(sample)
        for known in sorted({bare(title) for title in sample.seen_titles}, key=len, reverse=True):
            text = text.replace(known, "_")
        for director in directors:
            text = text.replace(director, "_")
        assert not [title for title, _ in sample.groundtruth if names(text, title)], text_of(sample)


def test_words_of_the_grammar_are_no_titles():
    titles = {film.title for film in demo.demo_films()}
    phrases = [template for templates in words.TEMPLATES.values() for template in templates]
    phrases += [*words.MOODS.values(), *words.TAILS.values(), *words.DECADES.values()]
    phrases += [noun for nouns in words.GENRE_NOUNS.values() for noun in nouns]
    assert not [(title, phrase) for title in titles for phrase in phrases if names(phrase, title)]


def test_messages_vary(samples):
    user = [turn.content for sample in samples for turn in sample.conversation if turn.role == "user"]
    assert len(set(user)) / len(user) > 0.93
    assert len({sample.conversation for sample in samples}) == len(samples)
    whole = "\n".join(map(text_of, samples))
    fixed = [t for kind in ("greeting", "situation", "ask", "accept", "closer") for t in words.TEMPLATES[kind]]
    assert all(template in whole for template in fixed)
    assert sum(map(len, words.TEMPLATES.values())) > 100


def test_popularity_counts_the_training_ground_truth(dataset):
    count = Counter()
    for sample in dataset.train:
        count.update(sample.groundtruth)
    assert {(item.title, item.year): item.popularity for item in dataset.catalog if item.popularity} == count
    assert sum(count.values()) == sum(item.popularity for item in dataset.catalog)


# ----------------------------------------------------------------------------------------------------------------------
# Is it learnable, and not trivial?


def ndcg(ranked, wanted):
    gain = sum(1 / np.log2(rank + 2) for rank, item in enumerate(ranked) if item in wanted)
    return gain / sum(1 / np.log2(rank + 2) for rank in range(min(len(wanted), NUM_RANKS)))


def mean_ndcg(score, samples, catalog):
    values = []
    for sample in samples:
        seen = [index for title in sample.seen_titles for index in catalog.title_indices(title)]
        scores_N = np.array(score(sample, seen), dtype=float)
        scores_N[seen] = -np.inf
        wanted = {catalog.lookup(*entry) for entry in sample.groundtruth}
        values.append(ndcg(np.argsort(-scores_N, kind="stable")[:NUM_RANKS].tolist(), wanted))
    return np.mean(values)


def fit_ease(samples, catalog, l2):
    """B of Steck 2019, Eq. 8, on the 0/1 matrix of users x films they like or name."""
    X = np.zeros((len(samples), len(catalog)))
    for row, sample in enumerate(samples):
        X[row, [index for title in sample.seen_titles for index in catalog.title_indices(title)]] = 1
        X[row, [catalog.lookup(*entry) for entry in sample.groundtruth]] = 1
    P = np.linalg.inv(X.T @ X + l2 * np.eye(len(catalog)))
    B = -P / np.diag(P)
    np.fill_diagonal(B, 0)
    return B


def test_popularity_ease_and_oracle_are_far_apart(dataset):
    catalog = dataset.catalog
    popularity_N = np.array([item.popularity for item in catalog])
    B = fit_ease(dataset.train, catalog, l2=50)
    popularity = mean_ndcg(lambda sample, seen: popularity_N, dataset.test, catalog)
    ease = mean_ndcg(lambda sample, seen: B[seen].sum(0) + 2e-4 * popularity_N, dataset.test, catalog)
    oracle = mean_ndcg(lambda sample, seen: demo.oracle_scores(sample), dataset.test, catalog)
    assert 0.08 < popularity < 0.16
    assert popularity + 0.06 < ease < 0.30
    assert ease + 0.20 < oracle < 0.68


def test_wishes_in_words_foretell_the_ground_truth(samples):
    """Who asks for a genre likes it more often than others, and who rules it out less often."""
    genres_of = {(film.title, film.year): film.genres for film in demo.demo_films()}

    def share(genre, group):
        entries = [entry for sample in group for entry in sample.groundtruth]
        return np.mean([genre in genres_of[entry] for entry in entries])

    dislikes = "|".join(re.escape(t) for kind in ("dislike", "reject") for t in words.TEMPLATES[kind])
    for genre in ("Horror", "Comedy", "Animation", "Science Fiction"):
        one, several, _ = words.GENRE_NOUNS[genre]
        rules_out = re.compile(dislikes.replace(r"\{dislike\}", several))
        asking = [sample for sample in samples if re.search(rf"\b{one}\b", text_of(sample))]
        refusing = [sample for sample in samples if rules_out.search(text_of(sample))]
        assert len(asking) >= 30 and len(refusing) >= 20, (genre, len(asking), len(refusing))
        assert share(genre, asking) > 1.8 * share(genre, samples), genre
        assert share(genre, refusing) < 0.4 * share(genre, samples), genre


def test_oracle_knows_the_taste_and_leaves_out_what_was_seen(dataset):
    for sample in dataset.test[:50]:
        scores_N = demo.oracle_scores(sample)
        seen = {index for title in sample.seen_titles for index in dataset.catalog.title_indices(title)}
        assert set(np.flatnonzero(np.isneginf(scores_N)).tolist()) == seen
        (ranked,) = demo.oracle_lists([sample], num_items=7)
        assert sorted(ranked, key=lambda index: -scores_N[index]) == ranked
        assert scores_N[ranked[-1]] >= np.sort(scores_N)[-7]


def test_oracle_refuses_strangers(dataset):
    with pytest.raises(ValueError, match="'redial-1-1'"):
        demo.oracle_scores(replace(dataset.test[0], id="redial-1-1"))


# ----------------------------------------------------------------------------------------------------------------------
# Files and arguments


def test_files_hold_the_same_data(tmp_path):
    made = demo.make_demo(12, 4, 6, seed=2)
    demo.write_demo(tmp_path / "world", 12, 4, 6, seed=2)
    read = load_dataset(tmp_path / "world")
    assert (read.train, read.validation, read.test) == (made.train, made.validation, made.test)
    assert read.catalog.items == made.catalog.items
    assert read.problems == []
    assert np.array_equal(demo.oracle_scores(read.test[5]), demo.oracle_scores(made.test[5]))


def test_catalog_file_is_a_catalog():
    titles = [(item.title, item.year) for item in Catalog.from_file(CATALOG_PATH)]
    assert titles == [(item.title, item.year) for item in demo.demo_catalog()]


@pytest.mark.parametrize("arguments", [{"num_train": -1}, {"num_test": -3}, {"seed": -1}])
def test_negative_sizes_and_seeds_are_refused(arguments):
    with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
        demo.make_demo(**arguments)
