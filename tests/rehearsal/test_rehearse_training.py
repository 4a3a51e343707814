"""Steps of SFT and of Rank-GRPO on GPUs that compute nothing: every kind of policy, alone and split among eight."""

import contextlib
import os
from functools import cache
from unittest import mock

import fake_gpu
import pytest
import torch
from tiny_world import tiny_config, tiny_dataset, tiny_demonstrations
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import rankgrpo.model.policy as policy_module
from rankgrpo.config import ParallelConfig
from rankgrpo.errors import ParallelError
from rankgrpo.model.attention import pick_backend
from rankgrpo.model.constraint import hold_to_catalog
from rankgrpo.model.head import PLAIN
from rankgrpo.model.packing import Group
from rankgrpo.model.tiny import train_tokenizer
from rankgrpo.parse import RankSegmenter
from rankgrpo.rollouts.score import Scorer, score_groups
from rankgrpo.runtime.distributed import Parallel, full_parameters, make_sharding, start_parallel, sum_gradients
from rankgrpo.runtime.means import Means
from rankgrpo.runtime.optim import make_optimizer
from rankgrpo.sampler.base import Rollout, fingerprint
from rankgrpo.sampler.choose import hf_sampler
from rankgrpo.sft import backward_nll, validation_nll
from rankgrpo.train import Updater, make_micro_batches

GPU = torch.device("cuda", 0)
PROMPT, NUM_RANKS = [7, 8, 9], 5
WORDS = ("model.autocast=bfloat16", "rl.group_size=2", "rl.kl_coef=0.01", "rl.constrain=none", "sft.constrain=none")


@cache
def tokenizer():
    return train_tokenizer(tiny_dataset(), 1024)


@cache
def lists() -> list[Rollout]:
    """Two lists for one prompt, one of them cut."""
    texts, eos = [sample.completion for sample in tiny_demonstrations()["train"][:2]], tokenizer().eos_token_id
    whole, other = (tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts)
    ids = [[*whole, eos], other[:-3]]
    return [Rollout(i, [-0.5] * len(i), t, f) for i, t, f in zip(ids, texts, (True, False), strict=True)]


def fake_model(source, *, device="cpu"):
    """In place of reading a folder: a model of Llama's architecture whose weights are fake.

    A model that will be split is on the GPU at once: FSDP2 moves it by a way that fake tensors have not.
    """
    device = GPU if torch.distributed.is_initialized() else device
    config = LlamaConfig(
        vocab_size=len(tokenizer()) + 3, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, attn_implementation="sdpa",
        eos_token_id=tokenizer().eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device), tokenizer()


@contextlib.contextmanager
def on_gpus(**options):
    """GPUs, fake tensors and launches; models are made, not read, and what they do to their logits is known."""
    with (
        fake_gpu.gpus(),
        fake_gpu.launches() as launched,
        fake_gpu.fake_tensors(**options),
        mock.patch.object(policy_module, "load_policy", fake_model),
        mock.patch.object(policy_module, "find_logit_map", lambda model: PLAIN),
    ):
        yield launched


def make_batch(config, dense=False):
    """Scored on the CPU, with numbers, as in a run."""
    segmenter = RankSegmenter(tokenizer())
    scorer = Scorer.open(tiny_dataset().catalog, config.rl, NUM_RANKS, segmenter, [tokenizer().eos_token_id])
    units = score_groups([lists()], tiny_dataset().train[:1], scorer, Means()).units
    groups = [Group(PROMPT, [rollout.token_ids for rollout in lists()])]
    return make_micro_batches(groups, [lists()], units, [0], config.rl, NUM_RANKS, dense=dense), units


def open_all(config, parallel, sharding=None):
    policy = policy_module.open_policy("a", config.model, GPU, adapter=config.adapter, sharding=sharding)
    ref = policy_module.open_reference(policy, "a", config.model, GPU, sharding) if config.rl.kl_coef else None
    optimizer = make_optimizer(policy.model, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    return policy, Updater(policy, ref, hf_sampler(policy), optimizer, config.rl, parallel)


def rl_step(*words, parallel=None, sharding=None):
    """One step of Rank-GRPO; the policy and the kernels that were launched."""
    config = tiny_config(*WORDS, *words)
    batch, units = make_batch(config, dense=config.model.attention == "dense")
    with on_gpus() as launched:
        policy, updater = open_all(config, parallel or Parallel(0, 1, GPU), sharding)
        updater.add_reference(batch)
        means = Means()
        assert updater.step(batch, units.denominator, 1e-3, "step 1", means) == 1.0
        assert updater.parallel.dp_world > 1 or means.reduce(updater.parallel)["loss/policy"] == 1.0
    return policy, launched


def test_the_kernels_with_a_reference():
    """Flash attention, the fused head and the fused loss, forward and backward."""
    policy, launched = rl_step()
    assert policy.impl == "triton"
    assert launched == [*["_forward_kernel"] * 2, "forward_kernel", "backward_kernel", "_delta_kernel"]
    assert all(parameter.device == GPU for parameter in policy.model.parameters())


def test_without_the_kernels():
    policy, launched = rl_step("model.kernels=torch", "rl.kl_coef=0")
    assert policy.impl == "torch" and launched == []


def test_other_policies():
    """Adapters with recomputed layers; dense rows, of float32."""
    policy, _ = rl_step("adapter.kind=lora", "model.gradient_checkpointing=true")
    assert policy.skeleton is not None
    rl_step("model.attention=dense", "model.autocast=none", "rl.kl_coef=0")


def test_float32_takes_attention_by_sequence():
    rl_step("model.autocast=none", "rl.kl_coef=0")


def test_sft_and_its_validation():
    config = tiny_config(*WORDS)
    groups = [Group(PROMPT, [lists()[0].token_ids])]
    with on_gpus() as launched:
        policy, _ = open_all(config, Parallel(0, 1, GPU))
        assert backward_nll(policy, groups, 12, 4096) == 1.0
        assert validation_nll(policy, groups, 4096) == {"loss/val_nll": -1.0}
    assert launched == ["_forward_kernel", "_delta_kernel", "_forward_kernel"]


def test_lists_held_to_the_catalog():
    config = tiny_config(*WORDS, "rl.constrain=catalog")
    with on_gpus():
        policy, _ = open_all(config, Parallel(0, 1, GPU))
    policy = hold_to_catalog(policy, config, tiny_dataset().catalog)
    ids = policy.constraint.trie.list_ids([0, 1, 2, 3, 4])
    choices = policy.constraint.choices([Group(PROMPT, [ids])]).for_head()
    with on_gpus():
        _, logp_BT = policy.logprobs([Group(PROMPT, [ids])], allowed=choices.to(GPU))
        # Not backward: fake tensors do not add the sparse gradient of the allowed rows to that of the embedding.
        weight = policy.model.model.embed_tokens.weight
        (grad,) = torch.autograd.grad(logp_BT.sum(), weight)
    assert logp_BT.device == GPU and grad.device == GPU and grad.shape == weight.shape


def test_the_sampler_over_the_trainers_weights():
    config = tiny_config(*WORDS, "rl.kl_coef=0")
    with on_gpus(number=len(PROMPT)):
        policy, updater = open_all(config, Parallel(0, 1, GPU))
        groups = updater.sampler.sample([PROMPT, PROMPT], group_size=2, seeds=[1, 2], max_new_tokens=2)
    assert [len(group) for group in groups] == [2, 2]


# ----------------------------------------------------------------------------------------------------------------------
# Processes


def split_step(local: int):
    """A step of a model split among eight processes, `local` of them a node, and a whole model out of the pieces."""
    with fake_gpu.processes(world=8, local=local):
        with fake_gpu.gpus():
            parallel = start_parallel()
            assert parallel == Parallel(0, 8, GPU)
            sharding = make_sharding(ParallelConfig(), parallel)
        assert sharding.mesh.device_type == "cuda"
        assert sharding.mesh.shape == ((8,) if local == 8 else (8 // local, local))
        policy, launched = rl_step("rl.kl_coef=0", parallel=parallel, sharding=sharding)
        assert all(isinstance(parameter, DTensor) for parameter in policy.model.parameters())
        assert "_delta_kernel" in launched
        with on_gpus():
            whole = {name: tensor.shape for name, tensor in full_parameters(policy.model, torch.bfloat16)}
        assert whole["model.embed_tokens.weight"] == (len(tokenizer()) + 3, 64)


def test_a_model_split_in_one():
    """Over all processes, gathered and reduced in mixed precision."""
    split_step(local=8)


def test_a_model_split_in_two():
    """Inside a node, copied between two of them."""
    split_step(local=4)


def test_sums_over_processes():
    with fake_gpu.processes(), on_gpus():
        parallel = start_parallel()
        assert parallel.sum([1.0, 2.0]) == [1.0, 1.0] and parallel.max(1) == 1  # what a fake device answers
        layer = torch.nn.Linear(2, 2, device=GPU)
        sum_gradients(layer, parallel)
        assert layer.weight.grad.device == GPU


def test_more_processes_than_gpus():
    with fake_gpu.gpus(num_gpus=2), mock.patch.dict(os.environ, {"LOCAL_RANK": "2"}):
        with pytest.raises(ParallelError, match="has no GPU: there are 2"):
            start_parallel()


def test_backends_and_fingerprints():
    def query(dtype, size):
        return torch.empty(4, 2, size, dtype=dtype, device=GPU)

    with on_gpus():
        assert pick_backend(query(torch.bfloat16, 64)) == "cuda"
        with mock.patch.object(torch.version, "hip", "7.0"):
            assert pick_backend(query(torch.bfloat16, 64)) == "concat"
        assert {pick_backend(query(*kind)) for kind in ((torch.float32, 64), (torch.float16, 68))} == {"concat"}
        assert fingerprint(torch.empty(3, 5, dtype=torch.bfloat16, device=GPU)).device == GPU
