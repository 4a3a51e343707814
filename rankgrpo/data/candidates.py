"""Samples that bring their own candidates: the catalog of such a sample, and what its lists leave out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from rankgrpo.data.dialogs import named_items, seen_items
from rankgrpo.data.samples import Candidate, Sample
from rankgrpo.errors import ConfigError, DataError
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.items.format import ItemFormat
from rankgrpo.items.lines import make_catalog


def sample_catalog(sample: Sample, catalog: Catalog) -> Catalog:
    """The items that a sample's lists may name: its candidates, or the catalog where it brings none."""
    return _catalog_of(sample.candidates, catalog) if sample.candidates else catalog


@lru_cache(maxsize=1 << 14)
def _catalog_of(candidates: tuple[Candidate, ...], catalog: Catalog) -> Catalog:
    items = (catalog.items[index] for index in _indices(candidates, catalog))
    return make_catalog(items, catalog.item_format)


def candidate_items(sample: Sample, catalog: Catalog) -> list[int]:
    """Catalog indices of the candidates, in their order. Raises DataError for one that the catalog does not hold."""
    return list(_indices(sample.candidates, catalog))


@lru_cache(maxsize=1 << 14)
def _indices(candidates: tuple[Candidate, ...], catalog: Catalog) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for candidate in candidates:
        index = catalog.lookup(candidate.title, candidate.year)
        if index is None or index in found:
            what = "is the item of another candidate" if index is not None else "is not in the catalog"
            raise DataError(f"candidate {candidate.title!r} {what}; every candidate is an item of the catalog")
        found[index] = None
    return tuple(found)


def excluded_items(sample: Sample, catalog: Catalog) -> list[int]:
    """Catalog indices that no baseline lists for a sample: what it has named, or all but its candidates."""
    if not sample.candidates:
        return named_items(sample, catalog)
    kept = set(candidate_items(sample, catalog))
    return [index for index in range(len(catalog)) if index not in kept]


def best_order(sample: Sample, catalog: Catalog) -> list[int]:
    """Catalog indices of the candidates as they are best ordered: by what they are worth, equals as they were given."""
    gain_of: dict[int | None, float] = {}
    for (title, year), gain in zip(sample.groundtruth, sample.gains, strict=True):
        gain_of[catalog.lookup(title, year)] = gain
    return sorted(candidate_items(sample, catalog), key=lambda index: -gain_of.get(index, 0.0))


def catalog_of_candidates(samples: Iterable[Sample], item_format: ItemFormat) -> Catalog | None:
    """Every candidate of any sample, each once, as a catalog; None if a sample brings none."""
    items: dict[tuple[str, int | None], Item] = {}
    for sample in samples:
        if not sample.candidates:
            return None
        for candidate in sample.candidates:
            items.setdefault((candidate.title, candidate.year), Item(candidate.title, candidate.year))
    return make_catalog(items.values(), item_format) if items else None


def check_candidates(samples: Sequence[Sample], catalog: Catalog, num_ranks: int, forbid: str, *, held: bool) -> None:
    """Raise ConfigError or DataError for candidates of which no list can be made."""
    for sample in samples:
        if not sample.candidates:
            continue
        try:
            items = candidate_items(sample, catalog)
        except DataError as error:
            raise DataError(f"sample {sample.id!r}: {error}") from None
        closed = set(items).intersection(seen_items(sample, catalog)) if held and forbid == "repeats+seen" else ()
        if num_ranks > len(items) - len(closed):
            but = f", {len(closed)} of them seen (rl.forbid = {forbid})" if closed else ""
            raise ConfigError(
                f"data.num_ranks = {num_ranks}: sample {sample.id!r} has {len(items)} candidates{but}, fewer than a "
                "list asks for; ask for fewer, or give it more candidates"
            )
        if held and forbid == "none":
            raise ConfigError(
                f"rl.forbid = none: sample {sample.id!r} has candidates, and lists held to them name none twice; set "
                "rl.forbid=repeats"
            )
