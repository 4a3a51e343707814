"""Two processes that share one engine held to the catalog, each with requests of its own; torchrun starts it."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
from tiny_world import tiny_dataset
from world import MAX_PROMPT, make_model, prompts_of

from rankgrpo.model.attention import use_shared_prefix
from rankgrpo.model.constraint import open_constraint
from rankgrpo.model.head import valid_token_mask
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import Policy
from rankgrpo.runtime.distributed import leave_parallel, start_parallel
from rankgrpo.sampler.sync import different_tensors, sync_weights
from rankgrpo.sampler.vllm import EngineConfig, VLLMSampler

if __name__ == "__main__":
    parallel = start_parallel()
    model, tokenizer = make_model(tied=True)
    constraint = open_constraint(tiny_dataset().catalog, tokenizer, num_ranks=3, forbid="repeats+seen")
    config = EngineConfig(max_tokens=MAX_PROMPT + constraint.max_tokens, rows=6, tensor_parallel=2)
    allowed_V = valid_token_mask(model, tokenizer)
    sampler = VLLMSampler(model, tokenizer, config, parallel, allowed_V=allowed_V, constraint=constraint)
    sync_weights(sampler, model)
    assert different_tensors(sampler, model) == []
    use_shared_prefix(model)
    policy = Policy(model, tokenizer, allowed_V, False, constraint=constraint)
    mine = slice(0, 2) if parallel.dp_rank == 0 else slice(2, 3)
    prompts, seeds, seen = prompts_of(tokenizer)[mine], [1, 2, 3][mine], [[], [5, 6], list(range(590))][mine]
    groups = sampler.sample(prompts, group_size=4, seeds=seeds, max_new_tokens=1, temperature=0.7, seen=seen)
    for prompt, rollouts, items in zip(prompts, groups, seen, strict=True):
        group = Group(prompt, [rollout.token_ids for rollout in rollouts], tuple(items))
        assert not {i for named in constraint.choices([group]).items for i in named} & set(items)
        with torch.no_grad():
            pack, logp_BT = policy.logprobs([group], temperature=0.7)
        sampled = torch.tensor([value for rollout in rollouts for value in rollout.logp])
        torch.testing.assert_close(sampled, logp_BT[pack.mask_BT], atol=5e-5, rtol=0)
    print(f"process {parallel.dp_rank}: {len(groups)} groups as the trainer has them")
    leave_parallel()
