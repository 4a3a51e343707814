"""Keys, values and attention of lists that go on by several tokens at once, each by its own number.

The new tokens of all lists lie one after the other in one row, so that nothing but the attention knows of lists. There
they are padded: to the most of a prompt's lists together for the prompt's keys, to the most of a list for its own.
"""

# Shape letters: P prompts, B lists, M new tokens of all lists, g most new tokens of a prompt, n most of a list,
# L prompt tokens (padded), T own tokens of the longest list, N key-value heads, R query heads a key-value head, H head
# size.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rankgrpo.model.attention import in_autocast_type
from rankgrpo.sampler.hf import PromptCache, read_prompts

ATTENTION_NAME = "rankgrpo_jump"
GROWTH = 64  # tokens a list that the cache has at first; then it grows by half


@dataclass(slots=True)
class Jump:
    """Where the new tokens of all lists go: made once for all layers."""

    position_M: Tensor
    """In the list's text, the prompt included."""
    last_W: Tensor
    """Which of the M tokens is each jumping list's last."""
    row_M: Tensor
    column_M: Tensor
    """Where a token's key is stored: the list's row in the cache, and the place among its own tokens."""
    own_slot_M: Tensor
    """Place of a token among B * n padded queries."""
    prompt_slot_M: Tensor
    """Place of a token among P * g padded queries."""
    own_shape: tuple[int, int]
    """(B, n)"""
    prompt_shape: tuple[int, int]
    """(P, g)"""
    num_columns: int
    """T"""
    later_BnT: Tensor
    """True for keys that come after the query."""


class JumpCache(PromptCache):
    """Keys and values of P prompts (once each) and of their lists' own tokens, of which each has its own number."""

    def __init__(self, prompt_len_P: Tensor, prompt_of_row: Sequence[int]):
        super().__init__(prompt_len_P)
        self.device = prompt_len_P.device
        self.prompt_len = prompt_len_P.cpu().numpy()
        self.prompt_of_row = np.asarray(prompt_of_row)
        self.length = np.zeros(len(self.prompt_of_row), np.int64)
        """(B,) tokens that every list has of its own."""
        self.capacity = GROWTH
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        self.jump: Jump | None = None

    def plan(self, rows: np.ndarray, sizes: np.ndarray) -> Jump:
        """Make room for sizes[w] new tokens, at least one, of the list in each of the rows, which ascend."""
        B, num_prompts = len(self.length), len(self.prompt_len)
        row_M = np.repeat(rows, sizes)
        ends = np.cumsum(sizes)
        offset_M = np.arange(len(row_M)) - np.repeat(ends - sizes, sizes)
        length_M = self.length[row_M]
        prompt_M = self.prompt_of_row[row_M]
        n = int(sizes.max())
        # Lists of one prompt are neighbours, and so are their tokens.
        per_prompt = np.bincount(prompt_M, minlength=num_prompts)
        g = int(per_prompt.max())
        prompt_slot_M = np.arange(len(row_M)) - (np.cumsum(per_prompt) - per_prompt)[prompt_M] + prompt_M * g
        num_columns = int((self.length[rows] + sizes).max())
        self._grow(num_columns)
        last_seen_Bn = torch.from_numpy(self.length[:, None] + np.arange(n)).to(self.device)
        self.length[rows] += sizes

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(self.device)

        self.jump = Jump(
            position_M=tensor(self.prompt_len[prompt_M] + length_M + offset_M),
            last_W=tensor(ends - 1),
            row_M=tensor(row_M),
            column_M=tensor(length_M + offset_M),
            own_slot_M=tensor(row_M * n + offset_M),
            prompt_slot_M=tensor(prompt_slot_M),
            own_shape=(B, n),
            prompt_shape=(num_prompts, g),
            num_columns=num_columns,
            later_BnT=torch.arange(num_columns, device=self.device) > last_seen_Bn[..., None],
        )
        return self.jump

    def append(self, layer: int, key_MNH: Tensor, value_MNH: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values; returns those of all own tokens of all lists, (B, N, T, H)."""
        if layer not in self.own:
            (_, N, H), B = key_MNH.shape, len(self.length)
            # Zeros, for what a shorter list does not have is multiplied by a weight of 0.
            self.own[layer] = tuple(key_MNH.new_zeros(B, N, self.capacity, H) for _ in "kv")
        for stored_BNTH, new_MNH in zip(self.own[layer], (key_MNH, value_MNH), strict=True):
            stored_BNTH[self.jump.row_M, :, self.jump.column_M] = new_MNH
        key_BNTH, value_BNTH = self.own[layer]
        return key_BNTH[:, :, : self.jump.num_columns], value_BNTH[:, :, : self.jump.num_columns]

    def keep_rows(self, rows: np.ndarray) -> None:
        """Drop the lists that are not in these rows, which ascend, and the prompts that have none left."""
        prompts, self.prompt_of_row = np.unique(self.prompt_of_row[rows], return_inverse=True)
        if len(prompts) < len(self.prompt_len):
            self.prompt_len = self.prompt_len[prompts]
            self.keep_prompts(torch.from_numpy(prompts).to(self.device))
        self.length = self.length[rows]
        kept = torch.from_numpy(rows).to(self.device)
        self.own = {layer: (k[kept], v[kept]) for layer, (k, v) in self.own.items()}

    def _grow(self, num_columns: int) -> None:
        if num_columns <= self.capacity:
            return
        more = max(num_columns, self.capacity * 3 // 2) - self.capacity
        self.capacity += more
        pad = torch.nn.functional.pad
        for layer, pair in self.own.items():
            self.own[layer] = tuple(pad(stored_BNTH, (0, 0, 0, more)) for stored_BNTH in pair)


def jump_attention(module, query, key, value, attention_mask, *, scaling, grouped_cache: JumpCache, **_):
    """Attention of a prefill (prompts, causal) or of lists' new tokens over [prompt keys ; own keys so far]."""
    layer = module.layer_idx
    query, key, value = in_autocast_type(query, key, value)
    if grouped_cache.reading is not None:
        return read_prompts(layer, query, key, value, scaling, grouped_cache), None
    jump = grouped_cache.jump
    key_PNLH, value_PNLH = grouped_cache.prompt[layer]
    key_BNTH, value_BNTH = grouped_cache.append(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    _, heads, M, H = query.shape
    N = key.shape[1]
    query_MNRH = query[0].transpose(0, 1).reshape(M, N, heads // N, H) * scaling
    padding_P11L = None if grouped_cache.padding_PL is None else grouped_cache.padding_PL[:, None, None]
    prompt = _attend(query_MNRH, jump.prompt_slot_M, jump.prompt_shape, key_PNLH, value_PNLH, padding_P11L)
    own = _attend(query_MNRH, jump.own_slot_M, jump.own_shape, key_BNTH, value_BNTH, jump.later_BnT[:, :, None])
    peak_MNR1 = torch.maximum(prompt[1], own[1])
    scale_prompt, scale_own = (prompt[1] - peak_MNR1).exp_(), (own[1] - peak_MNR1).exp_()
    total_MNR1 = (prompt[2] * scale_prompt).addcmul_(own[2], scale_own)
    out_MNRH = (prompt[0] * (scale_prompt / total_MNR1)).addcmul_(own[0], scale_own / total_MNR1)
    return out_MNRH.to(value.dtype).view(1, M, heads, H), None


def _attend(
    query_MNRH: Tensor, slot_M: Tensor, shape: tuple[int, int], key_SNKH, value_SNKH, hidden_keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One softmax's three parts for every query: sum of weighted values, peak of the scores, sum of the weights.

    Queries go to places of (S, q), S rows of keys with q queries each; `hidden_keys` (S, 1 or q, 1, K) are not seen.
    """
    (_, N, R, H), (S, q), K = query_MNRH.shape, shape, key_SNKH.shape[2]
    padded_SqNRH = query_MNRH.new_zeros(S * q, N, R, H).index_copy_(0, slot_M, query_MNRH).view(S, q, N, R, H)
    query_SNqH = padded_SqNRH.transpose(1, 2).reshape(S, N, q * R, H)
    score_SNqRK = (query_SNqH @ key_SNKH.transpose(2, 3)).float().view(S, N, q, R, K)
    if hidden_keys is not None:
        score_SNqRK.masked_fill_(hidden_keys[:, None], float("-inf"))
    peak_SNqR1 = score_SNqRK.amax(-1, keepdim=True)
    weight_SNqRK = score_SNqRK.sub_(peak_SNqR1).exp_()
    total_SNqR1 = weight_SNqRK.sum(-1, keepdim=True)
    out_SNqH = (weight_SNqRK.view(S, N, q * R, K).to(value_SNKH.dtype) @ value_SNKH).float()

    def unpadded(padded: Tensor, size: int) -> Tensor:
        return padded.view(S, N, q, R, size).transpose(1, 2).reshape(S * q, N, R, size)[slot_M]

    return unpadded(out_SNqH, H), unpadded(peak_SNqR1, 1), unpadded(total_SNqR1, 1)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, jump_attention)
