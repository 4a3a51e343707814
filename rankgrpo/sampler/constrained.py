"""Sampling lists that are held to the catalog, with a transformers model.

A token beside which the catalog allows no other is not drawn. When a token has been drawn, it and the forced ones after
it go through the model together, up to the last before the next choice; lists jump by different numbers of tokens and
go on together. What is forced up to the end of a list needs no pass at all: nothing is predicted from it.

The head multiplies the weights of allowed ids only. A list takes one uniform a choice: choice c of list g is decided by
number c of the uniforms that `draw_uniforms` fixes by the prompt's seed and g. No list is cut.
"""

# Shape letters: P prompts, B lists, C choices that a list may have, M new tokens of all lists, W lists that draw, V
# vocabulary, D hidden, R lists that draw at one node, K its children, F allowed ids of all lists, f of them at a time,
# X closed children.
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rankgrpo.errors import SamplingError
from rankgrpo.items.line_paths import ragged_range
from rankgrpo.items.walk import ListWalk
from rankgrpo.model.constraint import Constraint
from rankgrpo.model.head import PLAIN, LogitMap, output_head
from rankgrpo.sampler.hf import HFSampler
from rankgrpo.sampler.jump import ATTENTION_NAME, JumpCache, jump_attention

WIDE = 64  # a node with so many children is a dense product of its own
GATHERED_BYTES = 2**22  # of weights at a time


class ConstrainedSampler(HFSampler):
    """An HFSampler whose lists are lines of a catalog.

    Every rollout is finished. Log-probabilities are over the allowed ids, exactly 0 where there was one.
    """

    attention = ATTENTION_NAME
    attend = staticmethod(jump_attention)

    def __init__(self, model, tokenizer, constraint: Constraint, **options):
        super().__init__(model, tokenizer, **options)
        self.constraint = constraint
        output_head(model)

    def _num_draws(self, max_new_tokens: int) -> int:
        return self.constraint.max_tokens

    def _decode(
        self,
        prompts: list[list[int]],
        seen: list[Sequence[int]],
        group_size: int,
        uniform_BC: Tensor,
        temperature: float,
    ) -> tuple[list[list[int]], list[list[float]]]:
        device = self.model.device
        uniform_BC = uniform_BC.to(device)
        prompt_of_row = np.repeat(np.arange(len(prompts)), group_size)
        cache = JumpCache(torch.tensor([len(prompt) for prompt in prompts], device=device), prompt_of_row)
        starts = [self.constraint.start(items) for items in seen]
        lists = [List(starts[p].copy(), row) for row, p in enumerate(prompt_of_row.tolist())]
        hidden_BD = self._read(prompts, cache)[torch.from_numpy(prompt_of_row).to(device)]
        head = AllowedHead(output_head(self.model), temperature, self.logit_map)
        live = lists
        rows_kept = len(lists)
        pending = [each.walk.follow() for each in live]  # the catalog may force even how a list begins
        for each, run in zip(live, pending, strict=True):
            each.take_forced(run)
        while True:
            going = [i for i, each in enumerate(live) if not each.walk.done]
            if not going:
                break
            if len(going) < len(live):
                kept = torch.tensor(going, device=device)
                live, pending, hidden_BD = [live[i] for i in going], [pending[i] for i in going], hidden_BD[kept]
                # Copying the cache costs about a decoding step, so finished lists are dropped a quarter at a time.
                if len(live) <= 0.75 * rows_kept:
                    cache.keep_rows(np.array([each.row for each in live]))
                    rows_kept = len(live)
                    for row, each in enumerate(live):
                        each.row = row
            hidden_BD = self._jump(live, pending, hidden_BD, cache)
            uniform_W = uniform_BC[[each.number for each in live], [each.num_choices for each in live]]
            token_ids, logps = head.draw(hidden_BD, [each.walk for each in live], uniform_W)
            pending = [each.take(i, logp) for each, i, logp in zip(live, token_ids, logps, strict=True)]
        return [each.ids for each in lists], [each.logp for each in lists]

    def _jump(self, live: list[List], pending: list[list[int]], hidden_BD: Tensor, cache: JumpCache) -> Tensor:
        """Pass the pending tokens through the model; the hidden state of every list's last token."""
        moving = [i for i, run in enumerate(pending) if run]
        if not moving:
            return hidden_BD
        ids = [i for run in pending for i in run]
        rows = np.array([live[i].row for i in moving])
        jump = cache.plan(rows, np.array([len(pending[i]) for i in moving]))
        ids_1M = torch.tensor([ids], device=hidden_BD.device)
        hidden_WD = self._hidden(ids_1M, jump.position_M[None], cache)[0, jump.last_W]
        if len(moving) == len(live):
            return hidden_WD
        return hidden_BD.index_copy(0, torch.tensor(moving, device=hidden_BD.device), hidden_WD)


class List:
    """One list while it is decoded."""

    __slots__ = ("ids", "logp", "num_choices", "number", "row", "walk")

    def __init__(self, walk: ListWalk, number: int):
        self.walk, self.number, self.row = walk, number, number
        self.ids: list[int] = []
        self.logp: list[float] = []
        self.num_choices = 0

    def take(self, token_id: int, logp: float) -> list[int]:
        """Take a drawn id and what it forces; returns them."""
        self.walk.advance(token_id)
        run = self.walk.follow()
        self.ids.append(token_id)
        self.logp.append(logp)
        self.num_choices += 1
        self.take_forced(run)
        return [token_id, *run]

    def take_forced(self, run: list[int]) -> None:
        self.ids += run
        self.logp += [0.0] * len(run)


class AllowedHead:
    """Draws from softmax(weight hidden / temperature) over allowed ids; temperature 0 takes the likeliest.

    Lists at one node with many children share a dense product; others have their own ids' weights gathered.
    """

    def __init__(self, head: nn.Linear, temperature: float, logit_map: LogitMap = PLAIN):
        self.weight_VD, self.bias_V = head.weight, head.bias
        self.temperature, self.logit_map = temperature, logit_map
        self.root_weights: dict[int, Tensor] = {}

    def draw(self, hidden_WD: Tensor, walks: list[ListWalk], uniform_W: Tensor) -> tuple[list[int], list[float]]:
        """The next token of every list, none of which is done, and its log-probability."""
        device = hidden_WD.device.type
        if torch.is_autocast_enabled(device):
            product_type = torch.get_autocast_dtype(device)
        else:
            product_type = torch.promote_types(hidden_WD.dtype, self.weight_VD.dtype)
        with torch.autocast(device, enabled=False):  # it would round the sums too
            return self._draw(hidden_WD.to(product_type), walks, uniform_W)

    def _draw(self, hidden_WD: Tensor, walks: list[ListWalk], uniform_W: Tensor) -> tuple[list[int], list[float]]:
        trie, device = walks[0].trie, hidden_WD.device
        wide: dict[int, list[int]] = {}
        narrow: list[int] = []
        begins, ends, closed = [], [], []
        for w, walk in enumerate(walks):
            begin, end, closed_here = walk.children()
            begins.append(begin)
            ends.append(end)
            closed += [(w, child - begin) for child in closed_here]
            if end - begin >= WIDE:
                node = walk.node
                wide.setdefault(int(trie.like_root[node]) if node < trie.num_roots else node, []).append(w)
            else:
                narrow.append(w)
        begin_W = np.array(begins)
        size_W = np.array(ends) - begin_W
        order_W = np.array([w for rows in wide.values() for w in rows] + narrow)
        start_W = np.empty_like(size_W)  # of a list's ids among the F
        start_W[order_W] = np.cumsum(size_W[order_W]) - size_W[order_W]
        parts = [self._dense(hidden_WD[rows], node, trie).flatten() for node, rows in wide.items()]
        if narrow:
            parts.append(self._gathered(hidden_WD, narrow, begin_W[narrow], size_W[narrow], trie))
        logits_F = torch.cat(parts)
        if self.bias_V is not None:
            rows = [trie.token[begins[w] : ends[w]] for w in order_W.tolist()]
            ids_F = np.concatenate(rows).astype(np.int64)
            logits_F = logits_F + self.bias_V.float()[torch.from_numpy(ids_F).to(device)]
        logits_F = self.logit_map(logits_F)
        if closed:
            row_X, place_X = np.array(closed).T
            logits_F[torch.from_numpy(start_W[row_X] + place_X).to(device)] = -torch.inf
        ordered = torch.from_numpy(np.stack([start_W[order_W], size_W[order_W]])).to(device)
        uniform_W = uniform_W[torch.from_numpy(order_W).to(device)]
        chosen_W, logp_W = draw_segments(logits_F, ordered[0], ordered[1], uniform_W, self.temperature)
        place_W, logp = np.empty_like(begin_W), np.empty(len(walks))
        place_W[order_W], logp[order_W] = chosen_W.cpu().numpy(), logp_W.cpu().numpy()
        return trie.token[begin_W + place_W].tolist(), logp.tolist()

    def _dense(self, hidden_RD: Tensor, node: int, trie) -> Tensor:
        """Logits of lists at one node, (R, K)."""
        weight_KD = self.root_weights.get(node)
        if weight_KD is None:
            ids_K = trie.token[trie.first_child[node] : trie.first_child[node + 1]]
            weight_KD = self._rows(ids_K, hidden_RD)
            if node < trie.num_roots:
                self.root_weights[node] = weight_KD
        return (hidden_RD @ weight_KD.t()).float()

    def _gathered(self, hidden_WD: Tensor, rows: list[int], begin: np.ndarray, size: np.ndarray, trie) -> Tensor:
        """Logits of lists with few ids each, one list's after the other's."""
        ids_F = trie.token[ragged_range(begin, size)]
        row_F = torch.from_numpy(np.repeat(np.array(rows), size)).to(hidden_WD.device)
        step = max(1, GATHERED_BYTES // (4 * hidden_WD.shape[1]))
        parts = []
        for at in range(0, len(ids_F), step):
            weight_fD = self._rows(ids_F[at : at + step], hidden_WD).float()
            hidden_fD = hidden_WD.index_select(0, row_F[at : at + step]).float()
            parts.append(torch.linalg.vecdot(weight_fD, hidden_fD))
        return torch.cat(parts)

    def _rows(self, ids: np.ndarray, like: Tensor) -> Tensor:
        index = torch.from_numpy(ids.astype(np.int64)).to(like.device)
        return self.weight_VD.index_select(0, index).to(like.dtype)


def draw_segments(
    logits_F: Tensor, start_W: Tensor, size_W: Tensor, uniform_W: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Draw one entry of every segment by inversion: its place in the segment, and its log-probability.

    Segments lie one after the other in order, none empty; an entry of -inf is not drawn. Temperature 0 takes the
    greatest.
    """
    if temperature not in (0, 1):
        logits_F = logits_F / temperature
    num_rows, end_W = len(size_W), start_W + size_W
    row_F = torch.arange(num_rows, device=logits_F.device).repeat_interleave(size_W, output_size=len(logits_F))
    peak_W = logits_F.new_full((num_rows,), -torch.inf).scatter_reduce_(0, row_F, logits_F, "amax")
    # The sums of all segments run on in float64, so that a segment's own are exact far beyond float32.
    cumulative_F = (logits_F - peak_W.index_select(0, row_F)).exp_().cumsum(0, dtype=torch.float64)
    below_W = cumulative_F[(start_W - 1).clamp_(min=0)].where(start_W > 0, 0.0)
    total_W = cumulative_F[end_W - 1] - below_W
    lse_W = peak_W + total_W.log().to(peak_W.dtype)
    if not bool(lse_W.isfinite().all()):
        raise SamplingError("the model's logits are not finite: its weights are broken or training has diverged")
    if temperature == 0:
        place_F = torch.arange(len(logits_F), device=logits_F.device)
        peaks_F = torch.where(logits_F == peak_W[row_F], place_F, len(logits_F))
        chosen_W = peaks_F.new_full((num_rows,), len(logits_F)).scatter_reduce_(0, row_F, peaks_F, "amin")
    else:
        # As in HFSampler: no entry of probability 0 is picked, and the threshold stays below the segment's end.
        top_W = cumulative_F[end_W - 1]
        threshold_W = torch.minimum(below_W + uniform_W * total_W, top_W.nextafter(torch.zeros_like(top_W)))
        chosen_W = torch.searchsorted(cumulative_F, threshold_W, right=True)
    return chosen_W - start_W, logits_F[chosen_W] - lse_W
