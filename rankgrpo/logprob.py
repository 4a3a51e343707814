"""Token log-probabilities by the streamed head. Torch only.

    logp_n = logits_n[ids_n] - logsumexp(logits_n),   logits_n = weight hidden_n / temperature

The head runs over chunks of the vocabulary, so [tokens, vocabulary] never exists; backward recomputes each chunk. Every
row of the weight is read once a pass, and its gradient is one product, written once; chunks of tokens would go through
the whole weight and its whole gradient once a chunk. Log-sum-exp and sums of gradients are float32 at least, matrix
products run in the autocast type or the inputs' own. Tokens whose upstream gradient is exactly zero cost nothing in
backward.
"""

# Shape letters: N tokens, C ids of a chunk, K chunks, V vocabulary, D hidden.

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankgrpo.loss import Impl


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    ids_N: Tensor,
    *,
    impl: Impl = "torch",
    temperature: float = 1.0,
    soft_cap: float | None = None,
    allowed_V: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """log softmax(weight hidden / temperature) at ids, (N,) float32 (float64 for float64 inputs), in nats.

    soft_cap: c of logits that are c tanh(weight hidden / c) before they are divided by the temperature; None: no cap.
    allowed_V: bool mask; the softmax runs over the ids it allows. chunk: ids of the vocabulary at a time, None for a
    size that suits the device. impl="triton" needs a GPU and the kernels package.

    Errors: ValueError for shapes that do not fit, temperature or soft_cap <= 0, impl="triton" where it cannot run and,
    on a CPU, for ids outside the vocabulary or not allowed. On a GPU, where looking would wait for the device, such an
    id gives a log-prob of NaN or -inf, or stops the program with a device assertion.
    """
    _check_head(hidden_ND, weight_VD, ids_N, temperature, soft_cap, allowed_V, chunk, impl)
    if impl == "triton":
        return _triton_head(hidden_ND, weight_VD, ids_N, temperature, soft_cap, allowed_V)
    return _stream(hidden_ND, weight_VD, ids_N, temperature, soft_cap, allowed_V, chunk)


def _stream(hidden_ND, weight_VD, ids_N, temperature, soft_cap, allowed_V, chunk) -> Tensor:
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        product_type = torch.get_autocast_dtype(device)
    else:
        product_type = torch.promote_types(hidden_ND.dtype, weight_VD.dtype)
    chunk = chunk or default_chunk(len(ids_N), device)
    banned = None if allowed_V is None else _banned_places(allowed_V, chunk)
    return _StreamedHead.apply(hidden_ND, weight_VD, ids_N, banned, 1.0 / temperature, soft_cap, chunk, product_type)


def default_chunk(num_tokens: int, device: str) -> int:
    """Ids at a time: logits of about 8 MB on a CPU (they should stay in cache), 128 MB elsewhere."""
    elements = 2**21 if device == "cpu" else 2**25
    return max(256, elements // max(num_tokens, 1) // 64 * 64)


def _banned_places(allowed_V: Tensor, chunk: int) -> list[Tensor]:
    """Of every chunk, the places of the ids that are not allowed."""
    banned = (~allowed_V).nonzero()[:, 0]
    counts = torch.bincount(banned // chunk, minlength=-(-len(allowed_V) // chunk))
    return list((banned % chunk).split(counts.tolist()))


class _StreamedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, ids_N, banned, inverse_temperature, soft_cap, chunk, product_type):
        ctx.banned, ctx.inverse_temperature, ctx.soft_cap = banned, inverse_temperature, soft_cap
        ctx.chunk, ctx.product_type = chunk, product_type
        ctx.exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        hidden = hidden_ND.to(product_type)
        target_N = hidden_ND.new_full(ids_N.shape, torch.nan, dtype=ctx.exact)
        parts = []
        for first in range(0, len(weight_VD), chunk):
            logits_NC, _ = _logits(ctx, hidden, weight_VD, first)
            place_N, inside_N = _places(ids_N, first, logits_NC.shape[1])
            target_N = torch.where(inside_N, logits_NC.gather(1, place_N[:, None])[:, 0], target_N)
            parts.append(_softmax_sums_(logits_NC))
        logp_N, lse_N = _join(target_N, *map(torch.stack, zip(*parts, strict=True)))
        ctx.save_for_backward(hidden_ND, weight_VD, ids_N, lse_N)
        return logp_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N):
        hidden_ND, weight_VD, ids_N, lse_N = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        live = grad_N.nonzero()[:, 0]
        hidden, ids_N, lse_N1 = hidden_ND[live].to(ctx.product_type), ids_N[live], lse_N[live, None]
        grad_N1 = grad_N[live, None] * ctx.inverse_temperature
        grad_live = torch.zeros_like(hidden, dtype=ctx.exact) if needs_hidden else None
        grad_weight = torch.empty_like(weight_VD) if needs_weight else None
        for first in range(0, len(weight_VD), ctx.chunk):
            logits_NC, weight = _logits(ctx, hidden, weight_VD, first)
            place_N, inside_N = _places(ids_N, first, len(weight))
            slope_NC = cap_slope(logits_NC, ctx.soft_cap, ctx.inverse_temperature)
            # d logp / d logits = onehot - softmax, built in place of the recomputed logits
            delta_NC = logits_NC.sub_(lse_N1).exp_().mul_(-grad_N1)
            delta_NC.scatter_add_(1, place_N[:, None], grad_N1 * inside_N[:, None])
            if slope_NC is not None:
                delta_NC.mul_(slope_NC)
            delta_NC = delta_NC.to(ctx.product_type)
            if needs_hidden:
                _add_product_(grad_live, delta_NC, weight)
            if needs_weight:
                grad_weight[first : first + len(weight)] = exact_product(delta_NC.t(), hidden, ctx.exact)
        grad_hidden = None
        if needs_hidden:
            grad_hidden = torch.zeros_like(hidden_ND).index_copy_(0, live, grad_live.to(hidden_ND.dtype))
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _logits(ctx, hidden: Tensor, weight_VD: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Logits of the chunk of ids from `first` on, (N, C), and the chunk's weights in the type of the products."""
    weight = weight_VD[first : first + ctx.chunk].to(ctx.product_type)
    logits_NC = cap_(exact_product(hidden, weight.t(), ctx.exact), ctx.soft_cap)
    if ctx.inverse_temperature != 1.0:
        logits_NC.mul_(ctx.inverse_temperature)
    if ctx.banned is not None:
        logits_NC.index_fill_(1, ctx.banned[first // ctx.chunk], -torch.inf)
    return logits_NC, weight


def cap_(logits: Tensor, soft_cap: float | None) -> Tensor:
    """soft_cap tanh(logits / soft_cap), in place; without a cap the logits as they are."""
    return logits if soft_cap is None else logits.div_(soft_cap).tanh_().mul_(soft_cap)


def cap_slope(logits: Tensor, soft_cap: float | None, inverse_temperature: float) -> Tensor | None:
    """d capped / d raw = 1 - (capped / soft_cap)^2 of logits that were capped, then divided by the temperature.

    Of an id that is not allowed, whose logit is -inf, it is 0. None without a cap, where it is 1.
    """
    if soft_cap is None:
        return None
    ratio = logits * (1 / (soft_cap * inverse_temperature))
    return (1 - ratio.square_()).clamp_(min=0)


def _places(ids_N: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Places of ids in the chunk of `size` ids from `first` on, and whether they are in it; 0 for those outside."""
    place_N = ids_N - first
    inside_N = (place_N >= 0) & (place_N < size)
    return place_N * inside_N, inside_N


def _softmax_sums_(logits_NC: Tensor) -> tuple[Tensor, Tensor]:
    """The peak m of every row, and s = sum_c e^(x_c - m). The logits are lost."""
    # A chunk may be banned whole: with a finite peak its sums are 0 instead of NaN.
    peak_N = logits_NC.amax(1).clamp_(min=torch.finfo(logits_NC.dtype).min)
    return peak_N, logits_NC.sub_(peak_N[:, None]).exp_().sum(1)


def _join(target_N: Tensor, peak_KN: Tensor, sum_KN: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of the targets and log-sum-exp, from every chunk's `_softmax_sums_`.

    With m the highest peak and s_k a chunk's sums: lse = m + log sum_k e^(m_k - m) s_k.
    All chunks are summed at once: adding one at a time would round once a chunk.
    """
    peak_N = peak_KN.amax(0)
    log_N = ((peak_KN - peak_N).exp() * sum_KN).sum(0).log()
    return (target_N - peak_N) - log_N, peak_N + log_N


def exact_product(left: Tensor, right: Tensor, exact: torch.dtype) -> Tensor:
    """left @ right in the exact type. On a CPU it is first rounded to the inputs' type: no mixed product there."""
    if left.dtype == exact:
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=exact)
    return (left @ right).to(exact)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in total's type."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += exact_product(left, right, total.dtype)


def _triton_head(hidden_ND, weight_VD, ids_N, temperature, soft_cap, allowed_V) -> Tensor:
    try:
        from rankgrpo_kernels.linear_logprob import fused_token_logprobs
    except ImportError as error:
        raise ValueError(f"impl='triton' needs triton and the kernels package ({error}); use impl='torch'") from error
    options = {"temperature": temperature, "soft_cap": soft_cap, "allowed_V": allowed_V}
    return fused_token_logprobs(hidden_ND, weight_VD, ids_N, **options)


def _check_head(hidden_ND, weight_VD, ids_N, temperature, soft_cap, allowed_V, chunk, impl) -> None:
    if impl not in ("torch", "triton"):
        raise ValueError(f"impl must be 'torch' or 'triton', got {impl!r}")
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"expected hidden (N, D) and weight (V, D), got {tuple(hidden_ND.shape)} and {tuple(weight_VD.shape)}"
        )
    if ids_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"expected one id a hidden row, ({len(hidden_ND)},), got {tuple(ids_N.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive, got {soft_cap}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    if allowed_V is not None and (allowed_V.dtype != torch.bool or allowed_V.shape != weight_VD.shape[:1]):
        raise ValueError(
            f"allowed_V must be bool, ({len(weight_VD)},), got {allowed_V.dtype}, {tuple(allowed_V.shape)}"
        )
    if ids_N.device.type != "cpu":
        return  # reading values would wait for the device
    if len(ids_N) and not 0 <= int(ids_N.min()) <= int(ids_N.max()) < len(weight_VD):
        raise ValueError(f"ids must be in [0, {len(weight_VD)}), got {int(ids_N.min())} to {int(ids_N.max())}")
    if allowed_V is not None and not bool(allowed_V[ids_N].all()):
        raise ValueError(f"allowed_V bans target ids {ids_N[~allowed_V[ids_N]].unique().tolist()[:8]}")
