"""The packed forward pass and its dense oracle.

`pack_logprobs` is the one forward path for policy, old and reference log-probabilities. `dense_logprobs` computes the
same numbers through the model's ordinary padded forward; it is the oracle, never a fall-back.
"""

# Shape letters: N packed tokens, V vocabulary, D hidden, M predicted tokens, B lists, T longest list; S tokens of a
# padded row.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankgrpo.items.allowed_ids import AllowedIds
from rankgrpo.logprob import Impl, token_logprobs
from rankgrpo.model.allowed import allowed_logprobs
from rankgrpo.model.attention import ordinary_attention, uses_shared_prefix
from rankgrpo.model.packing import Group, Pack


def pack_logprobs(
    model: PreTrainedModel,
    pack: Pack,
    *,
    temperature: float = 1.0,
    impl: Impl = "torch",
    allowed_V: Tensor | None = None,
    allowed: AllowedIds | None = None,
) -> Tensor:
    """Log-probabilities of every list token of a pack, (B, T) float32, 0 where pack.mask_BT is False.

    The head runs on the rows that predict a list token and on no other. With `allowed`, one entry a list token in the
    order of pack.target_ids_M, every softmax runs over the ids that were allowed there; impl is then of no account.

    Errors: ValueError when the model does not use shared-prefix attention, when one of its layers ignored the layout (a
    silent fall-back to dense), or when it changes the head's output.
    """
    if not uses_shared_prefix(model):
        raise ValueError(
            f"the model's attention is {model.config._attn_implementation!r}; call "
            "rankgrpo.model.attention.use_shared_prefix(model) first (dense log-probs are dense_logprobs)"
        )
    results: list[Tensor] = []

    def streamed_head(hidden_1ND: Tensor) -> Tensor:
        hidden_MD = hidden_1ND[0].index_select(0, pack.source_row_M)
        if allowed is not None:
            results.append(allowed_logprobs(hidden_MD, head.weight, allowed, temperature=temperature))
        else:
            options = {"temperature": temperature, "allowed_V": allowed_V, "impl": impl}
            results.append(token_logprobs(hidden_MD, head.weight, pack.target_ids_M, **options))
        return results[0]

    head = _plain_head(model)
    calls_before = pack.layout.num_calls
    with _forward_replaced(head, streamed_head):
        output = model(
            input_ids=pack.input_ids_1N, position_ids=pack.position_ids_1N, shared_prefix=pack.layout, use_cache=False
        )
    if output.logits is not results[0]:
        raise ValueError(f"{type(model).__name__} changes its head's output (scaling, soft cap or cast): not supported")
    if (calls := pack.layout.num_calls - calls_before) != model.config.num_hidden_layers:
        raise ValueError(
            f"{calls} of {model.config.num_hidden_layers} layers used shared-prefix attention: not supported"
        )
    return _to_lists(results[0], pack)


def _plain_head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"the streamed head needs a Linear without bias as output embedding, got {head}")
    return head


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """The head is computed inside the model's own forward, because sharding gathers its (tied) weight only there."""
    before = module.__dict__.get("forward")  # offloading wrappers hang theirs on the instance
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _to_lists(values_M: Tensor, pack: Pack) -> Tensor:
    flat = values_M.new_zeros(pack.mask_BT.numel())
    return flat.scatter(0, pack.slot_M, values_M).view(pack.mask_BT.shape)


def dense_logprobs(
    model: PreTrainedModel, groups: Sequence[Group], *, temperature: float = 1.0, allowed_V: Tensor | None = None
) -> Tensor:
    """The oracle: (B, T) log-probabilities through model(...) on right-padded rows [prompt ; list] and full logits.

    Runs with the model's own attention implementation, or with PyTorch SDPA when that is shared-prefix attention.
    """
    rows = [(group.prompt_ids, ids) for group in groups for ids in group.completion_ids]
    width, longest = max(len(p) + len(c) for p, c in rows), max(len(c) for _, c in rows)
    ids_BS = torch.tensor([p + c + [0] * (width - len(p) - len(c)) for p, c in rows], device=model.device)
    real_BS = torch.tensor([[s < len(p) + len(c) for s in range(width)] for p, c in rows], device=model.device)
    with ordinary_attention(model) if uses_shared_prefix(model) else nullcontext():
        logits_BSV = model(input_ids=ids_BS, attention_mask=real_BS.long(), use_cache=False).logits
    logits_BSV = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32)) / temperature
    if allowed_V is not None:
        logits_BSV = logits_BSV.masked_fill(~allowed_V, -torch.inf)
    logp_BS = logits_BSV[:, :-1].log_softmax(-1).gather(-1, ids_BS[:, 1:, None])[..., 0]
    lists = [logp_BS[b, len(p) - 1 : len(p) - 1 + len(c)] for b, (p, c) in enumerate(rows)]
    return torch.stack([nn.functional.pad(logp, (0, longest - len(logp))) for logp in lists])
