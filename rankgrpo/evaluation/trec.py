"""Lists and ground truth as TREC run and qrels files, which ranx, ir-measures and pytrec-eval read.

They give the Recall and NDCG of `rankgrpo.metrics` for every list: documents have scores that fall by rank, and what
may not count at its rank is a document that nobody judged. The TREC tools would move an item that a list repeats to its
last place, and leave out a list without lines, so a repeat gets a document of its own, and so does an empty list.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from rankgrpo.data.candidates import sample_catalog
from rankgrpo.data.samples import Sample
from rankgrpo.errors import DataError
from rankgrpo.evaluation.evaluate import Evaluation, gains_to_find, item_key
from rankgrpo.files.atomic import write_lines
from rankgrpo.items.catalog import Catalog


def write_trec(
    folder: Path,
    evaluation: Evaluation,
    samples: Sequence[Sample],
    catalog: Catalog,
    *,
    name: str,
    num_ranks: int,
    year_tolerance: int = 0,
) -> None:
    """Write `folder`/`name`.run from the lists of an evaluation, and `folder`/qrels from the ground truth.

    A document is `item` and the catalog index, or a name of its own where the catalog has no such item; a query is the
    sample's id, percent-encoded. Raises DataError for a gain that is no whole number, which qrels cannot hold.
    """
    run: list[str] = []
    qrels: list[str] = []
    for sample, row in zip(samples, evaluation.rows, strict=True):
        query, own = quote(sample.id, safe=""), sample_catalog(sample, catalog)
        gain_of = judged(sample, own, year_tolerance)
        qrels += [f"{query} 0 {document} {gain}" for document, gain in gain_of.items()]
        documents = ranked(row["items"][:num_ranks], own, gain_of, year_tolerance)
        scored = enumerate(documents or ["nothing"], start=1)
        run += [f"{query} Q0 {document} {rank} {num_ranks + 1 - rank} {name}" for rank, document in scored]
    write_lines(folder / "qrels", qrels)
    write_lines(folder / f"{name}.run", run)


def judged(sample: Sample, catalog: Catalog, year_tolerance: int) -> dict[str, int]:
    """Gain of every document that there is to find."""
    for (title, _), gain in zip(sample.groundtruth, sample.gains, strict=True):
        if gain != int(gain):
            raise DataError(
                f"sample {sample.id!r}: {title} has the gain {gain:g}, but qrels hold whole numbers; give its weight so"
            )
    gain_of = gains_to_find(sample, catalog, year_tolerance)
    absent = [key for key in gain_of if not isinstance(key, int)]
    return {
        f"item{key}" if isinstance(key, int) else f"absent{absent.index(key)}": int(gain)
        for key, gain in gain_of.items()
    }


def ranked(marks: Iterable[dict], catalog: Catalog, gain_of: dict[str, int], year_tolerance: int) -> list[str]:
    """The document of every rank, all different; one that is judged only where its rank was a hit."""
    documents: list[str] = []
    for rank, mark in enumerate(marks, start=1):
        document = f"rank{rank}"
        if mark["title"] is not None:
            key = item_key(mark["title"], mark["year"], catalog, year_tolerance)
            named = f"item{key}"
            if isinstance(key, int) and (mark["hit"] or named not in gain_of) and named not in documents:
                document = named
        documents.append(document)
    return documents
