"""Lists held to the catalog inside vLLM, through its own extension point: a logits processor.

At every step the allowed ids of each list keep their logits and all others get -inf, before temperature. What vLLM then
samples from, and reports as log-probs, is the policy's distribution over allowed ids: a forced id has exactly 0.0.

vLLM has two model runners whose processors have nothing in common but the name. `RowLists` is one for V1 (CPUs, and
GPUs without Triton), `SlotLists` one for V2 (GPUs). They are plain classes with the methods that vLLM calls;
`processor_class` puts the one that is needed on vLLM's own base class. The trie reaches it as an attribute of that
class and not by name through a registry: the engine lives in this process, nothing is pickled, and two engines cannot
take each other's catalog. What differs between requests, the items that a user has seen, travels in
SamplingParams.extra_args.
"""

# Shape letters: B rows of logits, V vocabulary, F allowed ids of all rows, S request slots.

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankgrpo.errors import SamplingError
from rankgrpo.items.walk import ListWalk
from rankgrpo.model.constraint import Constraint
from rankgrpo.model.packing import Group
from rankgrpo.sampler.base import Rollout

PINNED = "0.33.0"
"""The vLLM of pyproject.toml's extra."""
SEEN = "rankgrpo_seen"
# What the processors read of vLLM's records.
BATCH_FIELDS = {"removed", "added", "moved"}
STATE_FIELDS = {"all_token_ids", "prompt_len", "total_len"}
CONTEXT_FIELDS = {"idx_mapping_np"}


class HeldList:
    """A request's list: where it stands in the trie, and how many ids that takes account of."""

    __slots__ = ("num_read", "walk")

    def __init__(self, walk: ListWalk, num_read: int = 0):
        self.walk: ListWalk | None = walk
        """None for one that has left the trie."""
        self.num_read = num_read

    def read(self, new_ids: Sequence[int]) -> None:
        """Follow the ids drawn since the last time.

        Ids after the end are not read: where vLLM plans a step before it has seen the last one's ids, a list is drawn
        from once more than it goes on. One that was not allowed can come of broken weights alone. It must not be an
        error here, amid vLLM's step, which would leave its other requests behind in the engine: `check_lists` sees it.
        """
        self.num_read += len(new_ids)
        for token_id in new_ids:
            if self.walk is None or self.walk.done:
                return
            try:
                self.walk.advance(token_id)
            except ValueError:
                self.walk = None

    @property
    def goes_on(self) -> bool:
        return self.walk is not None and not self.walk.done


class RowLists:
    """The processor of V1: vLLM says which request is in which row, and shares the list of its output ids."""

    constraint: Constraint

    def __init__(self, vllm_config, device, is_pin_memory):
        self.lists: dict[int, tuple[HeldList, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """Tell vLLM that greedy lists need the mask too."""
        return False

    def update_state(self, batch_update) -> None:
        """Follow requests that left, came and changed rows, in the order that vLLM prescribes."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.lists.pop(row, None)
        for row, params, _, output_ids in batch_update.added:
            self.lists.pop(row, None)
            if (walk := start_walk(self.constraint, params)) is not None:
                self.lists[row] = (HeldList(walk), output_ids)
        for row, other_row, direction in batch_update.moved:
            moved, other = self.lists.pop(row, None), self.lists.pop(other_row, None)
            if moved is not None:
                self.lists[other_row] = moved
            if other is not None and direction.name == "SWAP":
                self.lists[row] = other

    def apply(self, logits: Tensor) -> Tensor:
        """Mask in place. The ids are read here, not in update_state: on GPUs they arrive after it."""
        rows, walks = [], []
        for row, (held, output_ids) in self.lists.items():
            held.read(output_ids[held.num_read :])
            if held.goes_on:
                rows.append(row)
                walks.append(held.walk)
        return mask_rows(self.constraint, logits, rows, walks)


class SlotLists:
    """The processor of V2: a request has a slot for life, its ids are on the device, rows change at every step.

    So the newest id of every slot is copied to the host each step, and the host waits for it. The copy is ordered
    before the forward pass and waited for after that was launched: what is waited for is the end of the step before,
    and the trie is walked while the device computes. Lost is vLLM's running further ahead than that.
    """

    constraint: Constraint

    def __init__(self, vllm_config, req_states):
        self.req_states = req_states
        self.lists: dict[int, HeldList] = {}
        self.newest_2S: Tensor | None = None
        """Of every slot: ids, prompt included, and the last of them."""
        self.copied: torch.cuda.Event | None = None

    def add_request(self, req_idx, sampling_params) -> bool:
        """Start the list of a slot; the slot may have been another request's."""
        self.lists.pop(req_idx, None)
        walk = start_walk(self.constraint, sampling_params)
        if walk is not None:
            self.lists[req_idx] = HeldList(walk, num_read=int(self.req_states.prompt_len.np[req_idx]))
        return walk is not None

    def apply_staged_writes(self) -> None:
        """Order the copy of the newest ids; vLLM calls this before each forward pass."""
        if not self.lists:
            return
        total_S = self.req_states.total_len.gpu
        last_S1 = self.req_states.all_token_ids.gpu.gather(1, (total_S.long() - 1).clamp(min=0)[:, None])
        self.newest_2S = torch.stack([total_S, last_S1[:, 0].to(total_S.dtype)]).to("cpu", non_blocking=True)
        if total_S.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()

    def apply(self, logits: Tensor, ctx) -> Tensor:
        """Mask in place the rows of the slots that hold lists."""
        slots = ctx.idx_mapping_np.tolist()
        assert len(slots) == len(logits), "a request has one row, for nothing is drafted"
        if self.newest_2S is None or self.lists.keys().isdisjoint(slots):
            return logits
        if self.copied is not None:
            self.copied.synchronize()
        total, last = self.newest_2S.tolist()
        rows, walks = [], []
        for row, slot in enumerate(slots):
            held = self.lists.get(slot)
            if held is None:
                continue
            num_new = total[slot] - held.num_read
            if num_new == 1:
                held.read([last[slot]])
            elif num_new > 1:  # the request was put off and goes on; a wait of its own, and rare
                held.read(self.req_states.all_token_ids.gpu[slot, held.num_read : total[slot]].tolist())
            if held.goes_on:
                rows.append(row)
                walks.append(held.walk)
        return mask_rows(self.constraint, logits, rows, walks)


def start_walk(constraint: Constraint, params) -> ListWalk | None:
    """The list of a request before its first id; None for those that are not this project's, as of vLLM's warm-up."""
    extra = params.extra_args
    return constraint.start(extra[SEEN]) if extra and SEEN in extra else None


def mask_rows(constraint: Constraint, logits_BV: Tensor, rows: list[int], walks: list[ListWalk]) -> Tensor:
    """Leave to the given rows the ids that their lists may go on with, in place; the other rows are not touched."""
    if not rows:
        return logits_BV
    batch = constraint.trie.allowed_batch(walks)
    device = logits_BV.device
    ids_F = torch.from_numpy(batch.ids_F).to(device).long()
    row_R = torch.tensor(rows, device=device)
    size_R = torch.from_numpy(np.diff(batch.start)).to(device)
    row_F = torch.repeat_interleave(row_R, size_R, output_size=len(batch.ids_F))
    kept_F = logits_BV[row_F, ids_F]
    # To take out, fill and put back costs a sixth of a new tensor.
    if len(rows) == len(logits_BV):
        logits_BV.fill_(float("-inf"))
    else:
        logits_BV.index_fill_(0, row_R, float("-inf"))
    logits_BV[row_F, ids_F] = kept_F
    return logits_BV


# ----------------------------------------------------------------------------------------------------------------------
# What the engine is given


def processor_class(vllm: ModuleType, arguments: dict[str, Any], constraint: Constraint) -> type:
    """The processor for the runner that vLLM takes with these arguments; SamplingError when it knows neither."""
    rows = on_base(vllm, RowLists, constraint)
    config = vllm.EngineArgs(**arguments, logits_processors=[rows]).create_engine_config()
    try:
        newer_runner = config.use_v2_model_runner
    except AttributeError as error:
        raise SamplingError(_unknown_interface(vllm, str(error))) from error
    return on_base(vllm, SlotLists, constraint) if newer_runner else rows


def request_arguments(seen: Sequence[int]) -> dict[str, list[int]]:
    """The extra_args of a request whose lists are held."""
    return {SEEN: list(seen)}


def check_seen(
    constraint: Constraint | None, prompts: list[list[int]], seen: Sequence[Sequence[int]] | None
) -> list[list[int]]:
    """The seen items of each prompt; ValueError, before the engine has a request, when they leave too few lines."""
    whole = [[] for _ in prompts] if seen is None else [list(map(int, items)) for items in seen]
    if len(whole) != len(prompts):
        raise ValueError(f"expected the seen items of each prompt, {len(prompts)}, got {len(whole)}")
    if constraint is not None:
        for items in whole:
            constraint.start(items)
    return whole


def check_lists(
    constraint: Constraint, prompts: list[list[int]], groups: list[list[Rollout]], seen: Sequence[Sequence[int]]
) -> None:
    """Raise SamplingError unless every list is whole and one that the trie allows."""
    try:
        constraint.choices(
            [
                Group(prompt, [rollout.token_ids for rollout in group], tuple(items))
                for prompt, group, items in zip(prompts, groups, seen, strict=True)
            ]
        )
    except ValueError as error:
        raise SamplingError(f"vLLM did not keep to the catalog: {error}; rl.sampler=hf samples without it") from error
    if not all(rollout.finished for group in groups for rollout in group):
        raise SamplingError(f"vLLM cut a list short of its end, which {constraint.max_tokens} tokens are enough for")


def check_ids(constraint: Constraint, allowed_V: Tensor) -> None:
    """Raise SamplingError when a line is written with an id that is masked, which sampler and trainer would part on."""
    ids = np.unique(constraint.trie.token[constraint.trie.token >= 0])
    masked = ids[~allowed_V.cpu().numpy()[ids]]
    if len(masked):
        raise SamplingError(f"the catalog's lines need ids that are masked: {masked[:8].tolist()}")


def on_base(vllm: ModuleType, lists: type, constraint: Constraint | None) -> type:
    """`lists` as a subclass of what vLLM wants; SamplingError where vLLM's interface is another.

    constraint: None where the instances find their own.
    """
    try:
        if lists is RowLists:
            from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

            records = {BatchUpdate: BATCH_FIELDS}
        else:
            from vllm.v1.worker.gpu.sample.logits_processor import (
                LogitsContext,
                LogitsProcessor,
                LogitsProcRequestState,
            )

            records = {LogitsProcRequestState: STATE_FIELDS, LogitsContext: CONTEXT_FIELDS}
    except ImportError as error:
        raise SamplingError(_unknown_interface(vllm, str(error))) from error
    if difference := describe_difference(lists, LogitsProcessor, records):
        raise SamplingError(_unknown_interface(vllm, difference))
    return type(f"Catalog{lists.__name__}", (lists, LogitsProcessor), {"constraint": constraint})


def describe_difference(own: type, base: type, records: dict[type, set[str]]) -> str:
    """How vLLM's processor differs from the one that `own` is written for; empty when it does not."""
    for name, method in vars(own).items():
        if not inspect.isfunction(method):
            continue
        if not inspect.isfunction(theirs := inspect.getattr_static(base, name, None)):
            return f"{base.__qualname__} has no method {name}"
        wanted, found = (list(inspect.signature(function).parameters) for function in (method, theirs))
        if wanted != found:
            return f"{base.__qualname__}.{name} takes {found}, not {wanted}"
    if missing := sorted(base.__abstractmethods__ - vars(own).keys()):
        return f"{base.__qualname__} asks for {missing}"
    for record, fields in records.items():
        if missing := sorted(fields - {field.name for field in dataclasses.fields(record)}):
            return f"{record.__qualname__} has no {missing}"
    return ""


def _unknown_interface(vllm: ModuleType, difference: str) -> str:
    return (
        f"vLLM {vllm.__version__} cannot be held to the catalog, its logits processors are not those of {PINNED} "
        f"({difference}): pip install vllm=={PINNED}, or set rl.sampler=hf, or rl.constrain=none"
    )
