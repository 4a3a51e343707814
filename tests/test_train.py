import importlib.util
import json
import math
import os
import shutil

import pytest
import torch
from tiny_world import (
    ALONE,
    WORDS,
    byte_rollout,
    byte_scorer,
    keep_ends_of_lists,
    taught_dataset,
    tiny_config,
    tiny_dataset,
    tiny_demonstrations,
)
from transformers import AutoModelForCausalLM

from rankgrpo import train as training
from rankgrpo.config import DataConfig
from rankgrpo.config_file import load_config
from rankgrpo.errors import SamplingError, TrainingError
from rankgrpo.model.policy import choose_impl
from rankgrpo.model.presets import make_init
from rankgrpo.model.tiny import TinyConfig
from rankgrpo.rollouts.score import score_groups
from rankgrpo.runtime.means import Means
from rankgrpo.runtime.tracker import read_metrics
from rankgrpo.sft import demonstration_groups, train_sft
from rankgrpo.train import train


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A warm-started model: (folder, rows of its training)."""
    folder = tmp_path_factory.mktemp("warm")
    config = tiny_config("sft.num_steps=40")
    size = config.model
    init = make_init(
        "tiny",
        taught_dataset(),
        folder / "init",
        seed=0,
        tiny=TinyConfig.of(size),
    )
    final = train_sft(config, tiny_dataset(), tiny_demonstrations(), init, folder / "sft", ALONE)
    return final, read_metrics(folder / "sft" / "metrics.jsonl")[0]


def run(warm, tmp_path, *words):
    train(tiny_config(*words), tiny_dataset(), warm[0], tmp_path / "rl", ALONE)
    return read_metrics(tmp_path / "rl" / "metrics.jsonl")[0]


def without_times(rows):
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def test_sft_learns_the_demonstrations(warm):
    losses = [row["loss/nll"] for row in warm[1]]
    assert losses[-1] < 0.5 * losses[0]
    assert [row["step"] for row in warm[1]] == list(range(1, 41))
    assert warm[1][-1]["loss/val_nll"] < losses[0]


def test_demonstrations_end_with_eos_and_keep_the_prompt(warm):
    from rankgrpo.model.presets import load_policy

    _, tokenizer = load_policy(str(warm[0]))
    samples = tiny_demonstrations()["train"][:3]
    for group, sample in zip(demonstration_groups(tokenizer, samples, DataConfig(num_ranks=5)), samples, strict=True):
        (ids,) = group.completion_ids
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == sample.completion
        assert sample.conversation[-1].content in tokenizer.decode(group.prompt_ids)


def test_metrics_of_a_run(warm, tmp_path):
    rows = run(warm, tmp_path)
    assert [row["step"] for row in rows] == list(range(7))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for key in ("reward/mean", "reward/rank_04", "reward/zero_std_frac", "list/parsed_frac", "list/in_catalog_frac",
                "loss/kl", "policy/entropy", "ratio/mean", "grad/norm", "time/sample_s", "tokens/trained"):  # fmt: skip
        assert key in rows[1], key
    assert "eval/ndcg@5" in rows[0] and "eval/ndcg@5" in rows[3] and "eval/ndcg@5" not in rows[1]
    # On-policy: the trainer's log-probs are the sampler's, and every ratio is 1.
    assert rows[1]["mismatch/exp_abs_logp"] == pytest.approx(1.0, abs=1e-4)
    assert rows[1]["mismatch/outside_clip_frac"] == 0 and "mismatch/corrected_frac" not in rows[1]
    assert rows[1]["ratio/mean"] == pytest.approx(1.0, abs=1e-6)
    assert rows[1]["loss/kl"] == pytest.approx(0.0, abs=1e-6) and rows[-1]["loss/kl"] > 0


def test_lists_for_evaluation_are_greedy_or_drawn_by_seed_and_sample(warm):
    from rankgrpo.evaluation.validate import recommend_lists
    from rankgrpo.model.policy import open_policy
    from rankgrpo.sampler.choose import hf_sampler

    samples = tiny_dataset().validation

    def lists(*words, of=samples):
        config = tiny_config(*words)
        policy = open_policy(warm[0], config.model, ALONE.device, trainable=False)
        return recommend_lists(policy, hf_sampler(policy), of, tiny_dataset().catalog, config)

    assert lists() == lists("seed=1")
    drawn = lists("eval.temperature=1.0")
    assert drawn != lists() and drawn != lists("eval.temperature=1.0", "seed=1")
    assert lists("eval.temperature=1.0", of=samples[::-1])[::-1] == drawn


def test_exports_load_in_transformers(warm, tmp_path):
    run(warm, tmp_path)
    for name in ("best", "final"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "rl" / name)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_last_model_within_the_noise_of_the_best_is_kept(warm, tmp_path, monkeypatch):
    scores = iter([(0.10, 0.01), (0.12, 0.02), (0.08, 0.01), (0.101, 0.01), (0.09, 0.05)])
    names = ("eval/ndcg@5", "eval/se_ndcg@5")
    monkeypatch.setattr("rankgrpo.train.validate", lambda *_, **__: dict(zip(names, next(scores), strict=True)))
    run(warm, tmp_path, "rl.eval_every=1", "rl.num_steps=4")
    assert (tmp_path / "rl" / "best").resolve().name == "best-00000003"  # .101 >= .12 - .02 > .09


def test_the_standard_error_of_validation(monkeypatch):
    from rankgrpo.evaluation.validate import validate

    dataset = tiny_dataset()
    samples = dataset.validation[:4]  # one of four is answered with its first ground truth alone
    (title, year), *others = samples[1].groundtruth
    ideal = sum(1 / math.log2(rank + 2) for rank in range(min(1 + len(others), 5)))
    texts = ["nothing", f"{title} ({year})", "nothing", "nothing"]
    monkeypatch.setattr("rankgrpo.evaluation.validate.recommend_lists", lambda *_, **__: texts)
    metrics = validate(None, None, samples, dataset.catalog, tiny_config("eval.free_samples=0"), ALONE)
    assert metrics["eval/ndcg@5"] == pytest.approx(0.25 / ideal)
    assert metrics["eval/se_ndcg@5"] == pytest.approx((0.25 * 0.75) ** 0.5 / ideal / 2)


def test_micro_batches_change_nothing(warm, tmp_path):
    whole = run(warm, tmp_path / "a", "rl.token_budget=100000")
    split = run(warm, tmp_path / "b", "rl.token_budget=1")
    for a, b in zip(without_times(whole), without_times(split), strict=True):
        assert a == pytest.approx(b, abs=2e-5, rel=2e-4)


def test_skipping_groups_without_gradient_changes_nothing(warm, tmp_path, monkeypatch):
    # Two steps: later on Adam turns the rounding of a gradient near 0 into a step of its own.
    words = ("rl.kl_coef=0", "rl.overflow_penalty=0", "rl.early_eos_penalty=0", "rl.num_steps=2")
    skipped = run(warm, tmp_path / "a", *words)
    assert min(row["groups/trained_frac"] for row in skipped[1:]) < 1
    import rankgrpo.rollouts.rounds as module

    score = module.score_groups

    def train_on_all(*args):
        scored = score(*args)
        scored.carries_gradient[:] = [True] * len(scored.carries_gradient)
        return scored

    monkeypatch.setattr(module, "score_groups", train_on_all)
    trained = run(warm, tmp_path / "b", *words)
    for a, b in zip(skipped, trained, strict=True):
        for key in ("reward/mean", "grad/norm", "loss/policy", "list/tokens_mean"):
            assert key not in a or a[key] == pytest.approx(b[key], abs=2e-5, rel=2e-4), key


def test_several_updates_on_a_batch_leave_the_sampling_policy(warm, tmp_path):
    rows = run(warm, tmp_path, "rl.updates_per_batch=3", "rl.lr=1e-2", "rl.num_steps=3")
    assert any(abs(row["ratio/mean"] - 1) > 1e-5 for row in rows[1:])
    assert any(row["ratio/clip_high_frac"] + row["ratio/clip_low_frac"] > 0 for row in rows[1:])


@pytest.mark.parametrize(
    "method", ["dapo", "dr-grpo", "grpo", "gspo", "rank-grpo-exp", "rank-grpo-log", "released", "unlikeliness"]
)
def test_every_method_trains(warm, tmp_path, method):
    config = load_config(None, [*WORDS, "rl.num_steps=2", "rl.eval_samples=1"], method=method)
    train(config, tiny_dataset(), warm[0], tmp_path / "rl", ALONE)
    rows = read_metrics(tmp_path / "rl" / "metrics.jsonl")[0]
    assert rows[-1]["step"] == 2 and all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[-1]["grad/norm"] > 0


def test_gradient_checkpointing_changes_nothing(warm, tmp_path):
    plain = run(warm, tmp_path / "a", "rl.num_steps=3")
    recomputed = run(warm, tmp_path / "b", "rl.num_steps=3", "model.gradient_checkpointing=true")
    for a, b in zip(without_times(plain), without_times(recomputed), strict=True):
        assert a == pytest.approx(b, abs=1e-5, rel=1e-4)


def test_a_second_run_is_the_same_bit_for_bit(warm, tmp_path):
    assert without_times(run(warm, tmp_path / "a")) == without_times(run(warm, tmp_path / "b"))


def test_a_finished_run_is_not_repeated(warm, tmp_path):
    run(warm, tmp_path)
    before = (tmp_path / "rl" / "metrics.jsonl").stat().st_mtime_ns
    run(warm, tmp_path)
    assert (tmp_path / "rl" / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("adapter.kind=dora", "adapter.rslora=true")], ids=["whole", "adapters"])
def test_rewards_rise_when_the_right_answer_is_one_film(warm, tmp_path, words):
    """The signal reaches the right tokens: with the same single film wanted by everybody, its rank-0 rate must rise."""
    from dataclasses import replace

    dataset = tiny_dataset()
    item = dataset.catalog.items[max(range(len(dataset.catalog)), key=lambda i: dataset.catalog.items[i].popularity)]
    easy = [replace(s, groundtruth=((item.title, item.year),), seen_titles=()) for s in dataset.train]
    config = tiny_config(
        "rl.num_steps=25", "rl.lr=3e-3", "rl.prompts_per_step=8", "rl.group_size=8", "rl.kl_coef=0", *words
    )
    train(config, replace(dataset, train=easy), warm[0], tmp_path / "rl", ALONE)
    rewards = [row["reward/mean"] for row in read_metrics(tmp_path / "rl" / "metrics.jsonl")[0][1:]]
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])


def broken_copy(folder, to):
    shutil.copytree(folder, to)
    model = AutoModelForCausalLM.from_pretrained(to)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    model.save_pretrained(to)
    return to


def test_a_model_that_is_broken_is_named_before_training(warm, tmp_path):
    with pytest.raises(SamplingError, match="not finite"):
        train(tiny_config(), tiny_dataset(), broken_copy(warm[0], tmp_path / "broken"), tmp_path / "rl", ALONE)


def test_nan_in_the_loss_stops_and_keeps_the_last_checkpoint(warm, tmp_path, monkeypatch):
    import rankgrpo.train as module

    loss_function, calls = module.rank_grpo_loss, []

    def nan_at_the_fourth_step(*args, **kwargs):
        loss, metrics = loss_function(*args, **kwargs)
        calls.append(loss)
        return (loss * math.nan if len(calls) == 4 else loss), metrics

    monkeypatch.setattr(module, "rank_grpo_loss", nan_at_the_fourth_step)
    with pytest.raises(TrainingError, match="RL step 4, update 1: the loss is nan.*checkpoint is intact"):
        run(warm, tmp_path)
    assert [path.name for path in (tmp_path / "rl" / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    run(warm, tmp_path / "whole")
    run(warm, tmp_path)  # the same command goes on
    rows = [read_metrics(folder / "rl" / "metrics.jsonl")[0] for folder in (tmp_path, tmp_path / "whole")]
    assert without_times(rows[0]) == without_times(rows[1])


def test_resume_cuts_the_metrics_back_to_the_checkpoint(warm, tmp_path):
    whole = run(warm, tmp_path / "a", "rl.keep_last=3")
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
    out = tmp_path / "b" / "rl"
    shutil.rmtree(out / "final")
    for step in (4, 6):
        shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (out / name).open("a") as file:
            file.write('{"step": 7, "rew')  # a row cut short by a kill
    assert json.loads((out / "checkpoints" / "step-00000002" / "state.json").read_text())["step"] == 2
    assert without_times(run(warm, tmp_path / "b")) == without_times(whole)
    sampled = (tmp_path / "a" / "rl" / "rollouts.jsonl").read_bytes()
    assert (out / "rollouts.jsonl").read_bytes() == sampled and sampled.count(b"\n") == 6 * 4


def test_sampled_lists_are_kept_with_their_ratios(warm, tmp_path):
    from rankgrpo.rollouts.record import read_rollouts

    words = ("rl.num_steps=2", "rl.updates_per_batch=3", "rl.lr=1e-2", "rl.log_lists=12")
    metrics = run(warm, tmp_path / "a", *words)
    groups, _ = read_rollouts(tmp_path / "a" / "rl" / "rollouts.jsonl")
    assert [group["step"] for group in groups] == [2] * 4 and all(len(group["lists"]) == 3 for group in groups)
    lists = [one for group in groups for one in group["lists"]]
    assert sum(one["num_tokens"] for one in lists) == metrics[2]["tokens/sampled"]
    ratios = [ratio for one in lists for ratio in one["ratio"]]
    assert any(abs(ratio - 1) > 1e-3 for ratio in ratios)
    rewards = [reward for one in lists for reward in one["reward"] if reward is not None]
    assert sum(rewards) == pytest.approx(metrics[2]["reward/mean"] * 12 * 5)
    run(warm, tmp_path / "b", *words[:1], "rl.kl_coef=0", "rl.overflow_penalty=0", "rl.early_eos_penalty=0")
    groups, _ = read_rollouts(tmp_path / "b" / "rl" / "rollouts.jsonl")
    cut = 0
    for group in groups:  # on-policy: 1 up to the last line with a gradient, and no ratio where nothing was computed
        for one in group["lists"]:
            live = max((line for line, advantage in enumerate(one["advantage"]) if advantage), default=-1) + 1
            assert one["ratio"] == [1.0] * live + [None] * (len(one["lines"]) - live)
            cut += 0 < live < len(one["lines"])
    assert cut
    run(warm, tmp_path / "c", "rl.num_steps=1", "rl.log_lists=0")
    assert not (tmp_path / "c" / "rl" / "rollouts.jsonl").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("rl.updates_per_batch=3",),
        ("rl.returns=log",),
        ("rl.constrain=catalog",),
        ("rl.surrogate=cispo", "rl.mismatch_correction=truncate", "rl.mismatch_cap=2", "rl.updates_per_batch=2"),
    ],
)
def test_leaving_out_the_ends_of_lists_changes_no_gradient(warm, tmp_path, monkeypatch, words):
    penalties = () if "rl.constrain=catalog" in words else ("rl.overflow_penalty=0", "rl.early_eos_penalty=0")
    words = ("rl.num_steps=1", "rl.kl_coef=0", "rl.lr=1e-3", *penalties, *words)
    plain, gradients = training.optimizer_step, []

    def keep(optimizer, parameters, **options):
        parameters = list(parameters)
        gradients[-1].append([parameter.grad.clone() for parameter in parameters])
        return plain(optimizer, parameters, **options)

    monkeypatch.setattr(training, "optimizer_step", keep)
    rows = []
    for folder in ("cut", "whole"):
        if folder == "whole":
            keep_ends_of_lists(monkeypatch)
        gradients.append([])
        rows.append(run(warm, tmp_path / folder, *words)[1])
    assert rows[0]["tokens/cut_frac"] > 0.05 and rows[1]["tokens/cut_frac"] == 0
    assert rows[0]["tokens/trained"] < rows[1]["tokens/trained"]
    assert rows[0]["loss/policy"] == pytest.approx(rows[1]["loss/policy"], abs=1e-6)
    for of_update in zip(*gradients, strict=True):
        for cut, whole in zip(*of_update, strict=True):
            assert (cut - whole).norm() <= 1e-4 * whole.norm()
    assert any(whole.norm() > 0 for whole in gradients[1][0])


def test_with_a_kl_term_every_token_counts(warm, tmp_path):
    assert run(warm, tmp_path, "rl.num_steps=1", "rl.kl_coef=0.1")[1]["tokens/cut_frac"] == 0


def test_ranks_of_the_tiny_tokenizer_are_the_parsers(warm):
    """Its titles are added tokens, stored as text and not in the byte alphabet: the segmenter must read both kinds."""
    from rankgrpo.model.presets import load_policy
    from rankgrpo.parse import RankSegmenter, parse_list

    _, tokenizer = load_policy(str(warm[0]))
    segmenter = RankSegmenter(tokenizer)
    for sample in tiny_demonstrations()["train"][:10]:
        text = sample.completion + "\n\nTitle no token holds (1999)\n"
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        (rank_T,) = segmenter(ids, torch.ones_like(ids, dtype=torch.bool)).tolist()
        for rank, item in enumerate(parse_list(text)):
            of_rank = [i for i, r in zip(ids[0].tolist(), rank_T, strict=True) if r == rank]
            assert tokenizer.decode(of_rank, skip_special_tokens=True).strip() == text[slice(*item.chars)].strip()


@pytest.mark.slow
def test_training_with_the_kernels_is_training_without_them(warm, tmp_path):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 from the start; run `make test`")
    rows = {}
    for kernels in ("torch", "triton"):
        words = (f"model.kernels={kernels}", "rl.num_steps=2", "rl.updates_per_batch=2", "rl.max_new_tokens=12")
        rows[kernels] = without_times(run(warm, tmp_path / kernels, *words))
    assert rows["triton"][1] != rows["torch"][1]  # it did run something else
    for fused, plain in zip(rows["triton"][:2], rows["torch"][:2], strict=True):
        assert fused == pytest.approx(plain, rel=1e-4, abs=1e-6)


def test_kernels_are_chosen_by_the_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_impl("auto", cpu) == choose_impl("torch", gpu) == "torch"
    assert choose_impl("triton", cpu) == "triton"
    if importlib.util.find_spec("triton") is not None:
        assert choose_impl("auto", gpu) == "triton"


def test_denominators_of_the_methods():
    def of(*words):
        rl = tiny_config(*words).rl
        groups = [[byte_rollout("ab\ncd", finished=place < 10) for place in range(3 * p, 3 * p + 3)] for p in range(4)]
        return score_groups(
            groups, tiny_dataset().train[:4], byte_scorer(tiny_dataset().catalog, rl, 5), Means()
        ).denominator

    assert of() == 4 * 3 * 5  # prompts x lists x ranks
    assert of("rl.unit=token") == of("rl.unit=list") == 12
    assert of("rl.unit=token", "rl.token_mean=batch") == of("rl.reduction=token") == 70
    assert of("rl.unit=token", "rl.token_mean=max") == 12 * 24
