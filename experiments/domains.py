"""The data sets of the suites that are not films, from the files as they are published.

    python experiments/domains.py office path/to/amazon_office data/office
    python experiments/domains.py office-sid path/to/amazon_office data/office-sid
    python experiments/domains.py office-bm25 path/to/amazon_office data/office-bm25
    python experiments/domains.py music path/to/cpcd_music data/music

Office products are the purchase histories of MiniOneRec (github.com/AkaliKong/MiniOneRec, data/Amazon), of which the
larger training file is not used: `valid_*.csv` is the training split here, and a tenth of its users validation. The
data set for re-ranking has, of every history, the twenty products that BM25 finds by the titles of the last four
purchases, labelled [1] to [20] in its order; histories whose next purchase is not among them are left out.

Music is the development split of the Conversational Playlist Curation Dataset (google-research-datasets/cpcd), of 50
conversations: some twenty songs are the goal of each, of the 8,850 that searches found. It shows what the import of
such data takes; so few conversations cannot train or tell methods apart.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rankgrpo.data.importers.interactions import InteractionOptions, import_interactions
from rankgrpo.data.load import load_dataset
from rankgrpo.data.samples import Candidate, Sample, Turn, write_samples
from rankgrpo.errors import DataError
from rankgrpo.files.atomic import atomic_folder
from rankgrpo.files.rows import read_jsonl
from rankgrpo.items.format import ItemFormat
from rankgrpo.items.lines import make_catalog, make_item

NUM_FOUND = 20  # products that BM25 finds of a history


def make_office(source: Path, out: Path, item: str) -> str:
    """The data set folder of office products under an item format; returns what was done."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        for ours, theirs in (("train", "valid_*.csv"), ("test", "test_*.csv")):
            (files / f"{ours}.csv").symlink_to(_only(source, theirs).resolve())
        with (files / "items.csv").open("w", encoding="utf-8", newline="") as table:
            writer = csv.writer(table)
            writer.writerow(["id", "title", "sid"])
            for line in _only(source, "info_*.txt").read_text(encoding="utf-8").splitlines():
                sid, title, item_id = line.split("\t")
                writer.writerow([item_id, title, sid])
        options = InteractionOptions(
            item=ItemFormat(item),
            catalog=files / "items.csv",
            columns={"user": "user_id", "history": "history_item_id", "item": "item_id"},
            num_history=4,
            sentence="I bought {items}. What next?",
        )
        return import_interactions(files, out, options)


def make_office_bm25(source: Path, out: Path, item: str) -> str:
    """Histories with what BM25 finds for them; the list is an order of the labels, so no catalog is written."""
    try:
        import bm25s
    except ModuleNotFoundError:
        raise DataError("candidates are searched with the package bm25s; run: pip install bm25s") from None
    with tempfile.TemporaryDirectory() as folder:
        make_office(source, Path(folder) / "office", "{title}")
        dataset = load_dataset(Path(folder) / "office", item_format=ItemFormat("{title}"))
    titles = [entry.title for entry in dataset.catalog]
    options: dict[str, Any] = {"show_progress": False}
    searcher = bm25s.BM25()
    searcher.index(bm25s.tokenize(titles, stopwords="en", **options), **options)
    splits: dict[str, list[Sample]] = {}
    for split in ("train", "validation", "test"):
        samples = getattr(dataset, split)
        queries = [" ".join(sample.seen_titles[-4:]) for sample in samples]
        words = bm25s.tokenize(queries, stopwords="en", return_ids=False, **options)
        kept = []
        for sample, query in zip(samples, words, strict=True):
            # Not its `retrieve`, whose order of equal scores, and so its last places, depend on the processor.
            places = np.argsort(-searcher.get_scores(query), kind="stable").tolist()
            candidates = [titles[place] for place in places if titles[place] not in sample.seen_titles][:NUM_FOUND]
            ((wanted, _),) = sample.groundtruth
            if wanted in candidates:
                labelled = tuple(Candidate(f"[{i}]", None, text) for i, text in enumerate(candidates, 1))
                right = ((f"[{1 + candidates.index(wanted)}]", None),)
                kept.append(replace(sample, seen_titles=(), candidates=labelled, groundtruth=right))
        splits[split] = kept
    with atomic_folder(out) as folder:
        for split, samples in splits.items():
            write_samples(folder / f"{split}.jsonl", samples)
    counts = ", ".join(f"{len(kept)} of {len(getattr(dataset, split))} {split}" for split, kept in splits.items())
    return f"histories whose next purchase is among the {NUM_FOUND} that BM25 finds: {counts}"


def make_music(source: Path, out: Path, item: str) -> str:
    """The data set folder of the music conversations: a sample for what the listener says before every answer.

    Right are the songs of the goal that were not liked yet. Recordings of one song (`track_cluster_ids`) are one item:
    it is written as the first of them, and the lines of the others are its aliases.
    """
    item_format = ItemFormat(item)
    rows = [row for _, row in read_jsonl(_only(source, "*.jsonl")) if isinstance(row, dict)]
    tracks = {name: track for row in rows for name, track in row["tracks"].items()}
    columns = {
        name: {"artist": ", ".join(track["track_artists"]), "title": track["track_titles"]}
        for name, track in tracks.items()
    }
    lines_of: dict[str, dict[str, str]] = {}
    for name, track in tracks.items():
        lines_of.setdefault(track["track_cluster_ids"], {})[item_format.write(columns[name])] = name
    # Songs of two clusters that are written alike cannot be told apart by a list: they are one item, too.
    item_of: dict[str, str] = {}
    aliases: dict[str, dict[str, None]] = {}
    for cluster, lines in lines_of.items():
        line = next((line for line in lines if line in aliases), next(iter(lines)))
        item_of[cluster] = line
        aliases.setdefault(line, {}).update(dict.fromkeys(lines))
    line_of = {name: item_of[track["track_cluster_ids"]] for name, track in tracks.items()}
    for track in tracks.values():
        line_of.setdefault(track["track_canonical_ids"], item_of[track["track_cluster_ids"]])
    splits: dict[str, list[Sample]] = {"train": [], "validation": [], "test": []}
    for place, row in enumerate(rows):
        split = "test" if place % 5 == 4 else "validation" if place % 5 == 3 else "train"
        splits[split] += _music_samples(row, line_of)
    popularity = Counter(line for sample in splits["train"] for line, _ in sample.groundtruth)
    first = {line: columns[name] for lines in lines_of.values() for line, name in lines.items() if line in aliases}
    items = [
        replace(
            make_item(first[line], item_format),
            popularity=popularity[line],
            aliases=tuple(other for other in others if other != line),
        )
        for line, others in aliases.items()
    ]
    with atomic_folder(out) as folder:
        for split, samples in splits.items():
            write_samples(folder / f"{split}.jsonl", samples)
        make_catalog(items, item_format).to_jsonl(folder / "catalog.jsonl")
    counts = ", ".join(f"{len(samples)} {split}" for split, samples in splits.items())
    return f"{len(rows)} conversations, {len(tracks)} tracks, {len(items)} songs; samples: {counts}"


def _music_samples(row: dict[str, Any], line_of: dict[str, str]) -> list[Sample]:
    samples, turns, liked = [], [], {}
    for place, turn in enumerate(row["turns"]):
        turns.append(Turn("user", turn["user_query"].strip()))
        # A few goals are tracks that the file does not describe.
        goal = dict.fromkeys(line_of[name] for name in row["goal_playlist"] if name in line_of)
        wanted = [line for line in goal if line not in liked]
        said = tuple(turn for turn in turns if turn.content)
        if said and wanted:
            groundtruth = tuple((line, None) for line in wanted)
            samples.append(Sample(f"{row['id']}-{place}", said, tuple(liked), groundtruth, dialog=row["id"]))
        liked |= dict.fromkeys(line_of[name] for name in turn["liked_results"])
        turns.append(Turn("assistant", turn["system_response"].strip()))
    return samples


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(f"{folder}: expected one {pattern}, found {len(found)}")
    return found[0]


DOMAINS = {
    "office": (make_office, "{title}"),
    "office-sid": (make_office, "{sid}"),
    "office-bm25": (make_office_bm25, "{label}"),
    "music": (make_music, "{artist} - {title}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(DOMAINS))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    make, item = DOMAINS[given.name]
    print(make(given.source, given.out, item))


if __name__ == "__main__":
    main()
