"""Every named method: its file loads with every preset, and the update computes what its paper writes."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_world import ALONE, WORDS, tiny_config

from rankgrpo.cli import default_run_dir
from rankgrpo.config_file import flatten, load_config, method_files, presets_dir
from rankgrpo.data.samples import Sample, Turn
from rankgrpo.errors import ConfigError
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.model.packing import Group
from rankgrpo.pipeline import run_pipeline
from rankgrpo.rollouts.score import Scorer, score_groups
from rankgrpo.runtime.means import Means
from rankgrpo.sampler.base import Rollout
from rankgrpo.train import MicroBatch, Updater

METHODS = ["cispo", "dapo", "dppo", "dr-grpo", "gdpo", "grpo", "gspo", "r1-zero", "rank-grpo", "rank-grpo-exp",
           "rank-grpo-log", "released", "sapo", "unlikeliness"]  # fmt: skip
P, G, K, MAX_NEW = 4, 3, 5, 24


def test_the_methods_are_there():
    assert list(method_files()) == METHODS
    with pytest.raises(ConfigError, match="unknown method 'ppo'; methods are cispo, dapo"):
        load_config(None, method="ppo")
    assert str(default_run_dir("tiny", "demo", "gspo")) == "runs/tiny-demo-gspo"


@pytest.mark.parametrize("method", METHODS)
def test_a_method_fits_every_preset_and_says_the_same_with_each(method):
    presets = sorted(presets_dir().glob("*.toml"))
    methods_keys = flatten(load_config(None, method=method)).items() - flatten(load_config()).items()
    for preset in presets:
        config = load_config(preset, method=method)
        assert methods_keys <= flatten(config).items()
        assert config.model.name == preset.stem
    assert load_config(None, ["rl.clip_high=0.5"], method=method).rl.clip_high == 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Oracle: loops and literals of the papers; no code and no setting of the project


TITLES = [(f"Film {chr(ord('A') + n)}", 1950 + n) for n in range(12)]


def clipped(log_ratio, advantage, low, high):
    ratio = math.exp(log_ratio)
    return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def mean(values):
    return sum(values) / len(values)


def standardised(rewards, by_std=True):
    """The advantages of one group."""
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    centred = [reward - mean(rewards) for reward in rewards]
    std = math.sqrt(sum(value**2 for value in centred) / (len(rewards) - 1))
    return [value / (std + 1e-4) if by_std else value for value in centred]


def dcg_from(hits, rank):
    return sum(hits[j] / math.log2(j + 2) for j in range(rank, K))


def by_list(group, by_std=True):
    """List advantages of a group from DCG@K."""
    return standardised([dcg_from(answer.hits, 0) for answer in group], by_std)


def by_rank(group, reward):
    """advantages[list][rank] of a group from reward(hits, rank)."""
    columns = [standardised([reward(answer.hits, rank) for answer in group]) for rank in range(K)]
    return [list(row) for row in zip(*columns, strict=True)]


def token_terms(answer, advantage, low, high):
    return [clipped(ratio, advantage, low, high) for item in answer.log_ratios for ratio in item]


def grpo(groups, low=0.2, high=0.26):
    rows = [zip(group, by_list(group), strict=True) for group in groups]
    return mean([mean(token_terms(answer, advantage, low, high)) for row in rows for answer, advantage in row])


def gspo(groups):
    rows = [zip(group, by_list(group), strict=True) for group in groups]
    flat = lambda answer: [ratio for item in answer.log_ratios for ratio in item]  # noqa: E731
    return mean([clipped(mean(flat(answer)), a, 3e-4, 4e-4) for row in rows for answer, a in row])


def dapo(groups):
    rows = [zip(group, by_list(group), strict=True) for group in groups]
    return mean([term for row in rows for answer, a in row for term in token_terms(answer, a, 0.2, 0.28)])


def dr_grpo(groups):
    rows = [zip(group, by_list(group, by_std=False), strict=True) for group in groups]
    terms = [term for row in rows for answer, a in row for term in token_terms(answer, a, 0.2, 0.2)]
    return sum(terms) / (P * G * MAX_NEW)


def units_of(answer, advantages, full_list_bonus=0.0):
    """(log-ratios, advantage) of every rank, overflow item and penalised end; the end is the last token of the list."""
    items = [list(item) for item in answer.log_ratios]
    num_items = len(items)
    end = None
    if num_items < K or (num_items == K and full_list_bonus):
        end = ([items[-1].pop()], -0.1 if num_items < K else full_list_bonus)
    units = [(items[rank] if rank < num_items else [], advantages[rank]) for rank in range(K)]
    units += [(item, -0.1) for item in items[K:]]
    return units + [end] if end else units


def rank_grpo(groups, reward=lambda hits, rank: hits[rank]):
    total = 0.0
    for group in groups:
        for answer, advantages in zip(group, by_rank(group, reward), strict=True):
            for log_ratios, advantage in units_of(answer, advantages):
                total += clipped(mean(log_ratios or [0.0]), advantage, 0.06, 0.08)
    return total / (P * G * K)


def rank_grpo_log(groups):
    return rank_grpo(groups, dcg_from)


def rank_grpo_exp(groups):
    return rank_grpo(groups, lambda hits, rank: sum(hits[j] / 2 ** (j - rank) for j in range(rank, K)))


def released(groups):
    total, num_tokens = 0.0, 0
    for group in groups:
        for answer, advantages in zip(group, by_rank(group, lambda hits, rank: hits[rank]), strict=True):
            for log_ratios, advantage in units_of(answer, advantages, full_list_bonus=0.1):
                if log_ratios:
                    total += len(log_ratios) * clipped(mean(log_ratios), advantage, 0.06, 0.08)
                    num_tokens += len(log_ratios)
    return total / num_tokens


def unlikeliness(groups):
    """Among the n hits of a rank the one at place p from the likeliest keeps 1 - .25 (n - p) / n of its reward."""
    total = 0.0
    for group in groups:
        columns = []
        for rank in range(K):
            logps = sorted((mean(answer.old_logps[rank]) for answer in group if answer.hits[rank]), reverse=True)
            n = len(logps)
            places = [logps.index(mean(a.old_logps[rank])) if a.hits[rank] else 0 for a in group]
            kept = [a.hits[rank] * (1 - 0.25 * (n - p) / max(n, 1)) for a, p in zip(group, places, strict=True)]
            columns.append(standardised(kept))
        for i, answer in enumerate(group):
            for log_ratios, advantage in units_of(answer, [columns[rank][i] for rank in range(K)]):
                total += clipped(mean(log_ratios or [0.0]), advantage, 0.06, 0.08)
    return total / (P * G * K)


def held(groups, weight):
    """Rank-GRPO with weight(ratio, advantage, probability now, then) in place of the clip."""
    total = 0.0
    for group in groups:
        for answer, advantages in zip(group, by_rank(group, lambda hits, rank: hits[rank]), strict=True):
            olds = units_of(SimpleNamespace(log_ratios=answer.old_logps), advantages)
            for (log_ratios, advantage), (old, _) in zip(units_of(answer, advantages), olds, strict=True):
                ratio, then = math.exp(mean(log_ratios or [0.0])), math.exp(mean(old or [0.0]))
                total += weight(ratio, advantage, ratio * then, then) * ratio * advantage
    return total / (P * G * K)


def cispo(groups):
    return held(groups, lambda ratio, *_: min(max(ratio, 0.94), 1.08) / ratio)


def sapo(groups):
    def weight(ratio, advantage, *_):
        s = 1 / (1 + math.exp(-(1.0 if advantage > 0 else 1.05) * (ratio - 1)))
        return 4 * s * (1 - s)

    return held(groups, weight)


def dppo(groups):
    def weight(ratio, advantage, now, then):
        away = (ratio > 1 and advantage > 0) or (ratio < 1 and advantage < 0)
        return 0.0 if away and abs(now - then) > 0.15 else 1.0

    return held(groups, weight)


def gdpo(groups):
    total = 0.0
    for group in groups:
        hits = by_rank(group, lambda hits, rank: hits[rank])
        columns = [standardised([float(rank < len(answer.films)) for answer in group]) for rank in range(K)]
        for i, answer in enumerate(group):
            advantages = [hits[i][rank] + 0.1 * columns[rank][i] for rank in range(K)]
            for log_ratios, advantage in units_of(answer, advantages):
                total += clipped(mean(log_ratios or [0.0]), advantage, 0.06, 0.08)
    return total / (P * G * K)


ORACLES = {
    "cispo": cispo, "dppo": dppo, "gdpo": gdpo, "sapo": sapo,
    "dapo": dapo, "dr-grpo": dr_grpo, "grpo": grpo, "gspo": gspo, "r1-zero": rank_grpo, "rank-grpo": rank_grpo,
    "rank-grpo-exp": rank_grpo_exp, "rank-grpo-log": rank_grpo_log, "released": released, "unlikeliness": unlikeliness,
}  # fmt: skip


def random_answers(seed):
    """P groups of G answers: lists of 3 to 7 distinct films of 2 or 3 tokens, a third of the films wanted."""
    rng = random.Random(seed)
    groups = []
    for _ in range(P):
        wanted = rng.sample(range(12), 4)
        group = []
        for _ in range(G):
            films = rng.sample(range(12), rng.choice([3, 5, 5, 6, 7]))
            lengths = [rng.choice([2, 3]) for _ in films]
            old = [[-abs(rng.gauss(0, 1)) - 0.1 for _ in range(n)] for n in lengths]
            # A third of the tokens hardly move, so that both sides of the narrowest clip range are reached.
            ratios = [[rng.gauss(0, rng.choice([2e-4, 0.1, 0.3])) for _ in range(n)] for n in lengths]
            hits = [float(film in wanted) for film in films[:K]] + [0.0] * (K - min(K, len(films)))
            group.append(SimpleNamespace(films=films, wanted=wanted, hits=hits, old_logps=old, log_ratios=ratios))
        groups.append(group)
    return groups


EOS = 999


class Segmenter:
    """A token's id is 100 * rank and its place in the item; EOS belongs to the last item."""

    def __call__(self, ids_BT, mask_BT):
        rank_BT = torch.where(ids_BT == EOS, -1, ids_BT // 100)
        rank_BT = torch.where(ids_BT == EOS, rank_BT.amax(1, keepdim=True), rank_BT)
        return torch.where(mask_BT, rank_BT, -1)


def token_ids(answer):
    ids = [100 * rank + place for rank, item in enumerate(answer.log_ratios) for place in range(len(item))]
    return [*ids[:-1], EOS]


def flat(rows):
    return [value for row in rows for value in row]


class GivenLogprobs:
    """Stands for a policy: log-probabilities that were decided beforehand."""

    impl, device, tokenizer = "torch", torch.device("cpu"), None

    def __init__(self, groups):
        lists = [answer for group in groups for answer in group]
        width = max(len(token_ids(answer)) for answer in lists)
        pad = lambda rows, value: torch.tensor([row + [value] * (width - len(row)) for row in rows])  # noqa: E731
        self.ids_BT = pad([token_ids(answer) for answer in lists], 0)
        self.mask_BT = pad([[True] * len(token_ids(answer)) for answer in lists], False)
        old_BT = pad([flat(answer.old_logps) for answer in lists], 0.0).double()
        self.old_logp_BT = old_BT
        self.logp_BT = (old_BT + pad([flat(answer.log_ratios) for answer in lists], 0.0)).requires_grad_()

    def logprobs(self, groups, temperature, allowed):
        pack = SimpleNamespace(token_ids_BT=self.ids_BT, mask_BT=self.mask_BT, tokens_dense=2, tokens_shared=1)
        return pack, self.logp_BT


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", METHODS)
def test_the_objective_is_the_papers(method, seed):
    answers = random_answers(seed)
    config = load_config(None, [*WORDS, "rl.kl_coef=0"], method=method)
    rl = config.rl
    catalog = Catalog([Item(title, year) for title, year in TITLES])
    groups, samples = [], []
    for p, group in enumerate(answers):
        truth = tuple(TITLES[film] for film in group[0].wanted)
        samples.append(Sample(str(p), (Turn("user", "hello"),), (), truth))
        text = lambda answer: "\n".join(f"{TITLES[film][0]} ({TITLES[film][1]})" for film in answer.films)  # noqa: E731
        groups.append([Rollout(token_ids(a), flat(a.old_logps), text(a), finished=True) for a in group])
    scored = score_groups(groups, samples, Scorer.open(catalog, rl, K, Segmenter(), [EOS]), Means())

    policy = GivenLogprobs(answers)
    updater = Updater(policy, None, SimpleNamespace(eos_ids=[EOS]), None, rl, ALONE)
    units = scored.units
    units = replace(units, advantage_BU=units.advantage_BU.double(), weight_BU=units.weight_BU.double())
    batch = MicroBatch([Group([1], [[2]])], units, policy.old_logp_BT, [], old_logp_BT=policy.old_logp_BT)
    loss = updater._backward(batch, scored.denominator, Means())
    assert -float(loss) == pytest.approx(ORACLES[method](answers), rel=1e-4, abs=1e-7)
    assert policy.logp_BT.grad.isfinite().all() and policy.logp_BT.grad.any()


def test_the_methods_differ():
    """The oracle can tell them apart: no two methods have one objective, but for the one that only drops the start."""
    values = {name: round(oracle(random_answers(0)), 9) for name, oracle in ORACLES.items() if name != "r1-zero"}
    assert len(set(values.values())) == len(values), values


@pytest.mark.slow
def test_without_a_warm_start_the_untrained_model_is_where_rl_starts(tmp_path, capsys):
    words = [*WORDS, "rl.num_steps=1", "rl.eval_samples=1", "eval.num_samples=2"]
    config = load_config(None, words, method="r1-zero")
    with pytest.raises(ConfigError, match="sft.enabled = false leaves nothing to do"):
        run_pipeline(config, tmp_path / "run", until="sft")
    run_pipeline(config, tmp_path / "run")
    assert not (tmp_path / "run" / "sft").exists()
    assert {path.stem for path in (tmp_path / "run" / "eval" / "test").glob("*.json")} == {
        "before", "rank-grpo", "popularity", "ease"
    }  # fmt: skip
    assert "RL over the untrained model, NDCG@5: " in capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "SFT has logged nothing yet" not in page and "After SFT," not in page


def test_methods_of_a_small_run_keep_its_size():
    assert load_config(None, WORDS, method="rank-grpo") == tiny_config()
