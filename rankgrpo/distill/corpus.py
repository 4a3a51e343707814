"""Everything that gets a demonstration, and what the stages need to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from rankgrpo.baselines.ease import EaseTeacher
from rankgrpo.baselines.popularity import popularity_counts, popularity_order
from rankgrpo.data.dialogs import dialog_ids, groundtruth_items, named_items
from rankgrpo.data.samples import Dataset, Sample
from rankgrpo.distill.augment import request_id, short_requests
from rankgrpo.distill.settings import DistillConfig, content_key
from rankgrpo.items.catalog import Catalog


@dataclass(frozen=True)
class Corpus:
    """Training conversations, then the short requests made from them, then validation conversations."""

    catalog: Catalog
    samples: list[Sample]
    sources: list[int]
    """By sample, the training conversation it is or was made from; -1 for validation."""
    num_train: int
    num_validation: int
    named: list[list[int]]
    """By sample, what its conversation named: no list may hold that."""
    groundtruth: list[list[int]]
    """By sample, the catalog items that are right and were not named before."""
    fold_of: list[int]
    """By sample, the fold of its dialog; -1 for validation, and for everything when there are no folds."""
    order_N: Tensor
    """Catalog items by popularity in training: the order among equal scores."""

    def places(self, split: str) -> range:
        """Where the conversations of "train" or "validation" are, without short requests."""
        total = len(self.samples)
        return {"train": range(self.num_train), "validation": range(total - self.num_validation, total)}[split]

    @property
    def trained(self) -> range:
        """Where everything is that becomes a training demonstration."""
        return range(len(self.samples) - self.num_validation)

    def key(self) -> str:
        """A hash of the samples and the catalog."""
        rows = [
            [s.id, [[t.role, t.content] for t in s.conversation], list(s.seen_titles), list(s.groundtruth)]
            for s in self.samples
        ]
        items = [
            [item.title, item.year, item.popularity, list(item.genres), item.text, *item.aliases]
            for item in self.catalog
        ]
        return content_key(rows, items, self.num_train, self.num_validation)


def make_corpus(config: DistillConfig, dataset: Dataset, ease: EaseTeacher | None) -> Corpus:
    """The corpus of a data set; `ease` makes the short requests, and is needed only when there are some."""
    catalog = dataset.catalog
    samples, sources = list(dataset.train), list(range(len(dataset.train)))
    if ease is not None and config.short_requests:
        place_of = {sample.id: place for place, sample in enumerate(dataset.train)}
        rounds = short_requests(
            dataset.train,
            ease,
            catalog,
            num_variants=config.short_requests,
            num_items=config.num_items,
            seed=config.seed,
        )
        for variant, requests in enumerate(rounds):
            samples += [replace(request, id=request_id(request, variant)) for request in requests]
            sources += [place_of[request.id] for request in requests]
    samples += dataset.validation
    sources += [-1] * len(dataset.validation)
    named = [named_items(sample, catalog) for sample in samples]
    wanted = [groundtruth_items(sample, catalog) for sample in samples]
    return Corpus(
        catalog=catalog,
        samples=samples,
        sources=sources,
        num_train=len(dataset.train),
        num_validation=len(dataset.validation),
        named=named,
        groundtruth=[[i for i in items if i not in set(n)] for items, n in zip(wanted, named, strict=True)],
        fold_of=_folds(dataset.train, sources, config),
        order_N=popularity_order(popularity_counts(dataset.train, catalog)),
    )


def _folds(train: Sequence[Sample], sources: Sequence[int], config: DistillConfig) -> list[int]:
    """Dialogs are dealt to folds as EaseTeacher deals them: the cuts of one dialog share a fold."""
    if config.num_folds == 0:
        return [-1] * len(sources)
    dialogs = dialog_ids(train)
    num_dialogs = max(dialogs) + 1
    if config.num_folds > num_dialogs:
        raise ValueError(f"--num-folds must be at most {num_dialogs}, the number of dialogs; got {config.num_folds}")
    fold_of_dialog = np.random.default_rng(config.seed).permutation(num_dialogs) % config.num_folds
    return [-1 if source < 0 else int(fold_of_dialog[dialogs[source]]) for source in sources]


def rank_with_ease(corpus: Corpus, ease: EaseTeacher, num_items: int) -> list[list[int]]:
    """EASE's lists; a short request is answered by the model that never saw its dialog."""
    asked = [
        sample if source < 0 else replace(sample, id=corpus.samples[source].id)
        for sample, source in zip(corpus.samples, corpus.sources, strict=True)
    ]
    return ease.rank_all(asked, num_items=num_items)
