"""The supervised warm start: next-token loss on the demonstrations' lists, through the forward of the RL update."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from rankgrpo.config import Config, DataConfig
from rankgrpo.data.order import BatchOrder
from rankgrpo.data.prompt import encode_prompts, open_prompt
from rankgrpo.data.samples import Dataset, Sample
from rankgrpo.errors import ConfigError
from rankgrpo.evaluation.validate import validate
from rankgrpo.model.constraint import hold_to_catalog
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import Policy, open_policy
from rankgrpo.runtime.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from rankgrpo.runtime.distributed import Parallel, make_sharding, sum_gradients, wait_for_all
from rankgrpo.runtime.means import Means
from rankgrpo.runtime.optim import check_finite, learning_rate, make_optimizer, optimizer_step
from rankgrpo.runtime.tracker import MetricsLog
from rankgrpo.runtime.trackers import Tracker
from rankgrpo.sampler.choose import ready_sampler
from rankgrpo.sampler.verify import verify_policy


def train_sft(
    config: Config,
    dataset: Dataset,
    demonstrations: dict[str, list[Sample]],
    start: str | Path,
    out: Path,
    parallel: Parallel,
    tracker: Tracker | None = None,
) -> Path:
    """Train `start` on demonstrations["train"] and return `out/final`, a Hugging Face folder.

    demonstrations["validation"] gives loss/val_nll. Resumes from the newest checkpoint under `out`; returns at once
    when `out/final` exists.
    """
    final = out / "final"
    if final.is_dir():
        return final
    sft = config.sft
    sharding = make_sharding(config.parallel, parallel)
    policy = open_policy(
        start, config.model, parallel.device, sharding=sharding, adapter=config.adapter, seed=config.seed
    )
    # Lists are sampled so, and may be trained so.
    held = verify_policy(hold_to_catalog(policy, config, dataset.catalog), config)
    policy = held if sft.constrain == "catalog" else replace(held, constraint=None)
    optimizer = make_optimizer(policy.model, lr=sft.lr, betas=sft.betas, weight_decay=sft.weight_decay)
    train_groups, val_groups = (
        demonstration_groups(policy.tokenizer, demonstrations[split], config.data) for split in ("train", "validation")
    )
    for split, groups in (("train", train_groups), ("validation", val_groups)):
        check_allowed(policy, groups, demonstrations[split])
    order = BatchOrder(len(train_groups), sft.batch_size, config.seed, parallel.dp_rank, parallel.dp_world)

    done = 0
    if (checkpoint := latest_checkpoint(out / "checkpoints", parallel)) is not None:
        done = load_checkpoint(checkpoint, policy.model, optimizer)["step"]
    log = (
        MetricsLog(out / "metrics.jsonl", resume_step=done, num_steps=sft.num_steps, title="SFT", tracker=tracker)
        if parallel.is_main
        else None
    )

    for step in range(done, sft.num_steps):
        began = time.perf_counter()
        where = f"SFT step {step + 1}"
        global_groups = [train_groups[i] for i in order.global_indices(step)]
        num_tokens = sum(len(group.completion_ids[0]) for group in global_groups)
        nll = backward_nll(policy, [train_groups[i] for i in order.indices(step)], num_tokens, sft.token_budget)
        sum_gradients(policy.model, parallel)
        means = Means()
        means.add_sum("loss/nll", nll)
        metrics = means.reduce(parallel)
        check_finite(metrics["loss/nll"], where, "the loss")
        lr = learning_rate(
            step, num_steps=sft.num_steps, peak=sft.lr, schedule=sft.schedule, warmup_frac=sft.warmup_frac
        )
        norm = optimizer_step(optimizer, policy.model.parameters(), lr=lr, grad_clip=sft.grad_clip, where=where)
        metrics |= {
            "grad/norm": norm,
            "lr": lr,
            "tokens/trained": num_tokens,
            "time/update_s": time.perf_counter() - began,
        }
        num_done = step + 1
        if num_done % sft.eval_every == 0 or num_done == sft.num_steps:
            metrics |= validation_nll(policy, val_groups[: sft.eval_samples], sft.token_budget)
            with ready_sampler(held, config, parallel) as sampler:
                samples = dataset.validation[: sft.eval_samples]
                metrics |= validate(held, sampler, samples, dataset.catalog, config, parallel)
        metrics["time/total_s"] = time.perf_counter() - began
        if log is not None:
            log.write(num_done, metrics)
        if num_done % sft.save_every == 0 and num_done < sft.num_steps:
            save_checkpoint(out / "checkpoints", num_done, policy.model, optimizer, {}, sft.keep_last, parallel)
    if log is not None:
        log.close()
    policy.export(final, parallel)
    wait_for_all(parallel)
    return final


def demonstration_groups(tokenizer, samples: list[Sample], data: DataConfig) -> list[Group]:
    """One group of one list for every sample: its prompt, and its completion closed by the end-of-sequence id."""
    missing = [sample.id for sample in samples if not sample.completion]
    if missing:
        raise ValueError(f"{len(missing)} demonstrations have no completion, the first is {missing[0]!r}")
    prompts = encode_prompts(tokenizer, samples, data.max_prompt_tokens, data.num_ranks, prompt=open_prompt(data))
    completions = tokenizer([sample.completion for sample in samples], add_special_tokens=False)["input_ids"]
    return [Group(p, [[*c, tokenizer.eos_token_id]]) for p, c in zip(prompts, completions, strict=True)]


def check_allowed(policy: Policy, groups: list[Group], samples: list[Sample]) -> None:
    """Raise ConfigError naming the first demonstration that a policy held to the catalog cannot write."""
    if policy.constraint is None:
        return
    for group, sample in zip(groups, samples, strict=True):
        try:
            policy.constraint.choices([group])
        except ValueError as error:
            raise ConfigError(
                f"sft.constrain = catalog: the demonstration of sample {sample.id!r} is no list of "
                f"{policy.constraint.num_ranks} different catalog lines ({error}); set sft.constrain=none"
            ) from error


def backward_nll(policy: Policy, groups: list[Group], num_tokens: int, token_budget: int) -> float:
    """Accumulate the gradient of sum(-logp) / num_tokens over micro-batches; returns this process's loss."""
    total = torch.zeros((), device=policy.device)
    for chosen in policy.paced(policy.micro_batches(groups, token_budget)):
        pack, logp_BT = policy.logprobs([groups[i] for i in chosen])
        loss = -torch.where(pack.mask_BT, logp_BT, 0.0).sum() / num_tokens
        loss.backward()
        total += loss.detach()
    return float(total)


@torch.no_grad()
def validation_nll(policy: Policy, groups: list[Group], token_budget: int) -> dict[str, float]:
    """Mean negative log-probability of a demonstration's token."""
    total, count = 0.0, 0
    for chosen in policy.micro_batches(groups, token_budget):
        pack, logp_BT = policy.logprobs([groups[i] for i in chosen])
        total -= float(torch.where(pack.mask_BT, logp_BT, 0.0).sum())
        count += int(pack.mask_BT.sum())
    return {"loss/val_nll": total / count} if count else {}
