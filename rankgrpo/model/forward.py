"""The packed forward pass and its dense oracle.

`pack_logprobs` is the forward path for policy, old and reference log-probabilities; `row_logprobs` takes its place for
models that cannot be packed exactly. `dense_logprobs` computes the same numbers through the model's ordinary padded
forward and full logits; it is the oracle, never a fall-back.
"""

# Shape letters: N packed tokens, V vocabulary, D hidden, M predicted tokens, B lists, T longest list; S tokens of a
# padded row.

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankgrpo.items.allowed_ids import AllowedIds
from rankgrpo.logprob import Impl, token_logprobs
from rankgrpo.model.allowed import allowed_logprobs
from rankgrpo.model.attention import ordinary_attention, uses_shared_prefix
from rankgrpo.model.head import PLAIN, LogitMap, forward_replaced, head_operands, output_head
from rankgrpo.model.packing import Group, Pack
from rankgrpo.model.recurrent import reading

ROW_BY_ROW = ("mlp", "moe")
"""What configurations call layers that are no more than a feed-forward."""


def pack_logprobs(
    model: PreTrainedModel,
    pack: Pack,
    *,
    temperature: float = 1.0,
    impl: Impl = "torch",
    allowed_V: Tensor | None = None,
    allowed: AllowedIds | None = None,
    logit_map: LogitMap | None = None,
) -> Tensor:
    """Log-probabilities of every list token of a pack, (B, T) float32, 0 where pack.mask_BT is False.

    The head runs on the rows that predict a list token and on no other. With `allowed`, one entry a list token in the
    order of pack.target_ids_M, every softmax runs over the ids that were allowed there; impl is then of no account.
    logit_map: what the model does to its head's product (`rankgrpo.model.head.find_logit_map`); None: nothing.

    Errors: ValueError when the model does not use shared-prefix attention, when one of its layers ignored the layout (a
    silent fall-back to dense), or when it touches the head's output and no logit_map was given.
    """
    if not uses_shared_prefix(model):
        raise ValueError(
            f"the model's attention is {model.config._attn_implementation!r}; call "
            "rankgrpo.model.attention.use_shared_prefix(model) first (dense log-probs are dense_logprobs)"
        )
    head = _StreamedHead(model, pack, temperature, impl, allowed_V, allowed, logit_map)
    calls_before = pack.layout.num_calls
    streamed = forward_replaced(head.module, lambda hidden_1ND: head(hidden_1ND[0].index_select(0, pack.source_row_M)))
    with reading(pack.layout), streamed:
        output = model(
            input_ids=pack.input_ids_1N, position_ids=pack.position_ids_1N, shared_prefix=pack.layout, use_cache=False
        )
    head.check(output)
    num_layers = _num_layers_across_tokens(model)
    if (calls := pack.layout.num_calls - calls_before) < num_layers:
        raise ValueError(f"{calls} of {num_layers} layers read a prompt through its pack: not supported")
    return _to_lists(head.logp_M, pack)


def _num_layers_across_tokens(model: PreTrainedModel) -> int:
    """Layers that read other tokens than their own."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    return config.num_hidden_layers - sum(kind in ROW_BY_ROW for kind in kinds)


def row_logprobs(
    model: PreTrainedModel,
    pack: Pack,
    groups: Sequence[Group],
    *,
    alone: bool = False,
    temperature: float = 1.0,
    impl: Impl = "torch",
    allowed_V: Tensor | None = None,
    allowed: AllowedIds | None = None,
    logit_map: LogitMap | None = None,
) -> Tensor:
    """What `pack_logprobs` gives, from the model's own dense forward over rows [prompt ; list] of `groups`.

    The rows are padded on the right to one batch; alone=True passes each by itself, for models in which the rows of a
    batch change each other.
    """
    rows = [(group.prompt_ids, ids) for group in groups for ids in group.completion_ids]
    head = _StreamedHead(model, pack, temperature, impl, allowed_V, allowed, logit_map)
    if not alone:
        width = max(len(p) + len(c) for p, c in rows)
        source_M = [b * width + s for b, (p, c) in enumerate(rows) for s in range(len(p) - 1, len(p) + len(c) - 1)]
        source_M = torch.tensor(source_M, device=model.device)
        with forward_replaced(head.module, lambda hidden_BSD: head(hidden_BSD.flatten(0, 1)[source_M])):
            head.check(model(**_padded(rows, width, model.device), use_cache=False))
        return _to_lists(head.logp_M, pack)
    hidden = []
    for prompt, ids in rows:
        inputs = _padded([(prompt, ids)], len(prompt) + len(ids), model.device)
        with forward_replaced(head.module, lambda hidden_1SD: hidden.append(hidden_1SD[0]) or hidden_1SD):
            model(**inputs, use_cache=False)
        hidden[-1] = hidden[-1][len(prompt) - 1 : -1]
    return _to_lists(head(torch.cat(hidden)), pack)


class _StreamedHead:
    """What takes the place of the model's head: log-probabilities of a pack's targets, which it keeps.

    The head is computed inside the model's own forward, because sharding gathers its (tied) weight only there.
    """

    def __init__(self, model, pack, temperature, impl, allowed_V, allowed, logit_map):
        self.module, self.model, self.pack = output_head(model), model, pack
        self.impl, self.allowed_V, self.allowed = impl, allowed_V, allowed
        self.logit_map, self.options = logit_map, (logit_map or PLAIN).options(temperature)
        self.logp_M: Tensor | None = None

    def __call__(self, hidden_MD: Tensor) -> Tensor:
        operands = head_operands(self.module, hidden_MD)
        if self.allowed is not None:
            self.logp_M = allowed_logprobs(*operands, self.allowed, **self.options)
        else:
            options = self.options | {"allowed_V": self.allowed_V, "impl": self.impl}
            self.logp_M = token_logprobs(*operands, self.pack.target_ids_M, **options)
        return self.logp_M

    def check(self, output) -> None:
        """Raise ValueError when the model touches its head's output, and nobody has found out how."""
        if self.logit_map is None and output.logits is not self.logp_M:
            name = type(self.model).__name__
            raise ValueError(f"{name} changes its head's output (scaling, soft cap or cast): not supported")


def _padded(rows: list[tuple[list[int], list[int]]], width: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids and attention_mask of rows padded on the right; no mask where nothing is padded."""
    ids_BS = torch.tensor([p + c + [0] * (width - len(p) - len(c)) for p, c in rows], device=device)
    if all(len(p) + len(c) == width for p, c in rows):
        return {"input_ids": ids_BS}
    real_BS = torch.tensor([[s < len(p) + len(c) for s in range(width)] for p, c in rows], device=device)
    return {"input_ids": ids_BS, "attention_mask": real_BS.long()}


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
