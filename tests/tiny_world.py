"""A world small enough to train on in a second: used by the tests of the loops."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from rankgrpo import train as training
from rankgrpo.baselines.ease import EaseTeacher
from rankgrpo.config import Config, RlConfig
from rankgrpo.config_file import load_config
from rankgrpo.data.demo import make_demo
from rankgrpo.data.samples import Dataset, Sample
from rankgrpo.distill.demonstrations import make_demonstrations
from rankgrpo.items.catalog import Catalog
from rankgrpo.parse import RankSegmenter
from rankgrpo.rollouts.score import Scorer
from rankgrpo.runtime.distributed import Parallel
from rankgrpo.sampler.base import Rollout

ALONE = Parallel(0, 1, torch.device("cpu"))

# As words of the command line, so that the tests of whole processes use the same run.
WORDS = [
    "data.num_train=48",
    "data.num_ranks=5",
    "model.hidden=32",
    "model.layers=2",
    "model.ffn=64",
    "model.heads=2",
    "model.kv_heads=1",
    "model.vocab=1024",
    "sft.num_steps=6",
    "sft.batch_size=8",
    "sft.lr=1e-2",
    "sft.eval_every=3",
    "sft.eval_samples=4",
    "sft.save_every=2",
    "rl.num_steps=6",
    "rl.prompts_per_step=4",
    "rl.group_size=3",
    "rl.lr=1e-3",
    "rl.max_new_tokens=24",
    "rl.eval_every=3",
    "rl.eval_samples=4",
    "rl.save_every=2",
    "eval.num_samples=8",
    "teacher.num_folds=2",
]


def tiny_config(*words: str) -> Config:
    return load_config(None, [*WORDS, *words])


@cache
def tiny_dataset() -> Dataset:
    return make_demo(num_train=48, num_validation=8, num_test=8, seed=0)


@cache
def tiny_demonstrations() -> dict[str, list[Sample]]:
    dataset = tiny_dataset()
    teacher = EaseTeacher.fit(dataset.train, dataset.catalog, num_folds=2)
    return {split: make_demonstrations(dataset.split(split), teacher, num_items=5) for split in ("train", "validation")}


def taught_dataset() -> Dataset:
    return replace(tiny_dataset(), train=tiny_demonstrations()["train"])


# A token a byte, so that what a text says and what its tokens say is the same.
BYTES = RankSegmenter.from_token_bytes([bytes([byte]) for byte in range(256)])
END, BLANK = 256, 257


def byte_rollout(text: str, finished: bool = True, logp: float = -0.5) -> Rollout:
    """A list as a sampler would return it; one without text or end has a token that means nothing."""
    ids = [*text.encode(), *([END] if finished else [])] or [BLANK]
    return Rollout(ids, [logp] * len(ids), text, finished)


def byte_scorer(catalog: Catalog, rl: RlConfig, num_ranks: int) -> Scorer:
    return Scorer.open(catalog, rl, num_ranks, BYTES, [END])


def keep_ends_of_lists(monkeypatch) -> None:
    """Let `train` pass what it leaves out: the tokens after a list's last one with a gradient."""
    plain = training.make_micro_batches

    def make(groups, rollouts, units, chosen, rl, *args, **options):
        return plain(groups, rollouts, units, chosen, replace(rl, kl_coef=1.0), *args, **options)

    monkeypatch.setattr(training, "make_micro_batches", make)
