"""Import of a large log: 1,000,000 interactions with 100,000 items, as seconds and peak memory.

python experiments/bench/interactions.py
python experiments/bench/interactions.py --interactions 100000 --items 10000 --parquet
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from rankgrpo.data.importers.interactions import InteractionOptions, import_interactions
from rankgrpo.items.format import ItemFormat


def write_log(folder: Path, num_interactions: int, num_items: int, *, parquet: bool) -> tuple[Path, Path]:
    """A log of users with some twenty choices each, popular items more often, and its item table."""
    rng = np.random.default_rng(0)
    users = rng.integers(max(num_interactions // 20, 1), size=num_interactions)
    items = (num_items * rng.random(num_interactions) ** 3).astype(int)
    times = rng.integers(1_500_000_000, 1_700_000_000, size=num_interactions)
    table = folder / "items.csv"
    lines = (f"b{n},A book of some length number {n},Author {n % 977}\n" for n in range(num_items))
    table.write_text("id,title,author\n" + "".join(lines), encoding="utf-8")
    if parquet:
        import pyarrow
        import pyarrow.parquet

        log = folder / "log.parquet"
        columns = {"user": [f"u{user}" for user in users], "item": [f"b{item}" for item in items], "time": times}
        pyarrow.parquet.write_table(pyarrow.table(columns), log)
    else:
        log = folder / "log.csv"
        rows = (f"u{user},b{item},{at}\n" for user, item, at in zip(users, items, times, strict=True))
        log.write_text("user,item,time\n" + "".join(rows), encoding="utf-8")
    return log, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interactions", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--parquet", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, table = write_log(folder, given.interactions, given.items, parquet=given.parquet)
        began, processor = time.perf_counter(), time.process_time()
        options = InteractionOptions(item=ItemFormat("{title} by {author}"), catalog=table, core=3)
        print(import_interactions(log, folder / "out", options))
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        size = sum(path.stat().st_size for path in (folder / "out").iterdir()) / 1e6
        print(f"{given.interactions:,} interactions, {given.items:,} items: {seconds:.1f} s ({processor:.1f} s of the")
        print(f"processor), peak memory {peak:.2f} GiB, {size:.0f} MB written")


if __name__ == "__main__":
    main()
