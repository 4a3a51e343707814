"""Rank-GRPO (arXiv 2510.20150) in one file and one process: `python experiments/minimal.py`, two minutes on two cores.

`train_step` is the method, with its equations. `main` makes the demo's conversations and a tiny model, teaches it some
of EASE's lists so that there is something to reward, and prints the reward of every step. Left out is what
`rankgrpo.train` adds: the KL to a reference, validation, checkpoints and resume, several processes and GPUs,
micro-batches, other methods, vLLM. A step of either moves the weights alike, bit for bit (tests/test_minimal.py).
"""

# Shape letters: P prompts, G lists a prompt, B = P*G, T tokens, K ranks, U units; M tokens of all lists, D hidden.
from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rankgrpo.advantage import group_advantage
from rankgrpo.baselines.ease import EaseTeacher
from rankgrpo.config import DataConfig, ModelConfig
from rankgrpo.data.demo import make_demo
from rankgrpo.data.order import BatchOrder
from rankgrpo.data.prompt import encode_prompts
from rankgrpo.data.samples import Dataset, Sample
from rankgrpo.distill.demonstrations import make_demonstrations
from rankgrpo.logprob import token_logprobs
from rankgrpo.loss import rank_grpo_loss
from rankgrpo.model.packing import Group, Pack, build_pack
from rankgrpo.model.policy import Policy, open_policy
from rankgrpo.model.presets import make_init
from rankgrpo.model.tiny import TinyConfig
from rankgrpo.parse import RankSegmenter, parse_list
from rankgrpo.reward import ReturnKind, rank_returns, relevance
from rankgrpo.sampler.base import prompt_seed
from rankgrpo.sampler.choose import hf_sampler
from rankgrpo.sft import demonstration_groups
from rankgrpo.units import make_units

DATA = DataConfig(max_prompt_tokens=256)


def train_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    samples: Sequence[Sample],
    seeds: list[int],
    *,
    group_size: int = 8,
    num_ranks: int = 20,
    max_new_tokens: int = 80,
    returns: ReturnKind = "exp_inf",
    updates: int = 1,
) -> float:
    """Sample lists for every prompt and step towards those ranks that earned more than their group's; returns the mean
    reward of a list, summed over its ranks."""
    P, G, K = len(samples), group_size, num_ranks
    sampler, segmenter = hf_sampler(policy), RankSegmenter(policy.tokenizer)
    prompts = encode_prompts(policy.tokenizer, samples, DATA.max_prompt_tokens, K)
    # y_1..y_G ~ pi_old(. | x): the policy as it is now.
    groups = sampler.sample(prompts, group_size=G, seeds=seeds, max_new_tokens=max_new_tokens)

    def rel(sample: Sample, text: str) -> Tensor:  # rel_k: 1 where item k is in the ground truth and at no earlier rank
        wanted, seen = sample.groundtruth, sample.seen_titles
        return relevance(parse_list(text), wanted, catalog=dataset.catalog, seen=seen, num_ranks=K)

    relevance_BK = torch.stack([rel(x, y.text) for x, lists in zip(samples, groups, strict=True) for y in lists])
    reward_BK = rank_returns(relevance_BK, kind=returns)  # r(x, y^(k)): Eq. 8 (log), Eq. 9 (exp_inf)
    advantage_PGK = group_advantage(reward_BK.view(P, G, K))  # A_{i,k}, among the G lists at one rank: Eq. 7

    pack = build_pack([Group(x, [y.token_ids for y in lists]) for x, lists in zip(prompts, groups, strict=True)])
    rank_BT = segmenter(pack.token_ids_BT, pack.mask_BT)  # the k of a token of y^(k), by the lines parse_list reads
    eos_BT = torch.isin(pack.token_ids_BT, torch.tensor(sampler.eos_ids)) & pack.mask_BT
    # U units: the K ranks, then what is penalised with -0.1 (section 2.3.3): items past K, the end of a short list.
    units = make_units(rank_BT, eos_BT, advantage_PGK.flatten(0, 1), num_ranks=K)
    unit_BT, advantage_BU = units.unit_BT, units.advantage_BU

    for update in range(updates):  # mu in the paper
        logp_BT = list_logprobs(policy, pack)  # log pi(y_{i,t} | x, y_{i,<t})
        if update == 0:
            old_logp_BT = logp_BT.detach()  # the policy is still the one that sampled, and every ratio is 1
        # -J of Eq. 6: w_{i,k} is the geometric mean over item k's tokens, 1/(G K) the mean over lists and ranks.
        loss, _ = rank_grpo_loss(
            logp_BT, old_logp_BT, unit_BT, advantage_BU, clip_low=0.06, clip_high=0.08, denominator=P * G * K
        )
        descend(loss, policy, optimizer)
    return float(reward_BK.sum(1).mean())


def list_logprobs(policy: Policy, pack: Pack) -> Tensor:
    """Log-probs of the lists' tokens, (B, T), 0 past a list's end; the model reads a prompt once for all its lists."""
    body, head = policy.model.base_model, policy.model.get_output_embeddings()
    output = body(pack.input_ids_1N, position_ids=pack.position_ids_1N, shared_prefix=pack.layout, use_cache=False)
    hidden_MD = output.last_hidden_state[0].index_select(0, pack.source_row_M)
    logp_M = token_logprobs(hidden_MD, head.weight, pack.target_ids_M, allowed_V=policy.allowed_V)
    return torch.zeros(pack.mask_BT.shape).masked_scatter(pack.mask_BT, logp_M)


def descend(loss: Tensor, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def main(argv: Sequence[str] | None = None) -> None:
    example = "example: python experiments/minimal.py --steps 60 --returns log --updates 2"
    parser = argparse.ArgumentParser(description="Rank-GRPO on the demo, from nothing, on a CPU.", epilog=example)
    parser.add_argument("--steps", type=int, default=24, help="of reinforcement learning (%(default)s)")
    parser.add_argument("--warm-steps", type=int, default=120, help="of the warm start (%(default)s)")
    parser.add_argument("--conversations", type=int, default=1500, help="that the demo makes (%(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="a step, with 8 lists each (%(default)s)")
    parser.add_argument("--updates", type=int, default=1, help="on the lists of a step, mu in the paper (%(default)s)")
    parser.add_argument("--returns", choices=("exp_inf", "log"), default="exp_inf", help="of a rank (%(default)s)")
    parser.add_argument("--lr", type=float, default=1.5e-4, help="at first, falling to 0 (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data, model and lists (%(default)s)")
    args = parser.parse_args(argv)
    dataset = make_demo(args.conversations, 0, 0, seed=args.seed)
    demonstrations = make_demonstrations(dataset.train, EaseTeacher.fit(dataset.train, dataset.catalog, num_folds=5))
    size = TinyConfig(hidden=128, layers=2, ffn=384, heads=4, kv_heads=2, vocab=4096)
    with tempfile.TemporaryDirectory() as folder:
        make_init("tiny", replace(dataset, train=demonstrations), folder, seed=args.seed, tiny=size)
        policy = open_policy(folder, ModelConfig(), torch.device("cpu"))

    # The warm start, so that lists have their form and some hits: negative log-likelihood of EASE's, 16 a step.
    optimizer = torch.optim.AdamW(policy.model.parameters(), 2e-3, (0.9, 0.95), weight_decay=0.0, fused=True)
    groups = demonstration_groups(policy.tokenizer, demonstrations, DATA)
    for step in range(args.warm_steps):
        pack = build_pack([groups[i] for i in BatchOrder(len(groups), 16, args.seed).indices(step)])
        descend(-list_logprobs(policy, pack).sum() / pack.mask_BT.sum(), policy, optimizer)

    # A pass takes 8 steps: the means at steps 8, 16 and 24 are over the same conversations and can be compared.
    order, rewards = BatchOrder(min(len(dataset.train), 8 * args.prompts), args.prompts, args.seed), []
    # With the usual eps Adam would turn the noise of titles that hardly occur into full steps.
    optimizer = torch.optim.AdamW(policy.model.parameters(), args.lr, (0.9, 0.99), 1e-6, weight_decay=0.0, fused=True)
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        samples = [dataset.train[i] for i in order.indices(step)]
        seeds = [prompt_seed(args.seed, step, sample.id) for sample in samples]
        options = {"returns": args.returns, "updates": args.updates}
        rewards.append(train_step(policy, optimizer, dataset, samples, seeds, **options))
        recent = sum(rewards[-8:]) / len(rewards[-8:])
        print(f"step {step + 1:3d}: reward {rewards[-1]:.3f} a list, mean of 8 steps {recent:.3f}", flush=True)


if __name__ == "__main__":
    main()
