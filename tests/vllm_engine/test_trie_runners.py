"""The newer runner's own classes around the processor for it, as far as they go without a GPU.

Its state of requests, its loader and its sampler's pipeline are vLLM's; two kernels are replaced by what they say.
"""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_world import tiny_dataset
from world import make_model

from rankgrpo.model.constraint import open_constraint
from rankgrpo.sampler.vllm import import_vllm
from rankgrpo.sampler.vllm_trie import RowLists, SlotLists, processor_class, request_arguments

PROMPT, SLOTS, TEMPERATURE = [7, 8, 9], 4, 0.7


@pytest.fixture(scope="module")
def constraint():
    _, tokenizer = make_model(tied=True)
    return open_constraint(tiny_dataset().catalog, tokenizer, num_ranks=3, forbid="repeats+seen")


def processor_for(constraint, *, newer_runner):
    """What the engine would be given by a vLLM whose configuration says so."""
    vllm = import_vllm()
    config = SimpleNamespace(create_engine_config=lambda: SimpleNamespace(use_v2_model_runner=newer_runner))
    stand_in = SimpleNamespace(__version__=vllm.__version__, EngineArgs=lambda **_: config)
    return processor_class(stand_in, {}, constraint)


def test_each_runner_accepts_its_own_processor_and_refuses_the_others(constraint):
    from vllm.v1.sample.logits_processor import cached_load_custom_logitsprocs
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator

    rows, slots = (processor_for(constraint, newer_runner=newer) for newer in (False, True))
    assert issubclass(rows, RowLists) and issubclass(slots, SlotLists)
    assert cached_load_custom_logitsprocs((rows,)) == [rows]
    build_custom_logits_processors_params_validator([slots])(None)
    with pytest.raises(ValueError, match="not a subclass of"):
        build_custom_logits_processors_params_validator([rows])
    with pytest.raises(ValueError, match="not a subclass of"):
        cached_load_custom_logitsprocs((slots,))


def test_the_runner_is_read_from_vllms_configuration(constraint, tmp_path):
    """On a CPU: V1."""
    model, _ = make_model(tied=True)
    model.config.save_pretrained(tmp_path)
    arguments = {"model": str(tmp_path), "load_format": "dummy", "skip_tokenizer_init": True, "enforce_eager": True}
    assert issubclass(processor_class(import_vllm(), arguments, constraint), RowLists)


@pytest.fixture
def runner(monkeypatch, constraint):
    """The state and the sampler of the newer runner, with the processor that its loader makes of ours."""
    from vllm.v1.worker.gpu import buffer_utils
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.states import RequestState

    def apply_write(self):
        begin = 0
        for row, start, end in zip(
            self._staged_write_indices, self._staged_write_starts, self._staged_write_cu_lens, strict=True
        ):
            content = torch.tensor(self._staged_write_contents[begin:end], dtype=self.dtype)
            self.gpu.view(self.num_rows, -1)[row, start : start + end - begin] = content
            begin = end
        self.clear_staged_writes()

    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)
    monkeypatch.setattr(buffer_utils.StagedWriteTensor, "apply_write", apply_write)
    states = RequestState(SLOTS, 200, 64, 0, 1024, torch.device("cpu"))
    made = build_custom_logits_processors(None, states, False, [processor_for(constraint, newer_runner=True)])
    sampler = Sampler.__new__(Sampler)
    idle = SimpleNamespace(
        add_request=lambda *_: False, apply_staged_writes=lambda: None, apply=lambda logits, ctx: logits
    )
    temperature = SimpleNamespace(
        **vars(idle),
        apply_temperature=lambda logits, *_: logits.div_(TEMPERATURE),
        apply_min_p=lambda *_: None,
    )
    parts = {"thinking_budget_state": idle, "logprob_token_ids_state": idle, "trace_replay_state": None}
    parts |= {"sampling_states": temperature, "logits_processors": made}
    parts |= {"needs_logits_processing": np.zeros(SLOTS, bool)}
    vars(sampler).update(parts)
    return states, sampler


def step(states, sampler, batch, vocab):
    """Logits, and what the sampler makes of them, of one step for the requests of `batch`, in that order."""
    states.apply_staged_writes()
    sampler.apply_staged_writes()
    slots = np.array([states.req_id_to_index[name] for name in batch], np.int32)
    mapping = torch.from_numpy(slots)
    logits = torch.randn(len(batch), vocab)
    lengths = states.total_len.gpu[mapping.long()]
    processed = sampler.apply_sampling_params(
        logits, mapping, mapping, slots, lengths - 1, lengths, mapping * 0, lengths.numpy(), skip_top_k_top_p=True
    )
    return logits, processed


@pytest.mark.parametrize("seed", range(3))
def test_in_the_newer_runners_pipeline(runner, constraint, seed):
    vllm = import_vllm()
    states, sampler = runner
    rng = random.Random(seed)
    walks, output, put_off, finished = {}, {}, [], []
    names = iter(f"request {i}" for i in range(1000))
    for _ in range(200):
        for name in [name for name in states.req_id_to_index if walks[name].done]:
            states.remove_request(name)
            finished.append(name)
        if states.num_reqs and rng.random() < 0.1:
            put_off.append(rng.choice(list(states.req_id_to_index)))
            states.remove_request(put_off[-1])
        while states.free_indices and rng.random() < 0.7:
            if put_off and rng.random() < 0.5:
                name = put_off.pop()
            else:
                name = next(names)
                seen = rng.sample(range(600), rng.choice([0, 4, 595]))
                walks[name], output[name] = constraint.start(seen), (seen, [])
            seen, ids = output[name]
            states.add_request(name, len(PROMPT), PROMPT + ids, 0, 100)
            params = vllm.SamplingParams(extra_args=request_arguments(seen))
            sampler.add_request(states.req_id_to_index[name], params)
        batch = rng.sample(list(states.req_id_to_index), states.num_reqs)
        if not batch:
            continue
        logits, processed = step(states, sampler, batch, 1024)
        for row, name in enumerate(batch):
            allowed = torch.from_numpy(walks[name].allowed()).long()
            logp_V = processed[row].log_softmax(-1)
            assert logp_V.isfinite().nonzero().flatten().tolist() == allowed.tolist()
            torch.testing.assert_close(logp_V[allowed], (logits[row, allowed] / TEMPERATURE).log_softmax(-1))
            token_id = rng.choice(allowed.tolist())
            walks[name].advance(token_id)
            output[name][1].append(token_id)
            slot = states.req_id_to_index[name]
            states.all_token_ids.gpu[slot, states.total_len.gpu[slot]] = token_id
            states.total_len.gpu[slot] += 1
    assert len(finished) > 5


def test_vllms_own_warm_up_is_left_alone(runner):
    vllm = import_vllm()
    states, sampler = runner
    states.add_request("warm-up", 3, [1, 2, 3], 0, 10)
    sampler.add_request(states.req_id_to_index["warm-up"], vllm.SamplingParams())
    logits, processed = step(states, sampler, ["warm-up"], 1024)
    assert processed is logits
