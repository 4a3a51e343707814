"""Token log-probabilities over each token's own allowed ids.

    logp_n = logits_n[target_n] - logsumexp(logits_n[allowed_n]),   logits_n = weight hidden_n / temperature

Equal to a softmax over the vocabulary with every other id masked out, at the price of the allowed ids alone. Tokens
that share their allowed ids form a block: one dense product with those rows of the weight. Others lie in one ragged
piece, an entry for each allowed id. Tokens with one allowed id are in neither: log-prob exactly 0, no gradient, not
read.

The weight's gradient has only the rows of allowed ids, and a dense one is not made where it need not be: see
`_takes_sparse`.
"""

# Shape letters: N tokens, R tokens of a block or of the ragged piece, C ids of a block, X closed ids of a block,
# F entries of the ragged piece, f of them at a time, U distinct ids of a plan, V vocabulary, D hidden.

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankgrpo.items.allowed_ids import AllowedIds, Block, Ragged
from rankgrpo.logprob import cap_, cap_slope, exact_product

RAGGED_BYTES = 2**22  # of gathered weights or hidden states at a time


def allowed_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    allowed: AllowedIds,
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
) -> Tensor:
    """log softmax(weight hidden / temperature) over each token's allowed ids, at the id it is; (N,), in nats.

    float32, or float64 for float64 inputs. Products run in the autocast type or the inputs' own. Give the plan on the
    device of the weight (`allowed.to(device)`). soft_cap: as in `rankgrpo.logprob.token_logprobs`. Differentiable in
    hidden and weight, once.

    Errors: ValueError for shapes that do not fit, temperature <= 0, a plan on another device, and on a CPU for ids
    outside the vocabulary.
    """
    return _head(hidden_ND, weight_VD, allowed, temperature, soft_cap, entropy=False)[0]


def allowed_logprobs_and_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    allowed: AllowedIds,
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`allowed_logprobs` and the entropy over each token's allowed ids, each (N,), in nats.

    The entropy has no gradient; it is 0 where one id was allowed.
    """
    return _head(hidden_ND, weight_VD, allowed, temperature, soft_cap, entropy=True)


def _head(hidden_ND, weight_VD, allowed, temperature, soft_cap, *, entropy: bool):
    _check(hidden_ND, weight_VD, allowed, temperature)
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        product_type = torch.get_autocast_dtype(device)
    else:
        product_type = torch.promote_types(hidden_ND.dtype, weight_VD.dtype)
    # The head casts by itself: autocast would round its sums too.
    with torch.autocast(device, enabled=False):
        return _AllowedHead.apply(hidden_ND, weight_VD, allowed, 1.0 / temperature, soft_cap, product_type, entropy)


class _AllowedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, allowed, inverse_temperature, soft_cap, product_type, with_entropy):
        ctx.allowed, ctx.inverse_temperature, ctx.product_type = allowed, inverse_temperature, product_type
        ctx.soft_cap = soft_cap
        ctx.exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        logp_N = hidden_ND.new_zeros(allowed.num_tokens, dtype=ctx.exact)
        entropy_N = torch.zeros_like(logp_N) if with_entropy else None
        slopes = []  # of the soft cap, where there is one
        shares = []  # every part's softmax: small next to what recomputing it would cost
        for block in allowed.blocks:
            hidden_RD, weight_CD = _rows(ctx, hidden_ND, block.row_R), _rows(ctx, weight_VD, _ids(allowed, block))
            logits_RC = cap_(exact_product(hidden_RD, weight_CD.t(), ctx.exact), soft_cap).mul_(inverse_temperature)
            slopes.append(cap_slope(logits_RC, soft_cap, inverse_temperature))
            logits_RC[block.closed_row_X, block.closed_X] = -torch.inf
            target_R1 = logits_RC.gather(1, block.target_R[:, None])
            peak_R1 = logits_RC.amax(1, keepdim=True)
            share_RC = logits_RC.sub_(peak_R1).exp_()
            sum_R1 = share_RC.sum(1, keepdim=True)
            logp_N[block.row_R] = (target_R1 - peak_R1 - sum_R1.log())[:, 0]
            shares.append(share_RC.div_(sum_R1))
            if with_entropy:
                entropy_N[block.row_R] = torch.special.entr(share_RC).sum(1)
        ragged = allowed.ragged
        if len(ragged.row_R):
            logits_F = cap_(_ragged_logits(ctx, hidden_ND, weight_VD, ragged), soft_cap).mul_(inverse_temperature)
            slopes.append(cap_slope(logits_F, soft_cap, inverse_temperature))
            num_rows = len(ragged.row_R)
            peak_R = logits_F.new_full((num_rows,), -torch.inf)
            peak_R.scatter_reduce_(0, ragged.place_F, logits_F, "amax")
            below_F = logits_F.sub_(peak_R[ragged.place_F])
            target_R = below_F[ragged.target_R]
            share_F = below_F.exp_()
            sum_R = share_F.new_zeros(num_rows).index_add_(0, ragged.place_F, share_F)
            logp_N[ragged.row_R] = target_R - sum_R.log()
            shares.append(share_F.div_(sum_R[ragged.place_F]))
            if with_entropy:
                entropy_N[ragged.row_R] = torch.zeros_like(sum_R).index_add_(
                    0, ragged.place_F, torch.special.entr(share_F)
                )
        ctx.save_for_backward(hidden_ND, weight_VD, *shares, *(slopes if soft_cap is not None else ()))
        if not with_entropy:
            return logp_N, None
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N, _):
        hidden_ND, weight_VD, *parts = ctx.saved_tensors
        num_parts = len(parts) if ctx.soft_cap is None else len(parts) // 2
        shares, slopes = parts[:num_parts], parts[num_parts:] or [None] * num_parts
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        allowed = ctx.allowed
        grad_N = grad_N.to(ctx.exact) * ctx.inverse_temperature
        grad_hidden = torch.zeros_like(hidden_ND) if needs_hidden else None
        rows_UD = None
        if needs_weight:
            rows_UD = weight_VD.new_zeros(len(allowed.ids_U), weight_VD.shape[1], dtype=ctx.exact)
        for block, share_RC, slope_RC in zip(allowed.blocks, shares, slopes, strict=False):
            row_R, target_R = block.row_R, block.target_R
            live = _live(grad_N[row_R])
            if live is not None:
                row_R, target_R, share_RC = row_R[live], target_R[live], share_RC[live]
                slope_RC = None if slope_RC is None else slope_RC[live]
            # d logp / d logits = onehot - softmax
            grad_R1 = grad_N[row_R, None]
            delta_RC = share_RC * -grad_R1
            delta_RC.scatter_add_(1, target_R[:, None], grad_R1)
            if slope_RC is not None:
                delta_RC.mul_(slope_RC)
            delta_RC = delta_RC.to(ctx.product_type)
            if needs_hidden:
                weight_CD = _rows(ctx, weight_VD, _ids(allowed, block))
                grad_hidden[row_R] = exact_product(delta_RC, weight_CD, ctx.exact).to(hidden_ND.dtype)
            if needs_weight:
                hidden_RD = _rows(ctx, hidden_ND, row_R)
                rows_UD.index_add_(0, block.column_C, exact_product(delta_RC.t(), hidden_RD, ctx.exact))
        if len(allowed.ragged.row_R):
            _ragged_backward_(ctx, hidden_ND, weight_VD, shares[-1], slopes[-1], grad_N, grad_hidden, rows_UD)
        grad_weight = None
        if needs_weight:
            rows_UD = rows_UD.to(weight_VD.dtype)
            if _takes_sparse(ctx.next_functions[1][0]):
                grad_weight = torch.sparse_coo_tensor(
                    allowed.ids_U[None], rows_UD, weight_VD.shape, is_coalesced=True, check_invariants=False
                )
            else:
                grad_weight = torch.zeros_like(weight_VD).index_copy_(0, allowed.ids_U, rows_UD)
        return grad_hidden, grad_weight, None, None, None, None, None


def _live(grad: Tensor) -> Tensor | None:
    """Where a gradient comes from above; None where it does everywhere, and on a GPU, which would be waited for.

    Most tokens have none: a rank at which no list of the group hits has no advantage, nor has a ratio that is clipped.
    """
    if grad.device.type != "cpu":
        return None
    live = grad.nonzero()[:, 0]
    return None if len(live) == len(grad) else live


def _ids(allowed: AllowedIds, block: Block) -> Tensor:
    return allowed.ids_U[block.column_C]


def _rows(ctx, source: Tensor, index: Tensor) -> Tensor:
    return source.index_select(0, index).to(ctx.product_type)


def _ragged_slices(num_entries: int, num_hidden: int) -> list[slice]:
    step = max(1, RAGGED_BYTES // (4 * num_hidden))
    return [slice(begin, begin + step) for begin in range(0, num_entries, step)]


def _ragged_logits(ctx, hidden_ND: Tensor, weight_VD: Tensor, ragged: Ragged) -> Tensor:
    """Of every entry the product of its token's hidden state and its id's weight, (F,)."""
    hidden_RD = _rows(ctx, hidden_ND, ragged.row_R)
    parts = []
    for part in _ragged_slices(len(ragged.place_F), hidden_ND.shape[1]):
        weight_fD = _rows(ctx, weight_VD, ctx.allowed.ids_U[ragged.column_F[part]])
        hidden_fD = hidden_RD.index_select(0, ragged.place_F[part])
        parts.append(torch.linalg.vecdot(weight_fD.to(ctx.exact), hidden_fD.to(ctx.exact)))
    return torch.cat(parts)


def _ragged_backward_(ctx, hidden_ND, weight_VD, share_F, slope_F, grad_N, grad_hidden, rows_UD) -> None:
    """Add the ragged piece's part to the gradient of hidden and to the rows of the weight's."""
    ragged = ctx.allowed.ragged
    grad_R = grad_N[ragged.row_R]
    delta_F = share_F * -grad_R[ragged.place_F]
    delta_F.index_add_(0, ragged.target_R, grad_R)
    if slope_F is not None:
        delta_F.mul_(slope_F)
    place_F, column_F = ragged.place_F, ragged.column_F
    live = _live(grad_R[place_F])
    if live is not None:
        place_F, column_F, delta_F = place_F[live], column_F[live], delta_F[live]
    hidden_RD = _rows(ctx, hidden_ND, ragged.row_R)
    grad_RD = torch.zeros_like(hidden_RD, dtype=ctx.exact)
    for part in _ragged_slices(len(place_F), hidden_ND.shape[1]):
        place_f, column_f, delta_f1 = place_F[part], column_F[part], delta_F[part, None]
        if grad_hidden is not None:
            weight_fD = _rows(ctx, weight_VD, ctx.allowed.ids_U[column_f]).to(ctx.exact)
            grad_RD.index_add_(0, place_f, weight_fD.mul_(delta_f1))
        if rows_UD is not None:
            hidden_fD = hidden_RD.index_select(0, place_f).to(ctx.exact)
            rows_UD.index_add_(0, column_f, hidden_fD.mul_(delta_f1))
    if grad_hidden is not None:
        grad_hidden[ragged.row_R] = grad_RD.to(hidden_ND.dtype)


def _takes_sparse(node) -> bool:
    """Whether the weight's gradient may be its rows alone, given the graph node it goes to.

    A new V x D gradient is nine tenths of this head's time at a vocabulary of 150k. Autograd itself adds a sparse
    gradient into a dense one in place, so a parameter gets its rows and no more when it has a gradient already
    (accumulation), or gets a dense one in the same backward (tied embeddings). When neither comes, a hook on the
    parameter turns the rows into a dense gradient as soon as they are stored, before any other hook or reader.

    Dense at once: a weight that is no leaf (a gathered or a computed one), one with hooks of its own, which may expect
    dense gradients, and whatever torch.autograd.grad asks for. Adding to weight.grad here would be wrong for all three.
    """
    if node.name() != "torch::autograd::AccumulateGrad":
        return False
    leaf = node.variable  # the weight that backward gets back may be a stand-in: activation checkpointing, offloading
    stored_hooks = list((leaf._post_accumulate_grad_hooks or {}).values())
    if leaf._backward_hooks or not all(isinstance(hook, _Densify) for hook in stored_hooks):
        return False
    try:
        stores = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # the engine's answer when it will return a leaf's gradient and not store it
        return False
    if stores and leaf.grad is None and not stored_hooks:
        _Densify(leaf)
    return stores


class _Densify:
    """A hook for one backward: a gradient that was stored sparse becomes dense."""

    def __init__(self, leaf: Tensor):
        self.handle = leaf.register_post_accumulate_grad_hook(self)

    def __call__(self, leaf: Tensor) -> None:
        self.handle.remove()
        if leaf.grad.is_sparse:
            leaf.grad = leaf.grad.to_dense()


def _check(hidden_ND, weight_VD, allowed, temperature) -> None:
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"expected hidden (N, D) and weight (V, D), got {tuple(hidden_ND.shape)} and {tuple(weight_VD.shape)}"
        )
    if len(hidden_ND) != allowed.num_tokens:
        raise ValueError(f"expected one hidden row a token, ({allowed.num_tokens}, D), got {tuple(hidden_ND.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if allowed.ids_U.device != weight_VD.device:
        raise ValueError(
            f"the plan is on {allowed.ids_U.device}, the weight on {weight_VD.device}: use plan.to(device)"
        )
    if allowed.ids_U.device.type != "cpu":
        return  # reading values would wait for the device
    if len(allowed.ids_U) and not 0 <= int(allowed.ids_U[0]) <= int(allowed.ids_U[-1]) < len(weight_VD):
        raise ValueError(
            f"ids must be in [0, {len(weight_VD)}), got {int(allowed.ids_U[0])} to {int(allowed.ids_U[-1])}"
        )
