"""The offline teacher: EASE, a closed-form item-to-item model, whose lists the warm start imitates.

EASE (Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data", arXiv 1905.03375, Eq. 8) regresses every item
on all others. With a 0/1 matrix X of dialogs x items, B minimises

    ||X - X B||^2 + l2 ||B||^2   subject to diag(B) = 0,

which gives P = (X'X + l2 I)^-1 and B_ij = -P_ij / P_jj for i != j. A conversation x scores x B + popularity_weight *
popularity, what it already named is removed, and what remains is a list of catalog items by construction. A
conversation that names no known item gets the popularity list.

The teacher reads titles and nothing else of what people say: no text encoder, no language model.
"""

# Shape letters: N catalog items, A items that occur in training ("active"), S samples, K ranks.

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rankgrpo.baselines.popularity import popularity_counts, popularity_order
from rankgrpo.baselines.ranking import best_items
from rankgrpo.data.candidates import excluded_items
from rankgrpo.data.dialogs import dialog_ids, groundtruth_items, named_items
from rankgrpo.data.samples import Sample
from rankgrpo.items.catalog import Catalog

SCORED_AT_ONCE = 256  # samples; 256 x 7,000 scores in float32 are 7 MiB, and sorting them takes several times that


class EaseTeacher:
    """EASE fitted on dialogs; made by `EaseTeacher.fit`.

    Cross-fitted with num_folds >= 2: a sample the teacher was fitted on is ranked by a model (and a popularity) that
    never saw the fold its dialog is in. Without that, the list of a training sample mostly repeats the sample's own
    ground truth, which nobody could know from the conversation.
    """

    def __init__(self, catalog: Catalog, folds: Sequence[_Interactions], l2: float, popularity_weight: float) -> None:
        self.catalog = catalog
        self._folds = tuple(folds)
        self._l2 = l2
        self._popularity_weight = popularity_weight
        self._model = self._solve(self._folds)
        self._fold_of_id = (
            {name: fold for fold, part in enumerate(folds) for name in part.ids} if len(folds) > 1 else {}
        )

    @classmethod
    def fit(
        cls,
        samples: Sequence[Sample],
        catalog: Catalog,
        *,
        l2: float = 50.0,
        popularity_weight: float = 2e-4,
        num_folds: int = 0,
        seed: int = 0,
    ) -> EaseTeacher:
        """Fit on samples: a row of X is a dialog, holding all that its samples name or have as ground truth.

        Samples are joined to dialogs by `dialog_ids`, so the cuts of one dialog are one row and share a
        fold; `seed` deals the dialogs to folds. Popularity counts samples, not dialogs. The matrix to invert has the
        items that occur in training as rows: 1 s and 0.3 GB for 3,400 of them, cubic and quadratic beyond.

        Raises ValueError for l2 <= 0, a negative weight, an impossible num_folds, and samples without catalog items.
        """
        if not l2 > 0 or not popularity_weight >= 0:
            raise ValueError(f"l2 must be > 0 and popularity_weight >= 0, got {l2} and {popularity_weight}")
        dialogs = dialog_ids(samples)
        num_dialogs = max(dialogs, default=-1) + 1
        if num_folds == 1 or not 0 <= num_folds <= num_dialogs:
            raise ValueError(
                f"num_folds must be 0 (one model for all) or 2 to {num_dialogs}, the number of dialogs; got {num_folds}"
            )
        fold_of_dialog = np.random.default_rng(seed).permutation(num_dialogs) % max(num_folds, 1)
        folds = []
        for fold in range(max(num_folds, 1)):
            chosen = [(dialog, s) for dialog, s in zip(dialogs, samples, strict=True) if fold_of_dialog[dialog] == fold]
            folds.append(_Interactions.collect(chosen, catalog))
        if not any(row for fold in folds for row in fold.rows):
            raise ValueError(f"none of {len(samples)} samples names a catalog item, so there is nothing to learn from")
        return cls(catalog, folds, l2, popularity_weight)

    def rank_all(self, samples: Sequence[Sample], *, num_items: int = 20) -> list[list[int]]:
        """Catalog indices for every sample, best first, all different, none named in the conversation.

        Equal scores are ordered by popularity, then by catalog order. A list is shorter than `num_items` only where the
        catalog has no more items left. Raises ValueError for num_items < 1.
        """
        places: dict[int | None, list[int]] = {}
        for place, sample in enumerate(samples):
            places.setdefault(self._fold_of_id.get(sample.id), []).append(place)
        lists: list[list[int]] = [[] for _ in samples]
        for left_out, members in places.items():
            others = [part for fold, part in enumerate(self._folds) if fold != left_out]
            model = self._model if left_out is None else self._solve(others)
            for chunk in _chunks(members):
                named = [named_items(samples[place], self.catalog) for place in chunk]
                scores_SN = model.scores(named) + self._popularity_weight * model.popularity_N
                excluded = [excluded_items(samples[place], self.catalog) for place in chunk]
                best = best_items(scores_SN, excluded, popularity_order(model.popularity_N), num_items)
                for place, indices in zip(chunk, best, strict=True):
                    lists[place] = indices
        return lists

    def _solve(self, parts: Sequence[_Interactions]) -> _Ease:
        rows = [row for part in parts for row in part.rows]
        popularity_N = torch.stack([part.popularity_N for part in parts]).sum(0)
        return _Ease.solve(rows, popularity_N, self._l2)


@dataclass(frozen=True)
class _Interactions:
    """The dialogs of one fold."""

    ids: list[str]
    rows: list[list[int]]
    popularity_N: Tensor

    @classmethod
    def collect(cls, samples_of: Sequence[tuple[int, Sample]], catalog: Catalog) -> _Interactions:
        rows: dict[int, set[int]] = {}
        for dialog, sample in samples_of:
            row = rows.setdefault(dialog, set())
            row.update(named_items(sample, catalog), groundtruth_items(sample, catalog))
        samples = [sample for _, sample in samples_of]
        return cls([s.id for s in samples], [sorted(row) for row in rows.values()], popularity_counts(samples, catalog))


@dataclass(frozen=True)
class _Ease:
    """A solved model. Items that never occur have a zero row and column in B, so only the active ones are kept."""

    active_A: Tensor
    weight_AA: Tensor
    popularity_N: Tensor

    @classmethod
    def solve(cls, rows: Sequence[Sequence[int]], popularity_N: Tensor, l2: float) -> _Ease:
        active = sorted({item for row in rows for item in row})
        column = {item: place for place, item in enumerate(active)}
        # One dialog has a handful of items, so adding its few pairs beats a dense X'X by orders of magnitude.
        gram_AA = np.zeros((len(active), len(active)))
        for row in rows:
            columns = [column[item] for item in row]
            gram_AA[np.ix_(columns, columns)] += 1
        gram_AA[np.diag_indices(len(active))] += l2
        inverse_AA = torch.cholesky_inverse(torch.linalg.cholesky(torch.from_numpy(gram_AA)))
        weight_AA = (inverse_AA / -inverse_AA.diagonal()).float().fill_diagonal_(0.0)
        return cls(torch.tensor(active), weight_AA, popularity_N)

    def scores(self, named: Sequence[Sequence[int]]) -> Tensor:
        """x B for conversations given by their items, (S, N)."""
        column = {item: place for place, item in enumerate(self.active_A.tolist())}
        bags = [[column[item] for item in items if item in column] for items in named]
        starts = np.cumsum([0, *map(len, bags)])[:-1]
        flat = torch.tensor([place for bag in bags for place in bag], dtype=torch.long)
        scores_SN = torch.zeros(len(bags), len(self.popularity_N))
        scores_SN[:, self.active_A] = F.embedding_bag(flat, self.weight_AA, torch.from_numpy(starts), mode="sum")
        return scores_SN


def _chunks(values: Sequence) -> Iterable[Sequence]:
    return (values[start : start + SCORED_AT_ONCE] for start in range(0, len(values), SCORED_AT_ONCE))
