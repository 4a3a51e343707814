"""What else asks for a GPU: the kernels' checks, the benchmarks, the encoder and the record of a run."""

import sys
from functools import partial
from types import SimpleNamespace
from unittest import mock

import fake_gpu
import pytest
import torch
from test_rehearse_training import GPU, on_gpus, tokenizer
from tiny_world import tiny_config, tiny_dataset

import rankgrpo.distill.stages as stages
from rankgrpo.evaluation.recommend import needs_no_engine
from rankgrpo.logprob import token_logprobs
from rankgrpo.loss import rank_grpo_loss
from rankgrpo.model.constraint import open_constraint
from rankgrpo.pipeline import describe_machine
from rankgrpo_kernels.linear_logprob import fused_token_logprobs
from rankgrpo_kernels.rank_ratio import fused_rank_grpo_loss

QWEN = (151_936, 896)
# A generator on a GPU needs one; fake tensors draw nothing.
NO_GENERATOR = mock.patch.object(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))


def head(num_rows=130, num_ids=1000, num_hidden=72, dtype=torch.bfloat16, function=fused_token_logprobs, **options):
    hidden = torch.empty(num_rows, num_hidden, dtype=dtype, device=GPU, requires_grad=True)
    weight = torch.empty(num_ids, num_hidden, dtype=torch.float32, device=GPU, requires_grad=True)
    ids = torch.empty(num_rows, dtype=torch.int64, device=GPU)
    return function(hidden, weight, ids, **options), (hidden, weight)


def loss(
    num_tokens=300, num_ranks=20, dtype=torch.float32, rank_dtype=torch.int64, function=fused_rank_grpo_loss, **options
):
    num_lists = 3
    logp = torch.empty(num_tokens, num_lists, dtype=dtype, device=GPU).t().requires_grad_()
    rank = torch.empty(num_lists, num_tokens, dtype=rank_dtype, device=GPU)
    advantage = torch.empty(num_lists, num_ranks, device=GPU)
    tensors = {key: torch.empty_like(logp) for key in ("ref_logp_BT",) if options.pop("with_ref", False)}
    return function(logp, logp.detach(), rank, advantage, **tensors, **options)[0], logp


def test_the_kernels_at_every_kind_of_input():
    with on_gpus() as launched:
        for options in ({}, {"temperature": 0.7, "soft_cap": 30.0}, {"dtype": torch.float32, "num_hidden": 64}):
            allowed = torch.empty(1000, dtype=torch.bool, device=GPU)
            logp, (hidden, weight) = head(allowed_V=allowed, **options)
            logp.sum().backward()
            assert hidden.grad.dtype == hidden.dtype and weight.grad.shape == weight.shape
        head(1840, *QWEN, function=partial(token_logprobs, impl="triton"))[0].sum().backward()
        for options in (
            {"with_ref": True, "kl_coef": 0.1, "dtype": torch.bfloat16, "rank_dtype": torch.int16},
            {"reduction": "token", "num_tokens": 5000},
            {"function": partial(rank_grpo_loss, impl="triton")},
            {"denominator": torch.empty((), device=GPU), "weight_BK": torch.empty(3, 20, device=GPU)},
        ):
            value, logp = loss(**options)
            value.backward()
            assert logp.grad.dtype == logp.dtype
    assert {"_forward_kernel", "_delta_kernel", "forward_kernel", "backward_kernel"} == set(launched)
    with on_gpus(number=0) as launched:  # no row has a gradient
        head()[0].sum().backward()
    assert launched == ["_forward_kernel"]


def test_what_the_kernels_refuse():
    def weights(**options):
        return {"weight_BK": torch.empty(3, 20, **options)}

    refused = [
        (lambda: loss(weight_BK=torch.empty(2, 20, device=GPU)), "weight_BK must have shape"),
        (lambda: loss(**weights()), "must be on cuda"),
        (lambda: loss(**weights(device=GPU, dtype=torch.int64)), "floating point"),
        (lambda: loss(reduction="list"), "reduction"),
        (lambda: loss(kl_coef=-1.0), "kl_coef must be"),
        (lambda: loss(kl_coef=0.1), "needs ref_logp_BT"),
        (lambda: loss(denominator=0.0), "denominator must be"),
        (lambda: loss(denominator=torch.empty(2, device=GPU)), "0-dim"),
        (lambda: head(dtype=torch.float16), "must be float32 or bfloat16"),
        (lambda: head(temperature=0.0), "temperature"),
        (lambda: head(soft_cap=-1.0), "soft_cap"),
        (lambda: head(allowed_V=torch.empty(7, dtype=torch.bool, device=GPU)), "allowed_V"),
    ]

    def tensors(*shapes, device=GPU):
        return [torch.empty(shape, device=device) for shape in shapes]

    def rank():
        return torch.empty(2, 3, dtype=torch.int64, device=GPU)

    refused += [
        (lambda: fused_token_logprobs(*tensors((2, 3), (4, 3), 2, device="cpu")), "needs tensors on a CUDA device"),
        (lambda: fused_token_logprobs(*tensors((2, 3), (4, 5), 2)), r"must be \(N, D\)"),
        (lambda: fused_token_logprobs(*tensors((2, 3), (4, 3), 2)), "ids_N must be integer"),
        (lambda: fused_token_logprobs(*tensors((2, 3), (4, 3)), torch.empty(2, dtype=torch.int64)), "must be on cuda"),
        (lambda: fused_token_logprobs(*tensors((2, 3), (4, 3)), rank()[:, 0], allowed_V=rank()[0]), "must be bool"),
        (lambda: fused_token_logprobs(*tensors((2, 3), (4, 3)), rank()[:, 0], temperature=-1.0), "temperature must be"),
        (lambda: fused_rank_grpo_loss(*tensors(2, 2, device="cpu"), rank(), None), "needs tensors on a CUDA device"),
        (lambda: fused_rank_grpo_loss(*tensors(2, 2), rank(), rank()), "must be"),
    ]
    with on_gpus() as launched:
        for call, message in refused:
            with pytest.raises(ValueError, match=message):
                call()
    assert launched == []


def test_timing_and_memory_of_the_kernels_benchmarks():
    from rankgrpo_kernels.bench import allowed_logprob, common, linear_logprob, rank_ratio

    with on_gpus() as launched:
        assert common.machine_line(GPU).startswith("H200, 139 GiB, 132 multiprocessors, CUDA")
        timings = common.measure({"nothing": lambda: None}, GPU, budget_s=1e-5)
        assert timings["nothing"].median_ms == 1.0 and timings["nothing"].wall_ms is not None
        assert common.peak_extra_bytes(lambda: None, GPU) == 2 * fake_gpu.GIB
        assert common.copy_gb_per_s(GPU) > 0
        with mock.patch.object(sys, "argv", ["bench"]):
            assert common.make_parser("text", "example", ()).parse_args([]).device == "cuda"
        with NO_GENERATOR:
            inputs = linear_logprob.make_inputs(64, 512, 72, 0.5, GPU)
            assert inputs.hidden_ND.dtype == torch.bfloat16
            loss_inputs = rank_ratio.make_inputs(4, 32, 5, True, GPU)
        passes = rank_ratio.passes_of(rank_ratio.make_losses(GPU, ["triton"])["triton"], loss_inputs, 0.1)
        passes["both"]()
        leaf = torch.empty(2, device=GPU, requires_grad=True)
        assert allowed_logprob.workspace_mb(lambda: leaf * 2, [leaf], torch.empty(2, device=GPU), GPU) > 0
        hidden_ids = inputs.hidden_ND, inputs.weight_VD, inputs.ids_N
        linear_logprob.make_heads(["triton"])["triton"](*hidden_ids)
    assert launched == ["forward_kernel", "backward_kernel", "_forward_kernel"]


def test_the_update_benchmark_and_those_of_steps_and_sync():
    with mock.patch.object(sys, "path", [str(fake_gpu.ROOT / "experiments/bench"), *sys.path]):  # as scripts find them
        from rankgrpo_experiments.bench import step, sync, update

    with on_gpus():
        model = update.make_model(update.Shape(64, 1, 4, 2, 96, 512), GPU, torch.bfloat16)
        groups = [update.Group([1, 2, 3], [[4, 5], [6]])]
        weights = [[torch.zeros(2), torch.zeros(1)]]
        assert update.packed_step(model, groups, weights, 64) == 1.0
        wall, _ = update.seconds(lambda: None, GPU)
        assert wall >= 0
        with mock.patch.object(sys, "argv", ["update.py"]):
            assert update.parse_args().device == "cuda"
        assert set(sync.seconds(lambda: None, 1)) == {"median_s", "fastest_s"}
        step.Bench._wait(SimpleNamespace(policy=SimpleNamespace(device=GPU)))


def test_the_head_over_allowed_ids_is_timed_on_the_device():
    from rankgrpo_kernels.bench import allowed_logprob

    trie = open_constraint(tiny_dataset().catalog, tokenizer(), num_ranks=3, forbid="repeats").trie
    lists, size = [trie.list_ids([0, 1, 2])], (len(tokenizer()), 64)
    patched = {
        "errors_of": lambda *_: {},
        "timed_pass": lambda head, grad, clock: (clock() - clock(), 0.0 * len(head())),
    }
    # Without backward: fake tensors do not add the sparse gradient of some rows to a whole one.
    with on_gpus(), NO_GENERATOR, mock.patch.multiple(allowed_logprob, **patched):
        rows = allowed_logprob.bench(["new", "plan"], trie, lists, size, GPU, 1e-9)
    assert [row["provider"] for row in rows] == ["new", "plan"]


def test_the_encoder_goes_to_the_gpu():
    seen = []

    def encode(name, texts, device):
        seen.append(device.type)
        return torch.zeros(len(texts), 2)

    config = SimpleNamespace(encoder="folder", encoder_model=None)
    with fake_gpu.gpus(), mock.patch.object(stages, "encode_with_transformer", encode):
        rows, contexts = stages.encode(config, ["a", "b"], ["c"], num_catalog=2)
    assert seen == ["cuda"] and (len(rows), len(contexts)) == (2, 1)


def test_the_machine_in_the_record():
    with fake_gpu.gpus(num_gpus=2):
        assert describe_machine()["machine"] == "H200, H200"
        assert not needs_no_engine(tiny_config())
