"""Recommender metrics of a policy during training."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from rankgrpo.config import Config
from rankgrpo.data.samples import Sample
from rankgrpo.evaluation.evaluate import score_completions
from rankgrpo.evaluation.lists import recommend_lists
from rankgrpo.items.catalog import Catalog
from rankgrpo.model.policy import Policy
from rankgrpo.runtime.distributed import Parallel
from rankgrpo.runtime.means import Means
from rankgrpo.sampler.base import Sampler
from rankgrpo.sampler.choose import hf_sampler


def validate(
    policy: Policy,
    sampler: Sampler,
    samples: list[Sample],
    catalog: Catalog,
    config: Config,
    parallel: Parallel,
    *,
    title: str | None = None,
) -> dict[str, float]:
    """Means of the recommender metrics over `samples`, shared among the processes, as eval/* keys.

    title: of a progress bar, which only the main process shows.

    eval/se_ndcg@K is the standard error of eval/ndcg@K over samples, sqrt(variance / number of samples).
    """
    began = time.perf_counter()
    mine = samples[parallel.dp_rank :: parallel.dp_world]
    means = Means()
    evaluation = score_completions(
        mine,
        recommend_lists(policy, sampler, mine, catalog, config, title=title if parallel.is_main else None),
        catalog,
        num_ranks=config.data.num_ranks,
        year_tolerance=config.rl.year_tolerance,
        cutoffs=config.eval.ranks,
    )
    for name, values in evaluation.metrics.items():
        means.add(f"eval/{name}", float(values.sum()), len(values))
    for rank, hits in enumerate(evaluation.hits.sum(0).tolist()):
        means.add(f"eval/hit_rank_{rank:02d}", hits, len(mine))
    ndcg = f"ndcg@{config.data.num_ranks}"
    means.add("square", float((evaluation.metrics[ndcg] ** 2).sum()), len(mine))
    metrics = means.reduce(parallel)
    variance = metrics.pop("square") - metrics[f"eval/{ndcg}"] ** 2
    metrics[f"eval/se_{ndcg}"] = math.sqrt(max(variance, 0.0) / len(samples))
    if config.eval.free_samples and policy.constraint is not None:
        metrics |= validate_freely(policy, samples[: config.eval.free_samples], catalog, config, parallel)
    return metrics | {"time/eval_s": time.perf_counter() - began}


def validate_freely(
    policy: Policy, samples: list[Sample], catalog: Catalog, config: Config, parallel: Parallel
) -> dict[str, float]:
    """What a policy that is held to the catalog writes when it is not: eval_free/*, means over `samples`.

    The lists are sampled with transformers: an engine that is held to the catalog stays so.
    """
    free = replace(policy, constraint=None)
    mine = samples[parallel.dp_rank :: parallel.dp_world]
    lists = recommend_lists(free, hf_sampler(free, config.rl.sampler_rows), mine, catalog, config)
    evaluation = score_completions(
        mine,
        lists,
        catalog,
        num_ranks=config.data.num_ranks,
        year_tolerance=config.rl.year_tolerance,
        cutoffs=config.eval.ranks,
    )
    means = Means()
    for name, values in evaluation.metrics.items():
        means.add(f"eval_free/{name}", float(values.sum()), len(values))
    return means.reduce(parallel)
