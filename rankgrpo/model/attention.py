"""Shared-prefix attention: two passes that together equal dense causal attention over [prompt ; list], for every list.

Own pass: every prompt and every list over itself, causally. Cross pass: all lists of a group over their prompt, without
a mask, because every prompt token precedes every list token. For a list token with softmax normalisers Z_own, Z_cross
and partial outputs o_own, o_cross the exact output is

    o = (Z_own o_own + Z_cross o_cross) / (Z_own + Z_cross),   log Z = logaddexp(log Z_own, log Z_cross).

Backward calls the two backward kernels with the merged o and log Z, which makes each return its exact share of the
gradients. No mask is built and keys are copied neither per list nor per head. The layout arrives as a keyword argument,
so a layer recomputed by activation checkpointing sees the layout of its own forward.

Registered with transformers under the name in SHARED_PREFIX; decoders of transformers run unmodified. A call without a
layout raises: ordinary attention (decoding with a KV cache, the dense oracle) has to be asked for by
`ordinary_attention`. Layers with sliding windows shorter than a sequence, soft caps or sinks take `by_sequence`;
attention dropout and position biases are refused.
"""

# Shape letters: N tokens of a pack, S tokens of a cross pass, H query heads, J key/value heads, E channels a head.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rankgrpo.model.autocast import in_autocast_type
from rankgrpo.model.by_sequence import Scores, attend_by_sequence, read_scores
from rankgrpo.model.packing import SharedPrefixLayout, Spans
from rankgrpo.model.recurrent import fork_states

SHARED_PREFIX = "shared_prefix"
ORDINARY = "shared_prefix_off"
# Pairs of a span below which the CPU's backward kernel runs in float32: in half precision each call costs over a
# millisecond whatever its size, which a list of 40 tokens feels 14-fold. From here on its products win.
SHORT_SPANS = 2**18

Backend = Literal["cpu", "cuda", "concat"]


def use_shared_prefix(model: PreTrainedModel) -> None:
    """Make shared-prefix attention the model's attention, and let its recurrent layers compute packs.

    Errors: ValueError when its architecture cannot switch.
    """
    fork_states(model, SHARED_PREFIX)
    _switch(model, SHARED_PREFIX)


def can_share_prefix(model: PreTrainedModel) -> bool:
    """Whether the model's attention can be switched to ours at all."""
    before = model.config._attn_implementation
    try:
        _switch(model, SHARED_PREFIX)
    except ValueError:
        return False
    _switch(model, before)
    return True


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Make transformers' attention `name` the model's. Errors: ValueError when its architecture cannot switch."""
    _switch(model, name)


def uses_shared_prefix(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation == SHARED_PREFIX


@contextmanager
def ordinary_attention(model: PreTrainedModel) -> Iterator[None]:
    """Ordinary attention (PyTorch SDPA, padding masks, KV cache) on the same model object, for decoding and oracles.

    Backward of a packed forward must run outside: layers recomputed inside would meet the wrong attention, and raise.
    """
    before = model.config._attn_implementation
    _switch(model, ORDINARY)
    try:
        yield
    finally:
        _switch(model, before)


def _switch(model: PreTrainedModel, name: str) -> None:
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError(
            f"{type(model).__name__} cannot switch its attention to {name!r} (it kept "
            f"{model.config._attn_implementation!r}); use an architecture built on transformers' AttentionInterface"
        )


def pick_backend(query: Tensor) -> Backend:
    """Backend by device and type alone: "cpu" and "cuda" are flash kernels, "concat" is plain SDPA."""
    if query.device.type == "cpu":
        return "cpu"
    if (
        query.device.type == "cuda"
        and torch.version.hip is None
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    ):
        return "cuda"
    return "concat"


def shared_prefix_attention(
    query_NHE: Tensor,
    key_NJE: Tensor,
    value_NJE: Tensor,
    layout: SharedPrefixLayout,
    *,
    scale: float,
    backend: Backend | None = None,
) -> Tensor:
    """Attention of a pack, (N, H, E); equal to dense causal attention over [prompt ; list] for every list.

    scale multiplies the scores. H is a multiple of J; query head h reads key head h // (H / J).
    backend=None picks by device (`pick_backend`). Errors: ValueError when the layout is of another pack.
    """
    if query_NHE.shape[0] != layout.num_tokens:
        raise ValueError(f"the layout describes {layout.num_tokens} tokens, the queries are {query_NHE.shape[0]}")
    backend = backend or pick_backend(query_NHE)
    if backend == "concat":
        return attend_by_sequence(query_NHE, key_NJE, value_NJE, layout, Scores(scale))
    return _TwoPass.apply(query_NHE, key_NJE, value_NJE, layout, scale, backend)


class _TwoPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_NHE, key_NJE, value_NJE, layout, scale, backend):
        attend = _FORWARD[backend]
        out_NHE, lse_HN = attend(query_NHE, key_NJE, value_NJE, layout.own, True, scale)
        if layout.cross is not None:
            rows, keys = layout.cross_rows, slice(0, layout.cross_rows.start)
            cross = attend(query_NHE[rows], key_NJE[keys], value_NJE[keys], layout.cross, False, scale)
            _merge_(out_NHE[rows], lse_HN[:, rows], *cross)
        ctx.save_for_backward(query_NHE, key_NJE, value_NJE, out_NHE, lse_HN)
        ctx.layout, ctx.scale, ctx.backend = layout, scale, backend
        return out_NHE

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHE):
        query_NHE, key_NJE, value_NJE, out_NHE, lse_HN = ctx.saved_tensors
        layout, scale, attend_backward = ctx.layout, ctx.scale, _BACKWARD[ctx.backend]
        grads = attend_backward(grad_NHE, query_NHE, key_NJE, value_NJE, out_NHE, lse_HN, layout.own, True, scale)
        if layout.cross is not None:
            rows, keys = layout.cross_rows, slice(0, layout.cross_rows.start)
            inputs = (grad_NHE[rows], query_NHE[rows], key_NJE[keys], value_NJE[keys], out_NHE[rows], lse_HN[:, rows])
            cross_grads = attend_backward(*inputs, layout.cross, False, scale)
            for grad, cross_grad, at in zip(grads, cross_grads, (rows, keys, keys), strict=True):
                grad[at] += cross_grad
        return *grads, None, None, None


def _merge_(out_SHE: Tensor, lse_HS: Tensor, cross_SHE: Tensor, cross_lse_HS: Tensor) -> None:
    """Merge the cross pass into the own pass, in place, in at least float32."""
    weight_SH1 = torch.sigmoid(cross_lse_HS - lse_HS).t()[..., None]
    if out_SHE.dtype == weight_SH1.dtype:
        out_SHE.lerp_(cross_SHE, weight_SH1)
    else:
        out_SHE.copy_(out_SHE.to(weight_SH1.dtype).lerp_(cross_SHE.to(weight_SH1.dtype), weight_SH1))
    lse_HS.copy_(torch.logaddexp(lse_HS, cross_lse_HS))


# The flash kernels are reached as operators, not through F.scaled_dot_product_attention, because only the operators
# return the log-sum-exp and let backward be called with the merged one.


def _cpu_forward(query_NHE, key_NJE, value_NJE, spans: Spans, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out_NHE = torch.empty_like(query_NHE, memory_format=torch.contiguous_format)
    lse_type = torch.float64 if query_NHE.dtype == torch.float64 else torch.float32
    lse_HN = torch.empty(query_NHE.shape[:2], dtype=lse_type).t()
    views = zip(
        _heads_first(query_NHE).split(spans.q_sizes, 2),
        _heads_first(key_NJE).split(spans.k_sizes, 2),
        _heads_first(value_NJE).split(spans.k_sizes, 2),
        _heads_first(out_NHE).split(spans.q_sizes, 2),
        lse_HN.split(spans.q_sizes, 1),
        strict=True,
    )
    for query, key, value, out, lse in views:
        span_out, span_lse = attend(query, key, value, 0.0, causal, scale=scale)
        out.copy_(span_out)
        lse.copy_(span_lse[0])
    return out_NHE, lse_HN


def _cpu_backward(
    grad_NHE, query_NHE, key_NJE, value_NJE, out_NHE, lse_HN, spans: Spans, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    q_sizes, k_sizes = spans.q_sizes, spans.k_sizes
    tensors = (query_NHE, key_NJE, value_NJE)
    dtype = query_NHE.dtype
    if dtype in (torch.bfloat16, torch.float16) and mean_pairs(spans) < SHORT_SPANS:
        tensors = query_NHE, key_NJE, value_NJE = tuple(tensor.float() for tensor in tensors)
        grad_NHE, out_NHE = grad_NHE.float(), out_NHE.float()
    grads = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)
    inputs = zip(
        _heads_first(grad_NHE).split(q_sizes, 2),
        _heads_first(query_NHE).split(q_sizes, 2),
        _heads_first(key_NJE).split(k_sizes, 2),
        _heads_first(value_NJE).split(k_sizes, 2),
        _heads_first(out_NHE).split(q_sizes, 2),
        lse_HN[None].split(q_sizes, 2),
        strict=True,
    )
    sizes = (q_sizes, k_sizes, k_sizes)
    outputs = zip(*(_heads_first(grad).split(size, 2) for grad, size in zip(grads, sizes, strict=True)), strict=True)
    for span_inputs, span_outputs in zip(inputs, outputs, strict=True):
        for target, grad in zip(span_outputs, attend_backward(*span_inputs, 0.0, causal, scale=scale), strict=True):
            target.copy_(grad)
    return tuple(grad.to(dtype) for grad in grads)


def mean_pairs(spans: Spans) -> float:
    """Query-key pairs of a span, on average."""
    return sum(q * k for q, k in zip(spans.q_sizes, spans.k_sizes, strict=True)) / max(len(spans.q_sizes), 1)


def _heads_first(tensor_NHE: Tensor) -> Tensor:
    return tensor_NHE.transpose(0, 1)[None]


def _cuda_forward(query_NHE, key_NJE, value_NJE, spans: Spans, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out_NHE, lse_HN, *_ = torch.ops.aten._flash_attention_forward(
        query_NHE,
        key_NJE,
        value_NJE,
        spans.cu_q,
        spans.cu_k,
        spans.max_q,
        spans.max_k,
        0.0,
        causal,
        return_debug_mask=False,
        scale=scale,
    )
    return out_NHE, lse_HN


def _cuda_backward(
    grad_NHE, query_NHE, key_NJE, value_NJE, out_NHE, lse_HN, spans: Spans, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._flash_attention_backward(
        grad_NHE.contiguous(),
        query_NHE,
        key_NJE,
        value_NJE,
        out_NHE,
        lse_HN.contiguous(),
        spans.cu_q,
        spans.cu_k,
        spans.max_q,
        spans.max_k,
        0.0,
        causal,
        torch.zeros(2, dtype=torch.uint64, device=query_NHE.device),  # dropout state, unused at probability 0
        torch.empty(0, device=query_NHE.device),
        scale=scale,
    )


_FORWARD = {"cpu": _cpu_forward, "cuda": _cuda_forward}
_BACKWARD = {"cpu": _cpu_backward, "cuda": _cuda_backward}


def _packed_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    shared_prefix: SharedPrefixLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: query (1, H, N, E), key and value (1, J, N, E); returns (1, N, H, E)."""
    if shared_prefix is None:
        raise ValueError(
            "shared-prefix attention was called without a layout: run packs through "
            "rankgrpo.model.forward.pack_logprobs, and decoding or dense forwards inside "
            "rankgrpo.model.attention.ordinary_attention(model)"
        )
    _refuse_unsupported(query, attention_mask, dropout)
    scores = read_scores(scaling, sliding_window, kwargs)
    query, key, value = in_autocast_type(query, key, value)
    if not scores.plain(shared_prefix.max_length):
        rows_first = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        out_NHE = attend_by_sequence(*rows_first, shared_prefix, scores)
    else:
        rows_first = (tensor[0].transpose(0, 1) for tensor in _in_one_size(query, key, value))
        out_NHE = shared_prefix_attention(*rows_first, shared_prefix, scale=scaling)[..., : value.shape[-1]]
    shared_prefix.num_calls += 1
    return out_NHE[None], None


def _in_one_size(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with as many channels for keys as for values, as the kernels ask: zeros change neither."""
    size = max(key.shape[-1], value.shape[-1])
    query, key, value = (F.pad(each, (0, size - each.shape[-1])) for each in (query, key, value))
    return query, key, value


def _refuse_unsupported(query, attention_mask, dropout) -> None:
    if query.shape[0] != 1:
        raise ValueError(f"a pack is one row, got a batch of {query.shape[0]}")
    if attention_mask is not None:
        raise ValueError("a pack has no padding and takes no attention mask, got one")
    if dropout:
        raise ValueError(f"attention dropout is not supported, got {dropout}; set config.attention_dropout to 0")


def _ordinary_forward(module, query, key, value, attention_mask, shared_prefix=None, **kwargs: Any):
    if shared_prefix is not None:
        raise ValueError(
            "a packed forward, or its recomputation in backward, ran inside ordinary_attention(model): leave it first"
        )
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(SHARED_PREFIX, _packed_forward)
AttentionInterface.register(ORDINARY, _ordinary_forward)
AttentionMaskInterface.register(ORDINARY, sdpa_mask)
