"""Attention of a pack one sequence at a time, over [prompt keys ; own keys]: the definition, through public calls.

It is what runs where no kernel gives the two passes of `attention`, and all that changes attention beyond them lives
here: a sliding window (a query at p sees keys k with p - k < window), a soft cap on the scores, c tanh(s / c), and
sinks, one more score a head that takes its share of the softmax and no value. A windowed list takes the last
window - 1 keys of its prompt and no more. Only a list's own rows are queries, so the prompt is computed once here too.
"""

# Shape letters: N tokens of a pack, S queries and K keys of a sequence, H query heads, J key/value heads, E channels.

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rankgrpo.model.packing import SharedPrefixLayout


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer changes its scores."""

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sink_H: Tensor | None = None

    def plain(self, longest: int) -> bool:
        """Whether nothing but the scale counts for sequences of at most `longest` tokens."""
        return (self.window is None or self.window >= longest) and self.soft_cap is None and self.sink_H is None


def read_scores(scaling: float, sliding_window: int | None, kwargs: dict) -> Scores:
    """The scores of a call of transformers' attention interface. Raises ValueError for changes that are not known."""
    if kwargs.get("position_bias") is not None:
        raise ValueError("this architecture changes attention scores by ['position_bias'], which is not supported")
    return Scores(scaling, sliding_window, kwargs.get("softcap"), kwargs.get("s_aux"))


def attend_by_sequence(
    query_NHE: Tensor, key_NJE: Tensor, value_NJE: Tensor, layout: SharedPrefixLayout, scores: Scores
) -> Tensor:
    """Attention of a pack, (N, H, E of the values)."""
    prompt_of_row = prompt_rows(layout)
    outputs = []
    start = 0
    for size in layout.own.q_sizes:
        own = slice(start, start + size)
        prompt = prompt_of_row.get(start, slice(0, 0))
        if scores.window is not None:
            prompt = slice(max(prompt.start, prompt.stop - scores.window + 1), prompt.stop)
        key, value = (torch.cat([each[prompt], each[own]]) for each in (key_NJE, value_NJE))
        heads_first = (each.transpose(0, 1)[None] for each in (query_NHE[own], key, value))
        outputs.append(attend(*heads_first, scores)[0].transpose(0, 1))
        start += size
    return torch.cat(outputs)


def attend(query_BHSE: Tensor, key_BJKE: Tensor, value_BJKE: Tensor, scores: Scores) -> Tensor:
    """Causal attention whose queries are the last of the keys' own, (B, H, S, E of the values)."""
    (H, S), (J, K) = query_BHSE.shape[1:3], key_BJKE.shape[1:3]
    key, value = (each.repeat_interleave(H // J, 1) for each in (key_BJKE, value_BJKE))
    visible_SK = torch.ones(S, K, dtype=torch.bool, device=key.device).tril(K - S)
    if scores.window is not None:
        visible_SK = visible_SK.triu(K - S - scores.window + 1)
    if scores.soft_cap is None and scores.sink_H is None:
        return F.scaled_dot_product_attention(query_BHSE, key, value, attn_mask=visible_SK, scale=scores.scale)
    score_BHSK = (query_BHSE @ key.transpose(2, 3)).float() * scores.scale
    weight_BHSK = softmax(score_BHSK, visible_SK, scores)
    return weight_BHSK.to(value.dtype) @ value


def softmax(score: Tensor, visible: Tensor | None, scores: Scores) -> Tensor:
    """Weights of scaled scores (batch, H, queries, keys) under the soft cap and the sinks."""
    if scores.soft_cap is not None:
        score = scores.soft_cap * torch.tanh(score / scores.soft_cap)
    if visible is not None:
        score = score.masked_fill(~visible, -torch.inf)
    if scores.sink_H is None:
        return score.softmax(-1)
    sink = scores.sink_H.to(score.dtype)[:, None, None].expand(*score.shape[:-1], 1)
    return torch.cat([score, sink], -1).softmax(-1)[..., :-1]


def prompt_rows(layout: SharedPrefixLayout) -> dict[int, slice]:
    """Rows of the prompt a list belongs to, keyed by the first row of the list."""
    if layout.cross is None:
        return {}
    prompts: dict[int, slice] = {}
    spans = iter(layout.own.q_sizes[len(layout.cross.k_sizes) :])
    row, prompt_start = layout.cross_rows.start, 0
    for num_queries, num_keys in zip(layout.cross.q_sizes, layout.cross.k_sizes, strict=True):
        group_end = row + num_queries
        while row < group_end:
            prompts[row] = slice(prompt_start, prompt_start + num_keys)
            row += next(spans)
        prompt_start += num_keys
    return prompts
