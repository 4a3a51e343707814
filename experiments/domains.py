"""The data sets of the suites that are not films, from the files as they are published.

    python experiments/domains.py office path/to/amazon_office data/office
    python experiments/domains.py office-sid path/to/amazon_office data/office-sid

Office products are the purchase histories of MiniOneRec (github.com/AkaliKong/MiniOneRec, data/Amazon), of which the
larger training file is not used: `valid_*.csv` is the training split here, and a tenth of its users validation.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

from rankgrpo.data.importers.interactions import InteractionOptions, import_interactions
from rankgrpo.errors import DataError
from rankgrpo.items.format import ItemFormat


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


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(f"{folder}: expected one {pattern}, found {len(found)}")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["office", "office-sid"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    print(make_office(given.source, given.out, "{sid}" if given.name == "office-sid" else "{title}"))


if __name__ == "__main__":
    main()
