"""vLLM's logits processors over the trie without vLLM: what a runner does to them, against one walk a request."""

import random
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_world import ALONE, tiny_config, tiny_dataset

import rankgrpo.sampler.choose as choose
from rankgrpo.errors import SamplingError
from rankgrpo.model.constraint import open_constraint
from rankgrpo.model.policy import Policy
from rankgrpo.model.tiny import train_tokenizer
from rankgrpo.sampler.base import Rollout
from rankgrpo.sampler.vllm_trie import (
    PINNED,
    RowLists,
    SlotLists,
    check_lists,
    check_seen,
    describe_difference,
    mask_rows,
    processor_class,
    request_arguments,
)

NUM_RANKS, MAX_REQUESTS, PROMPT = 3, 6, [7, 8, 9]


@cache
def tokenizer():
    return train_tokenizer(tiny_dataset(), 1024)


@cache
def constraint(forbid="repeats+seen"):
    return open_constraint(tiny_dataset().catalog, tokenizer(), num_ranks=NUM_RANKS, forbid=forbid)


def processor(lists, *arguments):
    return type("Held", (lists,), {"constraint": constraint()})(*arguments)


@dataclass(eq=False)
class Request:
    """A request as a runner sees it, and the walk that says what may follow. Not held: one of vLLM's own."""

    held: bool
    seen: list[int]
    output_ids: list[int] = field(default_factory=list)
    slot: int = -1
    steps_after_end: int = 0

    def __post_init__(self):
        self.walk = constraint().start(self.seen)

    @property
    def params(self):
        return SimpleNamespace(extra_args=request_arguments(self.seen) if self.held else None)

    def draw(self, logits_V, rng):
        """Take an id at random of those with probability; after its end a list takes any."""
        token_id = rng.choice(logits_V.isfinite().nonzero().flatten().tolist())
        self.output_ids.append(token_id)
        if self.held and not self.walk.done:
            self.walk.advance(token_id)
        elif self.held:
            self.steps_after_end += 1
        return token_id


def new_request(rng):
    return Request(held=rng.random() < 0.8, seen=rng.sample(range(600), rng.choice([0, 3, 590])))


def new_logits(num_rows):
    return torch.randn(num_rows, len(tokenizer()))


def check_rows(masked_BV, original_BV, requests):
    for masked_V, original_V, request in zip(masked_BV, original_BV, requests, strict=True):
        if request.held and not request.walk.done:
            allowed = torch.from_numpy(request.walk.allowed()).long()
            assert masked_V.isfinite().nonzero().flatten().tolist() == allowed.tolist()
            assert torch.equal(masked_V[allowed], original_V[allowed])
        else:
            assert torch.equal(masked_V, original_V)


def ended(request):
    """A runner that plans ahead notices the end of a list a step late; one of vLLM's own stops somewhere."""
    return request.steps_after_end == 1 or (not request.held and len(request.output_ids) > 8)


# ----------------------------------------------------------------------------------------------------------------------
# V1: rows


class Direction(Enum):
    UNIDIRECTIONAL = 0
    SWAP = 1


@pytest.mark.parametrize("seed", range(4))
def test_rows_follow_requests_that_come_go_and_move(seed):
    rng = random.Random(seed)
    held = processor(RowLists, None, "cpu", False)
    assert not held.is_argmax_invariant()
    batch: list[Request] = []
    finished = 0
    for _ in range(150):
        removed = [row for row, request in enumerate(batch) if ended(request) or rng.random() < 0.01]
        finished += sum(batch[row].walk.done for row in removed)
        rows: dict[int, Request] = {row: request for row, request in enumerate(batch) if row not in removed}
        added, moved, free = [], [], sorted(removed)
        while len(rows) < MAX_REQUESTS and rng.random() < 0.6:
            row = free.pop(0) if free else len(batch) + len(added) - (len(removed) - len(free))
            rows[row] = new_request(rng)
            added.append((row, rows[row].params, PROMPT, rows[row].output_ids))
        while free and free[0] < max(rows, default=-1):  # the last request fills the gap
            last, row = max(rows), free.pop(0)
            rows[row] = rows.pop(last)
            moved.append((last, row, Direction.UNIDIRECTIONAL))
        if len(rows) > 1 and rng.random() < 0.3:
            one, other = rng.sample(sorted(rows), 2)
            rows[one], rows[other] = rows[other], rows[one]
            moved.append((one, other, Direction.SWAP))
        assert sorted(rows) == list(range(len(rows)))
        batch = [rows[row] for row in range(len(rows))]
        update = SimpleNamespace(removed=[row for row in removed if row in free], added=added, moved=moved)
        held.update_state(update if removed or added or moved else None)
        original = new_logits(len(batch))
        logits = original.clone()
        assert held.apply(logits) is logits
        check_rows(logits, original, batch)
        for request, logits_V in zip(batch, logits, strict=True):
            request.draw(logits_V, rng)
    assert finished > 5


def test_a_request_put_off_comes_back_with_its_ids():
    held = processor(RowLists, None, "cpu", False)
    request = Request(True, [])
    ids = constraint().trie.list_ids([5, 3, 8])
    for token_id in ids[:7]:
        request.walk.advance(token_id)
    update = SimpleNamespace(removed=[], added=[(0, request.params, PROMPT, list(ids[:7]))], moved=[])
    held.update_state(update)
    logits = new_logits(1)
    check_rows(held.apply(logits.clone()), logits, [request])


# ----------------------------------------------------------------------------------------------------------------------
# V2: slots


def new_states():
    total = torch.zeros(MAX_REQUESTS, dtype=torch.int32)
    ids = torch.full((MAX_REQUESTS, 200), -7, dtype=torch.int32)
    lengths = SimpleNamespace(np=np.zeros(MAX_REQUESTS, np.int32))
    return SimpleNamespace(
        total_len=SimpleNamespace(gpu=total), all_token_ids=SimpleNamespace(gpu=ids), prompt_len=lengths
    )


def enter(held, states, request, slot):
    """As the runner does it: the request's own ids first, then the processors hear of it."""
    request.slot = slot
    known = PROMPT + request.output_ids
    states.prompt_len.np[slot] = len(PROMPT)
    states.total_len.gpu[slot] = len(known)
    states.all_token_ids.gpu[slot, : len(known)] = torch.tensor(known, dtype=torch.int32)
    assert held.add_request(slot, request.params) == request.held


@pytest.mark.parametrize("seed", range(4))
def test_slots_are_read_from_the_device(seed):
    rng = random.Random(seed)
    states = new_states()
    held = processor(SlotLists, None, states)
    active: list[Request] = []
    waiting: list[Request] = []
    finished = 0
    for _ in range(200):
        for request in [request for request in active if ended(request)]:
            active.remove(request)
            finished += request.walk.done
        if active and rng.random() < 0.1:  # put off, to come back into another slot
            waiting.append(active.pop(rng.randrange(len(active))))
        free = [slot for slot in range(MAX_REQUESTS) if all(request.slot != slot for request in active)]
        while free and rng.random() < 0.6:
            request = waiting.pop() if waiting and rng.random() < 0.5 else new_request(rng)
            enter(held, states, request, free.pop(rng.randrange(len(free))))
            active.append(request)
        held.apply_staged_writes()
        batch = rng.sample(active, rng.randint(0, len(active)))  # in any order, and not all of them at every step
        original = new_logits(len(batch))
        logits = original.clone()
        slots = np.array([request.slot for request in batch], np.int32)
        assert held.apply(logits, SimpleNamespace(idx_mapping_np=slots)) is logits
        check_rows(logits, original, batch)
        for request, logits_V in zip(batch, logits, strict=True):
            if rng.random() < 0.1:  # part of a long prompt was read: what is drawn is thrown away
                continue
            length = int(states.total_len.gpu[request.slot])
            states.all_token_ids.gpu[request.slot, length] = request.draw(logits_V, rng)
            states.total_len.gpu[request.slot] += 1
    assert finished > 5


def test_a_runner_that_holds_no_lists_pays_nothing():
    held = processor(SlotLists, None, None)  # nothing is read of the device
    held.apply_staged_writes()
    logits = new_logits(2)
    assert held.apply(logits, SimpleNamespace(idx_mapping_np=np.array([0, -1]))) is logits


# ----------------------------------------------------------------------------------------------------------------------
# The mask, and lists that are not what they should be


def test_a_forced_id_has_log_prob_zero_and_others_are_renormalised():
    ids = constraint().trie.list_ids([5, 3, 8])
    walk, logits = constraint().start(), new_logits(len(ids))
    for row, token_id in enumerate(ids):
        allowed = torch.from_numpy(walk.allowed()).long()
        logp_V = (mask_rows(constraint(), logits[row : row + 1].clone(), [0], [walk])[0] / 0.7).log_softmax(-1)
        expected = (logits[row, allowed] / 0.7).log_softmax(-1)
        torch.testing.assert_close(logp_V[allowed], expected)
        if len(allowed) == 1:
            assert logp_V[token_id] == 0.0
        walk.advance(token_id)


def test_a_list_that_left_the_trie_goes_on_and_is_an_error_at_its_end():
    held = processor(RowLists, None, "cpu", False)
    request = Request(True, [])
    held.update_state(SimpleNamespace(removed=[], added=[(0, request.params, PROMPT, request.output_ids)], moved=[]))
    request.output_ids += [3, 3]
    logits = new_logits(1)
    assert torch.equal(held.apply(logits.clone()), logits)
    stray = [[Rollout([3, 3], [-1.0, -1.0], "", False)]]
    with pytest.raises(SamplingError, match="vLLM did not keep to the catalog: list 0, token 0: id 3 is not allowed"):
        check_lists(constraint(), [PROMPT], stray, [[]])


def test_lists_are_checked():
    trie = constraint().trie

    def check(items, seen=(), cut=0, finished=True):
        ids = trie.list_ids(items)
        rollout = Rollout(ids[: len(ids) - cut], [0.0] * (len(ids) - cut), "", finished)
        check_lists(constraint(), [PROMPT], [[rollout]], [list(seen)])

    check([1, 2, 3])
    with pytest.raises(SamplingError, match="not keep to the catalog"):
        check([1, 2, 1])
    with pytest.raises(SamplingError, match="not keep to the catalog"):
        check([1, 2, 3], seen=[2])
    with pytest.raises(SamplingError, match="cut a list short of its end, which .* tokens are enough for"):
        check([1, 2, 3], cut=1, finished=False)


def test_seen_items():
    assert check_seen(None, [PROMPT], None) == [[]]
    assert check_seen(constraint(), [PROMPT, PROMPT], [np.array([3, 4]), ()]) == [[3, 4], []]
    with pytest.raises(ValueError, match="of each prompt, 1, got 2"):
        check_seen(constraint(), [PROMPT], [[], []])
    with pytest.raises(ValueError, match="2 of 600 are left"):
        check_seen(constraint(), [PROMPT], [range(598)])


def test_engines_are_shared_by_equal_catalogs_alone():
    catalog = tiny_dataset().catalog
    again = open_constraint(catalog, tokenizer(), num_ranks=NUM_RANKS, forbid="repeats+seen")
    assert again is not constraint() and choose.same_lists(again, constraint())
    assert choose.same_lists(None, None) and not choose.same_lists(None, again) and not choose.same_lists(again, None)
    assert not choose.same_lists(again, constraint("repeats"))
    longer = open_constraint(catalog, tokenizer(), num_ranks=NUM_RANKS + 1, forbid="repeats+seen")
    assert not choose.same_lists(again, longer)
    other = type(catalog)(catalog.items[:-1])
    assert not choose.same_lists(again, open_constraint(other, tokenizer(), num_ranks=NUM_RANKS, forbid="repeats+seen"))


def test_an_engine_is_opened_for_a_constraint_and_holds_its_longest_list(monkeypatch):
    made = []

    def engine(model, tokenizer, config, parallel, **options):
        made.append((config.max_tokens, options["constraint"]))
        return object()

    monkeypatch.setattr(choose, "VLLMSampler", engine)
    monkeypatch.setattr(choose, "_engines", [])
    model = SimpleNamespace(config=SimpleNamespace(to_dict=dict))
    again = open_constraint(tiny_dataset().catalog, tokenizer(), num_ranks=NUM_RANKS, forbid="repeats+seen")
    config = tiny_config("rl.sampler=vllm", "data.max_prompt_tokens=100")
    held, free, same, other = (
        choose.open_sampler(Policy(model, None, torch.ones(4).bool(), False, constraint=which), config, ALONE)
        for which in (constraint(), None, again, constraint("repeats"))
    )
    assert held is same and held is not free and other not in (held, free)
    longest = 100 + constraint().max_tokens
    assert made == [(longest, constraint()), (100 + config.rl.max_new_tokens, None), (longest, constraint("repeats"))]


# ----------------------------------------------------------------------------------------------------------------------
# Which processor an engine gets


class RowBase(ABC):
    @abstractmethod
    def __init__(self, vllm_config, device, is_pin_memory): ...

    @abstractmethod
    def is_argmax_invariant(self): ...

    @abstractmethod
    def update_state(self, batch_update): ...

    @abstractmethod
    def apply(self, logits): ...


class SlotBase(ABC):
    def __init__(self, vllm_config, req_states):  # noqa: B027
        pass

    def add_request(self, req_idx, sampling_params):
        return True

    def apply_staged_writes(self):  # noqa: B027
        pass

    @abstractmethod
    def apply(self, logits, ctx): ...


@dataclass
class BatchUpdate:
    batch_size: int
    removed: list
    added: list
    moved: list


@dataclass
class State:
    all_token_ids: object
    prompt_len: object
    total_len: object


@dataclass
class Context:
    idx_mapping_np: object


def pretend(monkeypatch, newer_runner, **names):
    """A vllm with these names in its two modules for processors."""
    rows = {"LogitsProcessor": RowBase, "BatchUpdate": BatchUpdate}
    slots = {"LogitsProcessor": SlotBase, "LogitsProcRequestState": State, "LogitsContext": Context}
    for path, content in (
        ("vllm.v1.sample.logits_processor", rows | names.get("rows", {})),
        ("vllm.v1.worker.gpu.sample.logits_processor", slots | names.get("slots", {})),
    ):
        for end in range(1, path.count(".") + 1):
            parent = ".".join(path.split(".")[:end])
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        module = types.ModuleType(path)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, path, module)
    config = SimpleNamespace(use_v2_model_runner=newer_runner) if newer_runner is not None else SimpleNamespace()
    asked = []

    def engine_args(**arguments):
        asked.append(arguments)
        return SimpleNamespace(create_engine_config=lambda: config)

    return SimpleNamespace(__version__="0.32.9", EngineArgs=engine_args, asked=asked)


@pytest.mark.parametrize(("newer", "lists", "base"), [(False, RowLists, RowBase), (True, SlotLists, SlotBase)])
def test_the_runner_that_vllm_takes_decides(monkeypatch, newer, lists, base):
    vllm = pretend(monkeypatch, newer)
    made = processor_class(vllm, {"model": "x"}, constraint())
    assert issubclass(made, base) and issubclass(made, lists) and made.constraint is constraint()
    made(*[None] * (2 if newer else 3))  # no method is missing
    (asked,) = vllm.asked
    assert asked["model"] == "x"
    # With a processor: older versions take V1 for its sake.
    assert issubclass(asked["logits_processors"][0], RowBase)


class RenamedApply(RowBase):
    def apply(self, logits, ctx): ...


class AsksForMore(SlotBase):
    @abstractmethod
    def remove_request(self, req_idx): ...


@pytest.mark.parametrize(
    ("newer", "names", "difference"),
    [
        (False, {"rows": {"LogitsProcessor": RenamedApply}}, r"RenamedApply.apply takes \['self', 'logits', 'ctx'\]"),
        (False, {"rows": {"BatchUpdate": Context}}, r"Context has no \['added', 'moved', 'removed'\]"),
        (True, {"slots": {"LogitsProcessor": RowBase}}, "RowBase.__init__ takes"),
        (True, {"slots": {"LogitsProcessor": AsksForMore}}, r"AsksForMore asks for \['remove_request'\]"),
        (True, {"slots": {"LogitsProcRequestState": BatchUpdate}}, r"BatchUpdate has no \['all_token_ids', "),
        (None, {}, "no attribute 'use_v2_model_runner'"),
    ],
)
def test_another_interface_is_one_clear_error(monkeypatch, newer, names, difference):
    message = (
        rf"vLLM 0.32.9 cannot be held to the catalog.*{difference}.*pip install vllm=={PINNED}, or set rl.sampler=hf"
    )
    with pytest.raises(SamplingError, match=message):
        processor_class(pretend(monkeypatch, newer, **names), {}, constraint())


def test_a_runner_without_processors_is_one_too(monkeypatch):
    vllm = pretend(monkeypatch, True)
    monkeypatch.delattr(sys.modules["vllm.v1.worker.gpu.sample.logits_processor"], "LogitsContext")
    with pytest.raises(SamplingError, match="cannot be held to the catalog.*cannot import name 'LogitsContext'"):
        processor_class(vllm, {}, constraint())


def test_what_is_the_same_differs_in_nothing():
    assert describe_difference(RowLists, RowBase, {BatchUpdate: {"removed"}}) == ""
    assert describe_difference(SlotLists, SlotBase, {}) == ""
