"""What the tests of this folder run in one or several processes: `torchrun scenarios.py FOLDER NAME...`."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import torch
from processes import finish, launch
from safetensors.torch import save_file
from tiny_world import tiny_config, tiny_dataset
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence

import rankgrpo.train as training
from rankgrpo.config import RlConfig
from rankgrpo.errors import SaveError, TrainingError
from rankgrpo.model.adapter import merged_parameters
from rankgrpo.model.constraint import hold_to_catalog
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import Policy, open_policy, open_reference
from rankgrpo.parse import RankSegmenter
from rankgrpo.runtime.checkpoint import load_checkpoint, save_checkpoint
from rankgrpo.runtime.distributed import Parallel, full_parameters, leave_parallel, make_sharding, start_parallel
from rankgrpo.runtime.means import Means
from rankgrpo.runtime.optim import make_optimizer
from rankgrpo.sampler.base import Rollout
from rankgrpo.sampler.choose import hf_sampler
from rankgrpo.units import make_units


def play(num_processes: int, folder: Path, *scenarios: str) -> None:
    """Run functions of this file in `num_processes` processes, one after the other; fails with their output."""
    finish(launch(__file__, str(folder), *scenarios, num_processes=num_processes))


def whole_parameters(folder: Path) -> None:
    """A sharded model gives back, by name and in order, the parameters it was made of; a tied one comes once."""
    start_parallel()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False))
    model[2].weight = model[0].weight
    made = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model[1], mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    for _ in range(2):
        found = dict(full_parameters(model))
        assert list(found) == list(made) == ["0.weight", "1.weight", "1.bias"]
        assert all(torch.equal(found[name], made[name]) for name in made)
        with torch.no_grad():
            model(torch.tensor([1, 2]))  # leaves the root whole, in bfloat16
    for name, tensor in full_parameters(model, torch.bfloat16):
        assert torch.equal(tensor, made[name].bfloat16())


def full_disk(folder: Path) -> None:
    """When one process cannot write, all hear of it in the same words, and the checkpoint before is untouched."""
    parallel = start_parallel()
    model = nn.Linear(5, 4)
    fully_shard(model)
    optimizer = make_optimizer(model, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    save_checkpoint(folder / "full", 1, model, optimizer, {}, 1, parallel)
    fsync = os.fsync

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = full if parallel.dp_rank == 1 else fsync
    message = "saved"
    try:
        save_checkpoint(folder / "full", 2, model, optimizer, {}, 1, parallel)
    except SaveError as error:
        message = str(error)
    os.fsync = fsync
    messages = parallel.gather([message])
    assert messages[0] == messages[1] and "the disk is full" in message, messages
    assert [path.name for path in (folder / "full").iterdir()] == ["step-00000001"]
    assert load_checkpoint(folder / "full" / "step-00000001", model, optimizer)["step"] == 1


def not_finite(folder: Path) -> None:
    """The loss of the second process is NaN: both stop with one message, and the weights are as they were."""
    parallel = start_parallel()
    config = tiny_config("rl.kl_coef=0", "parallel.shard=none", "rl.mismatch_alarm=1e9")
    policy = open_policy(folder / "model", config.model, parallel.device)
    before = [parameter.clone() for parameter in policy.model.parameters()]
    optimizer = make_optimizer(policy.model, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    updater = training.Updater(policy, None, hf_sampler(policy), optimizer, config.rl, parallel)
    given = json.loads((folder / "rollouts.json").read_text())[0][parallel.dp_rank : parallel.dp_rank + 1]
    (batch,) = micro_batches(given, policy, config.rl, config.data.num_ranks)
    if parallel.dp_rank == 1:
        batch.units.advantage_BU[0, 0] = float("nan")
    message, everywhere = "no error", False
    try:
        updater.step([batch], 30.0, 1e-2, "RL step 7", Means())
    except TrainingError as error:
        message, everywhere = str(error), error.everywhere
    messages = parallel.gather([message])
    assert messages[0] == messages[1] and "RL step 7: the loss is nan" in message and everywhere, messages
    assert all(torch.equal(*pair) for pair in zip(policy.model.parameters(), before, strict=True))


def jobs(folder: Path) -> None:
    """Play every job of folder/jobs.json: optimizer steps on given rollouts."""
    parallel = start_parallel()
    for job in json.loads((folder / "jobs.json").read_text()):
        play_job(job, folder, parallel)


def play_job(job: dict, folder: Path, parallel: Parallel) -> None:
    """Steps `first` to `last` on the rollouts of folder/rollouts.json; writes folder/NAME.safetensors and NAME.json.

    job: name, words (of the configuration), model (folder), shares (groups of every process), first, last; save and
    resume name a checkpoint folder; sample: prompts to sample and export after the last step.
    """
    config = tiny_config(*job["words"], "rl.mismatch_alarm=1e9")  # no sampler drew the lists
    if parallel.dp_world > 1:
        os.environ |= job.get("environment", {})
    sharding = make_sharding(config.parallel, parallel)
    policy = open_policy(job["model"], config.model, parallel.device, sharding=sharding, adapter=config.adapter)
    policy = hold_to_catalog(policy, config, tiny_dataset().catalog)
    ref = open_reference(policy, job["model"], config.model, parallel.device, sharding)
    rl = config.rl
    optimizer = make_optimizer(policy.model, lr=rl.lr, betas=rl.betas, weight_decay=0.1, eps=rl.adam_eps)
    updater = training.Updater(policy, ref if rl.kl_coef else None, hf_sampler(policy), optimizer, rl, parallel)
    if "resume" in job:
        state = load_checkpoint(Path(job["resume"]), policy.model, optimizer)
        assert state["step"] == job["first"]
    rollouts = json.loads((folder / "rollouts.json").read_text())
    results: dict[str, list] = {"loss": [], "norm": []}
    gradients: dict[str, Tensor] = {}
    training.optimizer_step = recording(training.optimizer_step, policy, gradients)
    for step in range(job["first"], job["last"]):
        means = Means()
        given = [rollouts[step][i] for i in job["shares"][parallel.dp_rank]]
        batch = micro_batches(given, policy, rl, config.data.num_ranks) if given else []
        updater.add_reference(batch)
        for _ in range(rl.updates_per_batch):
            norm = updater.step(batch, job["denominator"], rl.lr, f"step {step}", means)
        metrics = means.reduce(parallel)
        results["loss"].append(metrics["loss/policy"] + rl.kl_coef * metrics["loss/kl"])
        results["norm"].append(norm)
    training.optimizer_step = training.optimizer_step.plain
    if "save" in job:
        save_checkpoint(Path(job["save"]), job["last"], policy.model, optimizer, {}, 1, parallel)
    if "sample" in job:
        lists = hf_sampler(policy).sample(job["sample"], group_size=2, seeds=[1, 2, 3], max_new_tokens=12)
        results["sampled"] = [[rollout.token_ids for rollout in group] for group in lists]
        policy.export(folder / f"{job['name']}-export", parallel)
    parameters = {f"parameter/{name}": tensor.clone() for name, tensor in merged_parameters(policy.model)}
    if parallel.is_main:
        save_file(
            parameters | {f"gradient/{k}": g for k, g in gradients.items()}, folder / f"{job['name']}.safetensors"
        )
        (folder / f"{job['name']}.json").write_text(json.dumps(results))


def micro_batches(given: list[dict], policy: Policy, rl: RlConfig, num_ranks: int) -> list[training.MicroBatch]:
    rollouts = [[Rollout(ids, [-1.0] * len(ids), "", True) for ids in one["lists"]] for one in given]
    ids_BT = pad_sequence(
        [torch.tensor(ids) for one in given for ids in one["lists"]], batch_first=True, padding_value=-1
    )
    units = make_units(
        RankSegmenter(policy.tokenizer)(ids_BT, ids_BT >= 0),
        torch.isin(ids_BT, torch.tensor(hf_sampler(policy).eos_ids)),
        torch.tensor([row for one in given for row in one["advantage"]]),
        unit=rl.unit,
        num_ranks=num_ranks,
        overflow_penalty=rl.overflow_penalty,
        early_eos_penalty=rl.early_eos_penalty,
        full_list_bonus=rl.full_list_bonus,
        mean_by_list=rl.token_mean == "list",
    )
    groups = [Group(one["prompt"], one["lists"]) for one in given]
    choices = None if policy.constraint is None else policy.constraint.choices(groups)
    return training.make_micro_batches(groups, rollouts, units, list(range(len(given))), rl, num_ranks, choices)


def recording(plain, policy: Policy, gradients: dict[str, Tensor]):
    """`optimizer_step` that keeps the first step's whole gradients in `gradients`."""

    def step(optimizer, parameters, **options):
        if not gradients:
            for name, parameter in policy.model.named_parameters():
                grad = parameter.grad
                if not parameter.requires_grad:
                    continue
                gradients[name] = (grad.full_tensor() if policy.sharding is not None else grad).clone()
        return plain(optimizer, parameters, **options)

    step.plain = plain
    return step


if __name__ == "__main__":
    for name in sys.argv[2:]:
        globals()[name](Path(sys.argv[1]))
    leave_parallel()
