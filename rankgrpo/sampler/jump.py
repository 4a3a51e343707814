"""Keys, values and attention of lists that go on by several tokens at once, each by its own number.

The new tokens of all lists lie one after the other in one row, so that nothing but the attention knows of lists. It
runs in two parts, over the prompt's keys and over the list's own, which are merged by their log-sum-exps. On a CPU the
flash kernel is called once a prompt, and for the lists' own keys once for the first few new tokens of all lists and
once for the rest of each longer jump. Elsewhere queries are padded to the most of a prompt's lists together, and to the
most of a list.
"""

# Shape letters: P prompts, B lists, M new tokens of all lists, g most new tokens of a prompt, n most of a list,
# L prompt tokens (padded), T own tokens of the longest list, N key-value heads, R query heads a key-value head, H head
# size; S rows of keys (P or B) with q queries (g or n) each.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rankgrpo.errors import SamplingError
from rankgrpo.model.autocast import in_autocast_type
from rankgrpo.model.by_sequence import read_scores
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
    prompt_spans: Spans
    own_spans: Spans
    num_columns: int
    """T"""
    start: Start | None
    """None: no tokens are taken together. Used on CPUs."""


@dataclass(slots=True, frozen=True)
class Span:
    """Neighbouring new tokens that look at one row of keys."""

    row: int
    begin: int
    end: int
    num_keys: int
    """That the last of them sees."""


class Spans:
    """Spans that follow each other and cover all new tokens; made once for all layers.

    causal: a span's queries are its last keys' own, and see none that come after.
    """

    def __init__(self, spans: list[Span], *, causal: bool):
        self.spans, self.causal = spans, causal
        self._padded: tuple[int, Tensor, Tensor] | None = None

    def padded(self, num_rows: int, num_columns: int, device: torch.device) -> tuple[int, Tensor, Tensor]:
        """q, the most queries of a span; (M,) every token's place among S * q; (S, q, K) bool, what it does not see."""
        if self._padded is None:
            sizes = np.array([span.end - span.begin for span in self.spans])
            rows = np.array([span.row for span in self.spans])
            most = int(sizes.max())
            place_M = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            slot_M = np.repeat(rows, sizes) * most + place_M
            visible = np.ones(num_rows * most, np.int64)  # one, so that padding has a softmax too
            last_M = np.repeat([span.num_keys for span in self.spans], sizes)
            visible[slot_M] = last_M - np.repeat(sizes, sizes) + 1 + place_M if self.causal else last_M
            visible_Sq1 = torch.from_numpy(visible).to(device).view(num_rows, most, 1)
            unseen_SqK = torch.arange(num_columns, device=device) >= visible_Sq1
            self._padded = most, torch.from_numpy(slot_M).to(device), unseen_SqK
        return self._padded


class Start:
    """The first `size` new tokens of every list, which one call of the kernel takes, and the rest of longer jumps."""

    def __init__(self, size: int, rows: np.ndarray, sizes: np.ndarray, num_keys: np.ndarray, num_rows: int):
        begins = np.cumsum(sizes) - sizes
        place_M = np.arange(sizes.sum()) - np.repeat(begins, sizes)
        early_M = place_M < size
        self.size, self.num_rows = size, num_rows
        self.early = torch.from_numpy(early_M.nonzero()[0])
        self.slot = torch.from_numpy((np.repeat(rows, sizes) * size + place_M)[early_M])
        """Place of each early token among the B * size padded queries."""
        self.late = torch.from_numpy((~early_M).nonzero()[0])
        left, longer = sizes - size, sizes > size
        ends = np.cumsum(left[longer])
        self.late_spans = _spans(rows[longer], ends - left[longer], ends, num_keys[longer], causal=True)
        self.visible = torch.ones(num_rows, size, dtype=torch.int64)  # one, so that padding has a softmax too
        seen = (num_keys - sizes)[:, None] + np.arange(1, size + 1)
        self.visible[torch.from_numpy(rows)] = torch.from_numpy(np.minimum(seen, num_keys[:, None]))
        self._mask: Tensor | None = None

    @classmethod
    def choose(cls, rows: np.ndarray, sizes: np.ndarray, num_keys: np.ndarray, num_rows: int) -> Start | None:
        """The cheapest size, in calls of the kernel: a padded query costs about a sixteenth of one."""
        size_n = np.arange(1, sizes.max() + 1)
        cost_n = num_rows * (0.25 + size_n / 16) + (sizes > size_n[:, None]).sum(1)
        best = int(cost_n.argmin())
        return cls(best + 1, rows, sizes, num_keys, num_rows) if cost_n[best] < len(rows) else None

    def mask(self, query_NMRH: Tensor, num_columns: int) -> Tensor:
        """(B, 1, size * R, T), -inf for keys that come after the query. The same for all layers."""
        if self._mask is None:
            unseen_BnT = torch.arange(num_columns) >= self.visible[..., None]
            mask_BnT = query_NMRH.new_zeros(unseen_BnT.shape).masked_fill_(unseen_BnT, -torch.inf)
            self._mask = mask_BnT.repeat_interleave(query_NMRH.shape[2], dim=1)[:, None]
        return self._mask


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
        row_M = np.repeat(rows, sizes)
        ends = np.cumsum(sizes)
        begins = ends - sizes
        column_M = self.length[row_M] + np.arange(len(row_M)) - np.repeat(begins, sizes)
        self.length[rows] += sizes
        num_keys = self.length[rows]
        self._grow(int(num_keys.max()))
        # Lists of one prompt are neighbours, and so are their tokens.
        prompts, first = np.unique(self.prompt_of_row[rows], return_index=True)
        prompt_begins = begins[first]
        prompt_ends = np.append(prompt_begins[1:], ends[-1])
        self.jump = Jump(
            position_M=self._tensor(self.prompt_len[self.prompt_of_row[row_M]] + column_M),
            last_W=self._tensor(ends - 1),
            row_M=self._tensor(row_M),
            column_M=self._tensor(column_M),
            prompt_spans=_spans(prompts, prompt_begins, prompt_ends, self.prompt_len[prompts], causal=False),
            own_spans=_spans(rows, begins, ends, num_keys, causal=True),
            num_columns=int(num_keys.max()),
            start=Start.choose(rows, sizes, num_keys, len(self.length)),
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
            self.keep_prompts(self._tensor(prompts))
        self.length = self.length[rows]
        kept = self._tensor(rows)
        self.own = {layer: (k.index_select(0, kept), v.index_select(0, kept)) for layer, (k, v) in self.own.items()}

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _grow(self, num_columns: int) -> None:
        if num_columns <= self.capacity:
            return
        more = max(num_columns, self.capacity * 3 // 2) - self.capacity
        self.capacity += more
        pad = torch.nn.functional.pad
        for layer, pair in self.own.items():
            self.own[layer] = tuple(pad(stored_BNTH, (0, 0, 0, more)) for stored_BNTH in pair)


def _spans(*columns: np.ndarray, causal: bool) -> Spans:
    return Spans([Span(*row) for row in zip(*(column.tolist() for column in columns), strict=True)], causal=causal)


def jump_attention(
    module, query, key, value, attention_mask, *, scaling, grouped_cache: JumpCache, sliding_window=None, **kwargs
):
    """Attention of a prefill (prompts, causal) or of lists' new tokens over [prompt keys ; own keys so far]."""
    layer = module.layer_idx
    query, key, value = in_autocast_type(query, key, value)
    scores = read_scores(scaling, sliding_window, kwargs)
    if grouped_cache.reading is not None:
        return read_prompts(layer, query, key, value, scores, grouped_cache), None
    longest = int(grouped_cache.prompt_len.max()) + grouped_cache.jump.num_columns
    if not scores.plain(longest) or key.shape[-1] != value.shape[-1]:
        raise SamplingError(
            "lists that are held to the catalog are decoded several tokens at a time, which this model's attention "
            "(windows, soft caps, sinks, heads of two sizes) is not made for; set model.verify=true, which finds a way"
        )
    jump = grouped_cache.jump
    own = grouped_cache.append(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    (_, heads, M, H), N = query.shape, key.shape[1]
    query_NMRH = query.view(N, heads // N, M, H).transpose(1, 2).contiguous()
    attend = attend_by_span if query.device.type == "cpu" else attend_padded
    prompt_NMRH, prompt_lse_NMR = attend(query_NMRH, *grouped_cache.prompt[layer], jump.prompt_spans, scaling)
    if query.device.type == "cpu" and jump.start is not None:
        own_NMRH, own_lse_NMR = attend_from_start(query_NMRH, *own, jump.start, scaling)
    else:
        own_NMRH, own_lse_NMR = attend(query_NMRH, *own, jump.own_spans, scaling)
    share_NMR1 = torch.sigmoid(own_lse_NMR - prompt_lse_NMR)[..., None]
    out_NMRH = torch.lerp(prompt_NMRH.to(share_NMR1.dtype), own_NMRH.to(share_NMR1.dtype), share_NMR1)
    return out_NMRH.to(value.dtype).transpose(0, 1).reshape(1, M, heads, H), None


def attend_by_span(
    query_NMRH: Tensor, key_SNKH: Tensor, value_SNKH: Tensor, spans: Spans, scaling: float
) -> tuple[Tensor, Tensor]:
    """Every query's attention over its span's keys, (N, M, R, H), and its log-sum-exp, (N, M, R). For CPUs."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    N, M, R, H = query_NMRH.shape
    query_1NqH = query_NMRH.view(1, N, M * R, H)
    outs, lses = [], []
    if spans.causal:
        # Of a window onto this mask that ends with its last key's column, row j R + r sees all keys but the last ones.
        most, longest = max(s.end - s.begin for s in spans.spans), max(s.num_keys for s in spans.spans)
        later_nn = torch.ones(most, most, dtype=torch.bool).triu_(1)
        mask = query_NMRH.new_zeros(most, longest + most)
        mask[:, longest:].masked_fill_(later_nn, -torch.inf)
        mask = mask.repeat_interleave(R, dim=0)[None, None]
    # Views made by split and narrow, which take half the time of indexing: there are hundreds a layer.
    keys, values = key_SNKH.split(1), value_SNKH.split(1)
    queries = query_1NqH.split([(span.end - span.begin) * R for span in spans.spans], dim=2)
    for query, span in zip(queries, spans.spans, strict=True):
        size, num_keys, seen = span.end - span.begin, span.num_keys, None
        if spans.causal and size > 1:
            seen = mask[:, :, : size * R, longest + size - num_keys : longest + size]
        key, value = keys[span.row].narrow(2, 0, num_keys), values[span.row].narrow(2, 0, num_keys)
        out, lse = attend(query, key, value, 0.0, False, attn_mask=seen, scale=scaling)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2).view(N, M, R, H), torch.cat(lses, 2).view(N, M, R)


def attend_from_start(
    query_NMRH: Tensor, key_BNTH: Tensor, value_BNTH: Tensor, start: Start, scaling: float
) -> tuple[Tensor, Tensor]:
    """`attend_by_span` over the lists' own keys, with the first tokens of all lists in one call."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    (N, M, R, H), B, n = query_NMRH.shape, start.num_rows, start.size
    padded_NtRH = query_NMRH.new_zeros(N, B * n, R, H).index_copy_(
        1, start.slot, query_NMRH.index_select(1, start.early)
    )
    query_BNnH = padded_NtRH.view(N, B, n * R, H).transpose(0, 1)
    mask = start.mask(query_NMRH, key_BNTH.shape[2])
    early_BNnH, early_lse = attend(query_BNnH, key_BNTH, value_BNTH, 0.0, False, attn_mask=mask, scale=scaling)
    early_NtRH = early_BNnH.transpose(0, 1).reshape(N, B * n, R, H)
    early_lse_NtR = early_lse.transpose(0, 1).reshape(N, B * n, R)
    out_NMRH = query_NMRH.new_empty(N, M, R, H).index_copy_(1, start.early, early_NtRH.index_select(1, start.slot))
    lse_NMR = early_lse.new_empty(N, M, R).index_copy_(1, start.early, early_lse_NtR.index_select(1, start.slot))
    if start.late_spans.spans:
        late = attend_by_span(query_NMRH.index_select(1, start.late), key_BNTH, value_BNTH, start.late_spans, scaling)
        out_NMRH.index_copy_(1, start.late, late[0])
        lse_NMR.index_copy_(1, start.late, late[1])
    return out_NMRH, lse_NMR


def attend_padded(
    query_NMRH: Tensor, key_SNKH: Tensor, value_SNKH: Tensor, spans: Spans, scaling: float
) -> tuple[Tensor, Tensor]:
    """`attend_by_span` in a few large products: the definition, and what other devices run."""
    (N, _, R, H), (S, _, K, _), device = query_NMRH.shape, key_SNKH.shape, query_NMRH.device
    q, slot_M, unseen_SqK = spans.padded(S, K, device)
    padded_NtRH = query_NMRH.new_zeros(N, S * q, R, H).index_copy_(1, slot_M, query_NMRH * scaling)
    query_SNqH = padded_NtRH.view(N, S, q * R, H).transpose(0, 1)
    score_SNqRK = (query_SNqH @ key_SNKH.transpose(2, 3)).float().view(S, N, q, R, K)
    score_SNqRK.masked_fill_(unseen_SqK[:, None, :, None], -torch.inf)
    lse_SNqR = score_SNqRK.logsumexp(-1)
    weight_SNqK = score_SNqRK.sub_(lse_SNqR[..., None]).exp_().view(S, N, q * R, K)
    out_SNqH = weight_SNqK.to(value_SNKH.dtype) @ value_SNKH
    out_NMRH = out_SNqH.view(S, N, q, R, H).transpose(0, 1).reshape(N, S * q, R, H)[:, slot_M]
    return out_NMRH, lse_SNqR.transpose(0, 1).reshape(N, S * q, R)[:, slot_M]
