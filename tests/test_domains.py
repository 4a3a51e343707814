"""The data sets that are not films, made of the published files."""

import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from rankgrpo.data.load import load_dataset
from rankgrpo.evaluation.health import check_dataset
from rankgrpo.items.format import ItemFormat

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
OFFICE = Path(os.environ.get("RANKGRPO_OFFICE", SHARED / "amazon_office"))
MUSIC = Path(os.environ.get("RANKGRPO_MUSIC", SHARED / "cpcd_music"))


@pytest.fixture
def domains(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import domains

    yield domains
    sys.modules.pop("domains")


@pytest.mark.parametrize(
    ("name", "num_items", "counts"),
    [
        ("office", 3443, (4120, 436, 4712)),
        ("office-sid", 3444, (4122, 437, 4712)),
    ],
)
def test_office_products(tmp_path, domains, name, num_items, counts):
    if not OFFICE.is_dir():
        pytest.skip(f"{OFFICE} is not here; office products lie beside the repository where this is measured")
    make, item = domains.DOMAINS[name]
    make(OFFICE, tmp_path / name, item)
    dataset = load_dataset(tmp_path / name, item_format=ItemFormat(item))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == counts
    assert len(dataset.catalog) == num_items
    assert max(len(entry.title) for entry in dataset.catalog) == (219 if name == "office" else 21)
    report = check_dataset(dataset, baselines=False)
    assert not any(w.startswith("leak:") for w in report.warnings)
    assert report.splits["test"].in_catalog_frac == 1 and report.splits["test"].known_seen_frac == 1


@pytest.mark.slow
def test_candidates_that_bm25_finds(tmp_path, domains):
    """On four histories, whose candidates are searched with a formula written out here, Lucene's BM25."""
    pytest.importorskip("bm25s")
    if not OFFICE.is_dir():
        pytest.skip(f"{OFFICE} is not here; office products lie beside the repository where this is measured")
    make, item = domains.DOMAINS["office-bm25"]
    done = make(OFFICE, tmp_path / "office-bm25", item)
    dataset = load_dataset(tmp_path / "office-bm25", item_format=ItemFormat(item))
    assert done.endswith("707 of 4120 train, 81 of 436 validation, 674 of 4712 test")
    assert [len(dataset.train), len(dataset.validation), len(dataset.test)] == [707, 81, 674]
    assert {len(sample.candidates) for sample in dataset.test} == {20} and len(dataset.catalog) == 20

    domains.DOMAINS["office"][0](OFFICE, tmp_path / "office", "{title}")
    office = load_dataset(tmp_path / "office", item_format=ItemFormat("{title}"))
    titles = [entry.title for entry in office.catalog]
    history = {sample.id: sample for sample in office.test}
    words = {title: re.findall(r"\b\w\w+\b", title.lower()) for title in titles}
    mean = sum(map(len, words.values())) / len(words)
    holders = Counter(word for own in words.values() for word in set(own))
    # The common words that bm25s leaves out are left out of the query; lengths differ by them, so orders nearly agree.
    common = set(
        "a an and are as at be but by for if in into is it no not of on or such that the their then there these".split()
    )
    common |= set("they this to was will with".split())

    def score(query, title):
        total = 0.0
        for word in query:
            count = words[title].count(word)
            idf = math.log(1 + (len(titles) - holders[word] + 0.5) / (holders[word] + 0.5))
            total += idf * count / (count + 1.5 * (0.25 + 0.75 * len(words[title]) / mean))
        return total

    for sample in dataset.test[:4]:
        bought = history[sample.id]
        query = [word for title in bought.seen_titles[-4:] for word in re.findall(r"\b\w\w+\b", title.lower())]
        query = [word for word in query if word not in common]
        ranked = sorted((t for t in titles if t not in bought.seen_titles), key=lambda t: -score(query, t))
        own = [candidate.text for candidate in sample.candidates]
        assert len(set(ranked[:25]) & set(own)) >= 18
        (right, _), ((label, _),) = bought.groundtruth[0], sample.groundtruth
        assert own[int(label.strip("[]")) - 1] == right


def test_music(tmp_path, domains):
    if not MUSIC.is_dir():
        pytest.skip(f"{MUSIC} is not here; the music conversations lie beside the repository where this is measured")
    make, item = domains.DOMAINS["music"]
    done = make(MUSIC, tmp_path / "music", item)
    dataset = load_dataset(tmp_path / "music", item_format=ItemFormat(item))
    assert done.startswith("50 conversations, 8850 tracks, ")
    samples = [*dataset.train, *dataset.validation, *dataset.test]
    assert len({sample.dialog for sample in samples}) == 50
    first = {sample.dialog: len(sample.groundtruth) for sample in reversed(samples)}
    assert 18 < sum(first.values()) / 50 < 20.3  # 20.2 tracks, of which a few are recordings of one song
    catalog = dataset.catalog
    assert all(catalog.lookup(line) is not None for sample in samples for line, _ in sample.groundtruth)
    # What a list may write of a song: the line of any of its recordings.
    found = [
        catalog.lookup(line) == index for index, song in enumerate(catalog) for line in (song.title, *song.aliases)
    ]
    # Two songs differ in a capital and an apostrophe: a third spelling of them names neither.
    assert found.count(False) == 1
    assert len(catalog) == 8733 and sum(bool(song.aliases) for song in catalog) == 31
    seen = [title for sample in samples for title in sample.seen_titles]
    assert seen and all(catalog.title_indices(title) for title in seen)
    assert not any(w.startswith("leak:") for w in check_dataset(dataset, baselines=False).warnings)
