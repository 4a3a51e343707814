"""What samples name, as catalog items, and which of them are cuts of one dialog."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rankgrpo.data.samples import Sample, Turn
from rankgrpo.items.catalog import Catalog
from rankgrpo.items.format import title_line

if TYPE_CHECKING:
    from rankgrpo.parse import ListedItem

PLAIN_WORDS = 12
"""A conversation of fewer words may be a stranger's, word for word."""


def named_items(sample: Sample, catalog: Catalog) -> list[int]:
    """Catalog indices of what a conversation has named, without repeats: the input of EASE, and what it may not return.

    These are the items written as `Title (Year)` anywhere in the text, and the seen titles. A seen title with remakes
    means those of them that the text names with their year, or all of them when it names none.
    """
    mentioned = dict.fromkeys(index for turn in sample.conversation for index in catalog.find_mentions(turn.content))
    named = dict(mentioned)
    for title in sample.seen_titles:
        remakes = catalog.title_indices(title)
        if not any(index in mentioned for index in remakes):
            named |= dict.fromkeys(remakes)
    return list(named)


def seen_items(sample: Sample, catalog: Catalog) -> list[int]:
    """The items that a user has seen, as catalog indices; a bare title means all its remakes."""
    return list(dict.fromkeys(index for title in sample.seen_titles for index in catalog.title_indices(title)))


def seen_lines(items: Sequence[ListedItem], sample: Sample, catalog: Catalog, year_tolerance: int) -> list[bool]:
    """By line of a list, whether it names what the user has seen: an item of `seen_items`, however it is written there,
    or outside the catalog the same title, with its year or without."""
    seen, titles = set(seen_items(sample, catalog)), {catalog.title_key(title) for title in sample.seen_titles}

    def is_seen(title: str | None, year: int | None) -> bool:
        if title is None:
            return False
        index = catalog.lookup(title, year, year_tolerance=year_tolerance)
        if index is not None:
            return index in seen
        return any(catalog.title_key(name) in titles for name in (title, title_line(title, year)))

    return [is_seen(item.title, item.year) for item in items]


def groundtruth_items(sample: Sample, catalog: Catalog) -> list[int]:
    """Catalog indices of a sample's ground truth, without repeats and without what the catalog does not hold."""
    indices = dict.fromkeys(catalog.lookup(title, year) for title, year in sample.groundtruth)
    return [index for index in indices if index is not None]


def dialog_ids(samples: Sequence[Sample]) -> list[int]:
    """For every sample the number of its dialog, counted from 0 in order of first appearance.

    One dialog often gives several samples, each a longer cut of it. Samples that say their dialog belong to it. Of
    others two belong together when their ids agree up to the last "-" (`redial-391-3`, `redial-391-7`) and one
    conversation begins with the other; the second condition keeps apart ids that merely number unrelated samples
    (`demo-1`, `demo-2`). An opening as plain as "Hello", which strangers share, joins none of the conversations that go
    on from it in different ways.
    """
    ends = _plain_ends(samples)
    dialog_of: dict[object, int] = {}
    ids = [-1] * len(samples)
    num_dialogs = 0
    for index in sorted(range(len(samples)), key=lambda index: len(samples[index].conversation)):
        sample = samples[index]
        if sample.dialog is not None:
            cuts: list[object] = [sample.dialog]
        else:
            cuts = [cut for cut in _cuts(sample) if cut not in ends]
        known = next((dialog_of[cut] for cut in cuts if cut in dialog_of), None)
        if known is None:
            known, num_dialogs = num_dialogs, num_dialogs + 1
        ids[index] = known
        if cuts:
            dialog_of.setdefault(cuts[0], known)
    order = {dialog: place for place, dialog in enumerate(dict.fromkeys(ids))}
    return [order[dialog] for dialog in ids]


def _cuts(sample: Sample) -> list[tuple[str, tuple[Turn, ...]]]:
    """The sample's stem with its conversation and every beginning of it, the longest first."""
    stem = sample.id.rpartition("-")[0] or sample.id
    return [(stem, sample.conversation[:length]) for length in range(len(sample.conversation), 0, -1)]


def _plain_ends(samples: Sequence[Sample]) -> set[tuple[str, tuple[Turn, ...]]]:
    """Beginnings of few words that are whole conversations of two samples, or go on in two ways."""
    goes_on: dict[object, set[Turn]] = {}
    num_whole: Counter[object] = Counter()
    for sample in samples:
        if sample.dialog is not None:
            continue
        following = None
        for cut in _cuts(sample):
            if sum(len(turn.content.split()) for turn in cut[1]) < PLAIN_WORDS:
                if following is None:
                    num_whole[cut] += 1
                else:
                    goes_on.setdefault(cut, set()).add(following)
            following = cut[1][-1]
    return {cut for cut in (*goes_on, *num_whole) if len(goes_on.get(cut, ())) > 1 or num_whole[cut] > 1}


def share_of_dialogs(samples: Sequence[Sample], frac: float, *, seed: int = 0) -> list[Sample]:
    """The samples of a share of the dialogs (`dialog_ids`), at least one, which `seed` draws, in the order given."""
    if frac == 1:
        return list(samples)
    dialogs = np.array(dialog_ids(samples))
    num_dialogs = int(dialogs.max(initial=-1)) + 1
    drawn = np.random.default_rng(seed).permutation(num_dialogs)[: max(round(frac * num_dialogs), 1)]
    return [samples[place] for place in np.isin(dialogs, drawn).nonzero()[0]]
