"""Stage 1 of ConvRec-R1, `rankgrpo distill`: teacher lists -> remap -> reflect -> adjust -> demonstrations.

One folder holds what each stage made:

  teacher.jsonl             the teacher's list of every conversation
  metadata.jsonl            a text about every item that can be listed
  embeddings.safetensors    unit rows of these texts and of the conversations
  remap.jsonl               the best items by s_remap (Eq. 10)
  ratings.jsonl             the judge's ratings of these (Eq. 11)
  adjust.safetensors        w and b of every fold (Eq. 12 and 13)
  demonstrations-*.jsonl    what `rankgrpo run --demonstrations FOLDER` trains on
  scores.json               Recall and NDCG after each stage
  calls-*.jsonl             every answer of a model, kept for good

A file is made again only when its inputs or settings change. Every list leaves out what its conversation named.

No training conversation sees its own ground truth: EASE lists it, and w and b adjust it, fitted without the fold that
its dialog is in. (w and b of the other folds are fitted to lists of EASE models that did know that dialog, as in any
stacked model; what it may tell is a trace.) Validation conversations get the models of all folds.
"""

# Shape letters: F folds, N catalog items, U items that lists can name, S samples, D embedding dimensions, B a block.

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankgrpo.baselines.ease import EaseTeacher
from rankgrpo.data.load import load_dataset
from rankgrpo.data.samples import Dataset, Sample, write_samples
from rankgrpo.distill.adjust import Candidates, candidate_likelihood, catalog_likelihood, fit_bias
from rankgrpo.distill.cache import StageFiles, pack_rows, unpack_rows
from rankgrpo.distill.corpus import Corpus, make_corpus, rank_with_ease
from rankgrpo.distill.embed import Tfidf, encode_at_endpoint, encode_with_transformer
from rankgrpo.distill.lists import TeacherLists, ask_lists, estimate_lists, lists_of_rows
from rankgrpo.distill.llm import CallReport, Estimate, ReplyLog
from rankgrpo.distill.metadata import ask_metadata, catalog_text, estimate_metadata, item_name
from rankgrpo.distill.reflect import Judge, ReflectScores
from rankgrpo.distill.remap import HeldScores, RemapScores, Scores, SelectedScores, rank_samples
from rankgrpo.distill.settings import EASE, STELLA, DistillConfig, content_key, is_address
from rankgrpo.evaluation.evaluate import score_completions, summarise
from rankgrpo.evaluation.tables import format_table, format_value, metric_label
from rankgrpo.files.atomic import only_one, write_lines
from rankgrpo.items.catalog import Item
from rankgrpo.items.format import ItemFormat
from rankgrpo.items.match import open_matcher
from rankgrpo.runtime.distributed import device_here

HELD_BYTES = 2 << 30
"""Scores of the training conversations up to this size are kept in memory while w and b are fitted."""


def distill(config: DistillConfig) -> Path:
    """Make or continue the demonstrations of `config.out`; returns the folder."""
    item_format = ItemFormat(config.item)
    dataset = load_dataset(config.data, num_train=config.num_train or None, seed=config.seed, item_format=item_format)
    ease = fit_ease(config, dataset)
    corpus = make_corpus(config, dataset, ease)
    out = config.out or Path("runs") / f"distill-{Path(config.data).resolve().name}"
    with only_one(out):
        run = DistillRun(config, corpus, StageFiles(out))
        if config.has_model or run.judge is not None or config.estimate:
            say(run.estimate().describe(config.price_in, config.price_out))
        if config.estimate:
            return out
        say(f"{corpus.num_train} training and {corpus.num_validation} validation conversations, output {out}")
        run.teach(ease)
        run.adjust(run.reflect(run.remap()))
        print(run.write())
    return out


class DistillRun:
    """The stages of one run, in order; each leaves its file, and the scores of its lists in the table."""

    def __init__(self, config: DistillConfig, corpus: Corpus, files: StageFiles) -> None:
        self.config, self.corpus, self.files = config, corpus, files
        self.key = corpus.key()
        """What the newest stage was made from."""
        self.teacher_log = ReplyLog(files.folder / "calls-teacher.jsonl")
        self.metadata_log = ReplyLog(files.folder / "calls-metadata.jsonl")
        self.judge_log = ReplyLog(files.folder / "calls-judge.jsonl")
        self.judge = config.judge_endpoint() if config.reflect else None
        self.table: dict[str, list[dict[str, Any]]] = {"validation": [], "train": []}

    def estimate(self) -> Estimate:
        """What all calls would cost; titles that the catalog lacks are not known yet, nor the candidates."""
        config, corpus = self.config, self.corpus
        total = Estimate(0, 0, 0)
        if config.has_model:
            total += estimate_lists(
                corpus.samples, config.listed, config.teacher_endpoint(), self.teacher_log, config.prompt
            )
        if config.asks_metadata and config.remap:
            total += estimate_metadata(
                corpus.catalog.items, config.teacher_endpoint(), self.metadata_log, config.prompt
            )
        if self.judge is not None:
            some = range(min(config.num_judged, len(corpus.catalog)))
            judge = Judge(corpus.samples, [some] * len(corpus.samples), corpus.catalog, self.judge, config.prompt)
            ratings = judge.estimate(self.judge_log)
            total += ratings.share(1 - min(len(self.judge_log.replies) / max(ratings.num_calls, 1), 1))
        return total

    # ------------------------------------------------------------------------------------------------------- teacher

    def teach(self, ease: EaseTeacher | None) -> None:
        """The teacher's lists; samples without one take no further part."""
        config, corpus = self.config, self.corpus
        asked = [config.teacher, config.model, config.extra, config.temperature] if config.has_model else [EASE]
        asked += [word for word in (config.item_noun, config.item_nouns) if word]
        self.key = content_key("teacher", self.key, asked, config.listed, config.num_folds, config.seed)

        def make() -> tuple[list[dict[str, Any]], bool]:
            if not config.has_model:
                assert ease is not None
                lists = TeacherLists(corpus.catalog.items, list(rank_with_ease(corpus, ease, config.listed)))
                return self._teacher_rows(lists), True
            lists, report = ask_lists(
                corpus.samples,
                corpus.catalog,
                open_matcher(corpus.catalog).match_line,
                config.listed,
                config.teacher_endpoint(),
                self.teacher_log,
                config.prompt,
            )
            say(f"teacher: {report}")
            return self._teacher_rows(lists), not report.failed

        rows = self.files.rows("teacher.jsonl", self.key, make)
        self.key = content_key(self.key, rows)  # lists that came late make everything after them anew
        self.taught = lists_of_rows(rows, corpus.catalog)
        self.answered = [place for place, items in enumerate(self.taught.lists) if items]
        if not self.answered:
            raise ValueError("the teacher listed nothing for any conversation, so there is nothing to learn from")
        if missing := len(corpus.samples) - len(self.answered):
            say(f"{missing} of {len(corpus.samples)} samples have no teacher list and are left out")
        self.texts = {place: self.taught.text(place, config.num_items) for place in self.answered}
        self._score("teacher")

    def _teacher_rows(self, lists: TeacherLists) -> list[dict[str, Any]]:
        return [_list_row(self.corpus, place, lists.items, listed) for place, listed in enumerate(lists.lists)]

    # --------------------------------------------------------------------------------------------------------- remap

    def remap(self) -> Scores:
        """s_remap; with the stage off p I_ic, the teacher's list without what the catalog lacks."""
        config, corpus = self.config, self.corpus
        lists = [items or () for items in self.taught.lists]
        scores = RemapScores(lists, len(corpus.catalog))
        if config.remap:
            item_UD, context_SD = self._embed(self._metadata())
            scores = RemapScores(lists, len(corpus.catalog), item_UD, context_SD, *config.weights)
        self.key = content_key("remap", self.key, config.remap, config.weights)
        if config.remap or self.judge is not None or config.adjust:
            num_items = max(config.num_judged if self.judge is not None else 0, self._num_ranked)
            self._rank("remap", scores, num_items, shown=config.remap)
        return scores

    @property
    def _num_ranked(self) -> int:
        """Items of a stage's lists: those of a demonstration, and those that w and b are fitted among."""
        return max(self.config.num_items, self.config.candidates if self.config.adjust else 0)

    def _metadata(self) -> list[str]:
        config, items = self.config, self.taught.items
        names = [[item.title, item.year] for item in items[len(self.corpus.catalog) :]]
        asked = [config.teacher, config.model, config.extra, config.temperature] if config.asks_metadata else "catalog"
        self.key = content_key("metadata", self.key, asked, names)

        def make() -> tuple[list[dict[str, Any]], bool]:
            if config.asks_metadata:
                texts, report = ask_metadata(items, config.teacher_endpoint(), self.metadata_log, config.prompt)
                say(f"metadata: {report}")
            else:
                texts, report = [catalog_text(item) for item in items], CallReport()
            rows = [{"title": i.title, "year": i.year, "text": t} for i, t in zip(items, texts, strict=True)]
            return rows, not report.failed

        return [row["text"] for row in self.files.rows("metadata.jsonl", self.key, make)]

    def _embed(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit rows of the items' texts (U, D) and of the conversations (S, D)."""
        config, corpus = self.config, self.corpus
        self.key = content_key("embed", self.key, config.encoder, config.encoder_model, config.mentions, list(texts))

        def make() -> dict[str, Tensor]:
            mentioned = [[texts[index] for index in named] if config.mentions else [] for named in corpus.named]
            contexts = [_context(sample, m) for sample, m in zip(corpus.samples, mentioned, strict=True)]
            item_UD, context_SD = encode(config, texts, contexts, num_catalog=len(corpus.catalog))
            return pack_rows("items", item_UD) | pack_rows("contexts", context_SD)

        tensors = self.files.tensors("embeddings.safetensors", self.key, make)
        return unpack_rows("items", tensors), unpack_rows("contexts", tensors)

    # ------------------------------------------------------------------------------------------------------- reflect

    def reflect(self, scores: Scores) -> Scores:
        """s_reflect; without a judge the scores as they are."""
        config, corpus = self.config, self.corpus
        if self.judge is None:
            if config.reflect:
                say("reflect: off, for want of a judge (--judge ADDRESS --judge-model NAME)")
            return scores
        candidates = {place: self.ranked[place][: config.num_judged] for place in self.answered}
        self.key = content_key("reflect", self.key, self.judge, config.gamma)
        places = self.answered

        def make() -> tuple[list[dict[str, Any]], bool]:
            asked = [corpus.samples[p] for p in places]
            judge = Judge(asked, [candidates[p] for p in places], corpus.catalog, self.judge, config.prompt)
            ratings, report = judge.rate(self.judge_log)
            say(f"reflect: {report}")
            num_rated, num_asked = sum(map(len, ratings)), sum(len(candidates[p]) for p in places)
            say(f"reflect: {num_rated} of {num_asked} candidates rated")
            rows = [_rating_row(corpus, place, rated) for place, rated in zip(places, ratings, strict=True)]
            return rows, not report.failed

        rows = self.files.rows("ratings.jsonl", self.key, make)
        self.key = content_key(self.key, rows)
        ratings: list[dict[int, int]] = [{} for _ in corpus.samples]
        for place, row in zip(places, rows, strict=True):
            ratings[place] = {_index(corpus, title, year): rating for title, year, rating in row["ratings"]}
        reflected = ReflectScores(scores, ratings, config.gamma)
        self._rank("reflect", reflected, self._num_ranked)
        return reflected

    # -------------------------------------------------------------------------------------------------------- adjust

    def adjust(self, scores: Scores) -> None:
        """s_final: w and b of each fold, and of all folds for validation."""
        config, corpus = self.config, self.corpus
        if not config.adjust:
            return
        candidates = None
        if config.candidates:
            candidates = {place: items[: config.candidates] for place, items in self.ranked.items()}
        self.key = content_key(
            "adjust", self.key, config.penalties, config.logit_scale, config.candidates, config.num_folds
        )
        fitted = self.files.tensors("adjust.safetensors", self.key, lambda: self._fit(scores, candidates))
        weight_FN, bias_FN = config.logit_scale * fitted["weight"], fitted["bias"]

        def apply(scores_BN: Tensor, block: Sequence[int]) -> Tensor:
            folds_B = [corpus.fold_of[place] for place in block]  # -1 is the last row: all folds
            scores_BN = scores_BN.mul_(weight_FN[folds_B]).add_(bias_FN[folds_B])
            if candidates is None:
                return scores_BN
            only_BN = torch.full_like(scores_BN, -torch.inf)
            for row, place in enumerate(block):
                only_BN[row, candidates[place]] = scores_BN[row, candidates[place]]
            return only_BN

        self._rank("adjust", scores, config.num_items, adjust=apply)

    def _fit(self, scores: Scores, candidates: Mapping[int, list[int]] | None) -> dict[str, Tensor]:
        config, corpus = self.config, self.corpus
        l2_weight, l2_bias = config.penalties
        places = [place for place in self.answered if place in corpus.places("train")]
        groundtruth, rows = [corpus.groundtruth[place] for place in places], range(len(places))
        if candidates is not None:
            few = Candidates.gather(scores, groundtruth, places, [candidates[place] for place in places])
        else:
            scores = SelectedScores(scores, places)
            if 4 * scores.num_samples * scores.num_items <= HELD_BYTES:
                scores = HeldScores.hold(scores)
        biases = []
        for fold in [*range(config.num_folds), -1]:
            others = [row for row in rows if fold < 0 or corpus.fold_of[places[row]] != fold]
            if candidates is not None:
                likelihood = candidate_likelihood(few, others, scale=config.logit_scale)
            else:
                likelihood = catalog_likelihood(scores, groundtruth, others, scale=config.logit_scale)
            title = f"adjust {len(biases) + 1}/{config.num_folds + 1}"
            biases.append(fit_bias(likelihood, scores.num_items, l2_weight=l2_weight, l2_bias=l2_bias, title=title))
        return {
            "weight": torch.stack([bias.weight_N for bias in biases]),
            "bias": torch.stack([bias.bias_N for bias in biases]),
        }

    # ------------------------------------------------------------------------------------------- lists and their scores

    def _rank(
        self,
        stage: str,
        scores: Scores,
        num_items: int,
        *,
        adjust: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
        shown: bool = True,
    ) -> None:
        """Rank every answered sample; lists that are `shown` are scored, and become the demonstrations so far."""
        corpus = self.corpus
        self.key = content_key("rank", self.key, num_items)

        def make() -> tuple[list[dict[str, Any]], bool]:
            lists = rank_samples(
                scores, self.answered, corpus.named, corpus.order_N, num_items, adjust=adjust, title=stage
            )
            items = corpus.catalog.items
            return [_list_row(corpus, p, items, found) for p, found in zip(self.answered, lists, strict=True)], True

        rows = self.files.rows(f"{stage}.jsonl", self.key, make)
        self.ranked = {
            place: [_index(corpus, title, year) for title, year in row["items"]]
            for place, row in zip(self.answered, rows, strict=True)
        }
        if not shown:
            return
        names = [item_name(item) for item in corpus.catalog]
        self.texts = {
            place: "\n".join(names[index] for index in items[: self.config.num_items])
            for place, items in self.ranked.items()
        }
        self._score(stage)

    def _score(self, stage: str) -> None:
        corpus = self.corpus
        for split, summaries in self.table.items():
            places = [place for place in corpus.places(split) if place in self.texts]
            if not places:
                continue
            samples = [corpus.samples[place] for place in places]
            texts = [self.texts[place] for place in places]
            evaluation = score_completions(samples, texts, corpus.catalog, num_ranks=self.config.num_items)
            names = (f"recall@{self.config.num_items}", f"ndcg@{self.config.num_items}", "in_catalog_frac")
            metrics = {name: evaluation.metrics[name] for name in names}
            summaries.append(summarise(replace(evaluation, metrics=metrics), name=stage, split=split))
            means = (f"{metric_label(name)} {format_value(name, float(metrics[name].mean()))}" for name in names[:2])
            say(f"{stage}: {', '.join(means)} on {split}")

    def write(self) -> str:
        """The demonstrations and the table by stage."""
        corpus, folder = self.corpus, self.files.folder
        for split, places in {"train": corpus.trained, "validation": corpus.places("validation")}.items():
            chosen = [place for place in places if place in self.texts]
            made = [replace(corpus.samples[place], completion=self.texts[place]) for place in chosen]
            write_samples(folder / f"demonstrations-{split}.jsonl", made)
        write_lines(folder / "scores.json", [json.dumps(self.table, indent=1)])
        return "\n\n".join(format_table(summaries) for summaries in self.table.values() if summaries)


def encode(
    config: DistillConfig, texts: Sequence[str], contexts: Sequence[str], *, num_catalog: int
) -> tuple[Tensor, Tensor]:
    """Unit rows of both by the encoder of the settings; TF-IDF learns its weights from the catalog's texts."""
    if config.encoder == "tfidf":
        model = Tfidf.fit(texts[:num_catalog])
        return model.encode(texts), model.encode(contexts)
    everything = [*texts, *contexts]
    if is_address(config.encoder):
        rows_ND = encode_at_endpoint(config.encoder, config.encoder_model, everything)
    else:
        name = STELLA if config.encoder == "stella" else config.encoder
        rows_ND = encode_with_transformer(name, everything, device_here())
    return rows_ND[: len(texts)], rows_ND[len(texts) :]


def say(text: str) -> None:
    print(f"> {text}", flush=True)


def fit_ease(config: DistillConfig, dataset: Dataset) -> EaseTeacher | None:
    """EASE where it is the teacher or makes short requests."""
    if config.has_model and not config.short_requests:
        return None
    return EaseTeacher.fit(dataset.train, dataset.catalog, num_folds=config.num_folds, seed=config.seed)


# ------------------------------------------------------------------------------------------------------- rows of files


def _list_row(corpus: Corpus, place: int, items: Sequence[Item], listed: Sequence[int] | None) -> dict[str, Any]:
    names = None if listed is None else [[items[index].title, items[index].year] for index in listed]
    return {"id": corpus.samples[place].id, "items": names}


def _rating_row(corpus: Corpus, place: int, ratings: Mapping[int, int]) -> dict[str, Any]:
    items = corpus.catalog.items
    rated = [[items[index].title, items[index].year, rating] for index, rating in ratings.items()]
    return {"id": corpus.samples[place].id, "ratings": rated}


def _index(corpus: Corpus, title: str, year: int | None) -> int:
    index = corpus.catalog.lookup(title, year)
    assert index is not None, (title, year)  # written by a stage from the same catalog: the key says so
    return index


def _context(sample: Sample, mentioned: Sequence[str]) -> str:
    """What is embedded of a conversation: what was said, and the texts about the items it names."""
    return "\n".join([*(turn.content for turn in sample.conversation), *mentioned])
