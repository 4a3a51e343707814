"""Sampling through transformers' own generate and the model's own cache: right for every family that it generates with.

It serves the models whose layers our grouped cache does not know: recurrent and convolutional ones, chunks, caches of
their own. Seeds, uniforms and results are those of the samplers whose place it takes; every list reads its prompt anew,
so it is slower.
"""

# Shape letters: P prompts, G lists a prompt, B = P*G, L prompt tokens (padded), T sampled tokens, V vocabulary.
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from rankgrpo.model.constraint import Constraint
from rankgrpo.sampler.constrained import List, draw_segments
from rankgrpo.sampler.hf import HFSampler


class OwnCacheSampler(HFSampler):
    """An HFSampler over the model's own cache.

    attention: the implementation that decodes. padded: prompts of different lengths share a batch, padded on the left;
    False: only prompts of one length do. cached: False reads the whole list anew for every token.
    """

    attend = None

    def __init__(
        self, model, tokenizer, *, attention: str = "sdpa", padded: bool = True, cached: bool = True, **options
    ):
        super().__init__(model, tokenizer, **options)
        self.attention, self.padded, self.cached = attention, padded, cached

    def _decode(self, prompts, seen, group_size: int, uniform_BT: Tensor, temperature: float):
        ids: list[list[int]] = [[] for _ in range(len(uniform_BT))]
        logps: list[list[float]] = [[] for _ in range(len(uniform_BT))]
        together: dict[int, list[int]] = {}
        for p, prompt in enumerate(prompts):
            together.setdefault(0 if self.padded else len(prompt), []).append(p)
        for chosen in together.values():
            rows = [p * group_size + g for p in chosen for g in range(group_size)]
            drawer = self._drawer(
                [seen[p] for p in chosen for _ in range(group_size)],
                uniform_BT[rows].to(self.model.device),
                temperature,
            )
            self._generate([prompts[row // group_size] for row in rows], drawer, uniform_BT.shape[1])
            for row, own_ids, own_logps in zip(rows, *drawer.results(), strict=True):
                ids[row], logps[row] = own_ids, own_logps
        return ids, logps

    def _generate(self, prompts: list[list[int]], drawer: Drawer, max_new_tokens: int) -> None:
        longest, pad, device = max(map(len, prompts)), self.tokenizer.pad_token_id, self.model.device
        ids_BL = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
        real_BL = torch.tensor([[s >= longest - len(p) for s in range(longest)] for p in prompts], device=device)
        self.model.generate(
            ids_BL,
            attention_mask=real_BL.long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=self.cached,
            logits_processor=[drawer],
            eos_token_id=self.eos_ids,
            pad_token_id=pad,
        )

    def _drawer(self, seen: list[Sequence[int]], uniform_BT: Tensor, temperature: float) -> Drawer:
        return Drawer(self, uniform_BT, temperature)


class Drawer(LogitsProcessor):
    """Draws every token by the list's uniforms, and leaves generate nothing but that token to choose."""

    def __init__(self, sampler: OwnCacheSampler, uniform_BT: Tensor, temperature: float):
        self.sampler, self.uniform_BT, self.temperature = sampler, uniform_BT, temperature
        self.drawn: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform_B = self.uniform_BT[:, len(self.drawn)]
        token_B, logp_B = self.sampler._draw_from(self.sampler._ban(scores.float()), uniform_B, self.temperature)
        self.drawn.append((token_B, logp_B))
        return only(scores, token_B)

    def results(self) -> tuple[list[list[int]], list[list[float]]]:
        """Ids and log-probs of every list, up to its first end."""
        ids = torch.stack([token for token, _ in self.drawn], 1).tolist()
        logps = torch.stack([logp for _, logp in self.drawn], 1).tolist()
        ends = [next((t + 1 for t, i in enumerate(row) if i in self.sampler.eos_ids), len(row)) for row in ids]
        cut = list(zip(ids, logps, ends, strict=True))
        return [row[:end] for row, _, end in cut], [row[:end] for _, row, end in cut]


class ConstrainedOwnCacheSampler(OwnCacheSampler):
    """A ConstrainedSampler over the model's own cache: forced tokens pass one by one, and every list a token a step."""

    def __init__(self, model, tokenizer, constraint: Constraint, **options):
        super().__init__(model, tokenizer, **options)
        self.constraint = constraint

    def _num_draws(self, max_new_tokens: int) -> int:
        return self.constraint.max_tokens

    def _drawer(self, seen: list[Sequence[int]], uniform_BT: Tensor, temperature: float) -> Drawer:
        return ConstrainedDrawer(self, seen, uniform_BT, temperature)


class ConstrainedDrawer(Drawer):
    """A Drawer over the ids that the catalog allows each list."""

    def __init__(self, sampler: ConstrainedOwnCacheSampler, seen, uniform_BT: Tensor, temperature: float):
        super().__init__(sampler, uniform_BT, temperature)
        self.lists = [List(sampler.constraint.start(items), row) for row, items in enumerate(seen)]
        self.num_passed = 0
        for each in self.lists:
            each.take_forced(each.walk.follow())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        t, self.num_passed = self.num_passed, self.num_passed + 1
        choosing = [each for each in self.lists if len(each.ids) == t and not each.walk.done]
        if choosing:
            self._choose(choosing, scores)
        token_B = [each.ids[t] if t < len(each.ids) else self.sampler.eos_ids[0] for each in self.lists]
        return only(scores, torch.tensor(token_B, device=scores.device))

    def _choose(self, lists: list[List], scores: Tensor) -> None:
        trie, parts, sizes, begins = lists[0].walk.trie, [], [], []
        for each in lists:
            begin, end, closed = each.walk.children()
            ids = torch.from_numpy(trie.token[begin:end].astype(np.int64)).to(scores.device)
            logits = scores[each.row, ids].float()
            logits[[child - begin for child in closed]] = -torch.inf
            parts.append(logits)
            begins.append(begin)
            sizes.append(end - begin)
        size_W = torch.tensor(sizes, device=scores.device)
        uniform_W = self.uniform_BT[[each.row for each in lists], [each.num_choices for each in lists]]
        chosen_W, logp_W = draw_segments(
            torch.cat(parts), size_W.cumsum(0) - size_W, size_W, uniform_W, self.temperature
        )
        for each, begin, place, logp in zip(lists, begins, chosen_W.tolist(), logp_W.tolist(), strict=True):
            each.take(int(trie.token[begin + place]), logp)

    def results(self) -> tuple[list[list[int]], list[list[float]]]:
        return [each.ids for each in self.lists], [each.logp for each in self.lists]


def only(scores: Tensor, token_B: Tensor) -> Tensor:
    """Scores under which each row has one id to choose."""
    return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)
