"""The data sets that are not films, made of the published files."""

import os
import sys
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
