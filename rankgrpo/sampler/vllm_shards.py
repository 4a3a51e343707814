"""One vLLM engine that several processes share: each calls it with the requests of all, and holds part of a tensor."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from rankgrpo.runtime.distributed import Parallel


def share_requests(
    parallel: Parallel, size: int, prompts: list, seeds: list, seen: list
) -> tuple[list, list, list, slice]:
    """The requests of the `size` processes of an engine, in one order for all of them, and where this process's are."""
    if size == 1:
        return prompts, seeds, seen, slice(0, len(prompts))
    first = parallel.dp_rank // size * size
    texts = parallel.gather([json.dumps([prompts, seeds, seen])])[first : first + size]
    parts = [json.loads(text) for (text,) in texts]
    before = sum(len(part[0]) for part in parts[: parallel.dp_rank - first])
    prompts_of_all, seeds_of_all, seen_of_all = (sum((part[i] for part in parts), []) for i in range(3))
    return prompts_of_all, seeds_of_all, seen_of_all, slice(before, before + len(prompts))


def sum_of_shards(engine_model: nn.Module, names: list[str], own: Tensor) -> list[int | None]:
    """Of every parameter the fingerprint of the whole: the sum of its shards', or its own where it is not split."""
    from vllm.distributed import get_tp_group
    from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    total = own.clone()
    torch.distributed.all_reduce(total, group=get_tp_group().device_group)
    values: list[int | None] = []
    for name, alone, together in zip(names, own.tolist(), total.tolist(), strict=True):
        module_name, _, leaf = name.rpartition(".")
        module = engine_model.get_submodule(module_name)
        split = isinstance(module, ColumnParallelLinear | VocabParallelEmbedding)
        split |= isinstance(module, RowParallelLinear) and leaf == "weight"
        repeated = isinstance(module, QKVParallelLinear) and module.num_kv_head_replicas > 1
        values.append(None if repeated else together if split else alone)
    return values
