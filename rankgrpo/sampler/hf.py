"""Grouped sampling with a transformers model, for machines without vLLM.

The prompt is read once: its keys and values are kept once a prompt and shared by its G lists, which own only the keys
of the tokens they sampled. Every list draws its tokens by inversion from uniforms that are fixed by its prompt's seed,
so neither the batch nor the order in which lists finish changes what is drawn.

It has no paged cache, no continuous batching and no tensor parallelism; that is what vLLM is for.
"""

# Shape letters: P prompts, G lists a prompt, B = P*G, L prompt tokens (padded), T sampled tokens, V vocabulary,
# N key-value heads, R query heads a key-value head, H head size; p and l are P and L of the prompts read at once.
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rankgrpo.errors import SamplingError
from rankgrpo.model.autocast import in_autocast_type
from rankgrpo.model.by_sequence import Scores, attend, read_scores, softmax
from rankgrpo.model.decoder import Decoder
from rankgrpo.model.head import PLAIN, LogitMap, forward_replaced, output_head
from rankgrpo.sampler.base import Rollout, check_prompts, eos_token_ids
from rankgrpo.thoughts import list_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_NAME = "rankgrpo_decode"
PROMPTS_READ = 8  # at a time


class PromptCache:
    """Keys and values of P prompts, once each."""

    def __init__(self, prompt_len_P: Tensor):
        self.reading: slice | None = None
        """The prompts that are being read; None while tokens are sampled."""
        longest = int(prompt_len_P.max())
        padding_PL = torch.arange(longest, device=prompt_len_P.device)[None] >= prompt_len_P[:, None]
        # None when all prompts have one length: the usual case of a single long group, and the fast one.
        self.padding_PL = padding_PL if bool(padding_PL.any()) else None
        self.prompt_shape = (len(prompt_len_P), longest)
        self.prompt: dict[int, tuple[Tensor, Tensor]] = {}

    def store_prompts(self, layer: int, key_pNlH: Tensor, value_pNlH: Tensor) -> None:
        """Store keys and values of the prompts that are being read, which may be padded to less than the longest."""
        if layer not in self.prompt:
            (P, L), N = self.prompt_shape, key_pNlH.shape[1]
            # Zeros, for what padding holds is multiplied by a weight of 0. Contiguous, for else every decoding step
            # would copy them before its product.
            self.prompt[layer] = tuple(new.new_zeros(P, N, L, new.shape[-1]) for new in (key_pNlH, value_pNlH))
        for stored_PNLH, new_pNlH in zip(self.prompt[layer], (key_pNlH, value_pNlH), strict=True):
            stored_PNLH[self.reading, :, : new_pNlH.shape[2]] = new_pNlH

    def keep_prompts(self, prompts: Tensor) -> None:
        """Drop the prompts that are not listed."""
        self.prompt = {
            layer: (k.index_select(0, prompts), v.index_select(0, prompts)) for layer, (k, v) in self.prompt.items()
        }
        self.padding_PL = None if self.padding_PL is None else self.padding_PL[prompts]


class GroupedCache(PromptCache):
    """Keys and values of P prompts (once each) and of the tokens their B = P*G lists have sampled so far."""

    def __init__(self, prompt_len_P: Tensor, group_size: int, max_new_tokens: int):
        super().__init__(prompt_len_P)
        self.group_size = group_size
        self.prompt_len_P = prompt_len_P
        self.capacity = max_new_tokens
        self.num_sampled = 0
        self.sampled: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key_BN1H: Tensor, value_BN1H: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token's keys and values; returns those of all sampled tokens, this one included."""
        if layer not in self.sampled:
            B, N = key_BN1H.shape[:2]
            self.sampled[layer] = tuple(
                new.new_empty(B, N, self.capacity, new.shape[-1]) for new in (key_BN1H, value_BN1H)
            )
        key_BNTH, value_BNTH = self.sampled[layer]
        key_BNTH[:, :, self.num_sampled] = key_BN1H[:, :, 0]
        value_BNTH[:, :, self.num_sampled] = value_BN1H[:, :, 0]
        end = self.num_sampled + 1
        return key_BNTH[:, :, :end], value_BNTH[:, :, :end]

    def unseen(self, window: int | None) -> Tensor | None:
        """(P, L) bool: what the tokens decoded now do not see of their prompts; None when they see all."""
        L = self.prompt_shape[1]
        if window is None or window > L + self.num_sampled:
            return self.padding_PL
        first_P = self.prompt_len_P + (self.num_sampled - window + 1)
        old_PL = torch.arange(L, device=first_P.device) < first_P[:, None]
        return old_PL if self.padding_PL is None else old_PL | self.padding_PL

    def keep_groups(self, groups: Tensor) -> None:
        """Drop the prompts that are not listed, with their lists: a finished group costs nothing more."""
        rows = (groups[:, None] * self.group_size + torch.arange(self.group_size, device=groups.device)).flatten()
        self.keep_prompts(groups)
        self.prompt_len_P = self.prompt_len_P[groups]
        self.sampled = {layer: (k[rows], v[rows]) for layer, (k, v) in self.sampled.items()}


def grouped_attention(
    module, query, key, value, attention_mask, *, scaling, grouped_cache: GroupedCache, sliding_window=None, **kwargs
):
    """Attention of a prefill (prompts, causal) or of one decoded token over [prompt keys ; own keys]."""
    layer = module.layer_idx
    query, key, value = in_autocast_type(query, key, value)  # once, or every step would round the whole cache again
    scores = read_scores(scaling, sliding_window, kwargs)
    if grouped_cache.reading is not None:
        return read_prompts(layer, query, key, value, scores, grouped_cache), None
    key_PNLH, value_PNLH = grouped_cache.prompt[layer]
    key_BNTH, value_BNTH = grouped_cache.append(layer, key, value)
    (B, heads, _, H), (P, N, L, _) = query.shape, key_PNLH.shape
    G, R = B // P, heads // N
    query_BNRH = query.reshape(B, N, R, H) * scaling
    # The lists of one prompt read the same keys: fold them into the rows of one matrix product.
    query_PNgH = query_BNRH.view(P, G, N, R, H).transpose(1, 2).reshape(P, N, G * R, H)
    score_PNgL = query_PNgH @ key_PNLH.transpose(2, 3)
    unseen_PL = grouped_cache.unseen(scores.window)
    score_BNRL = score_PNgL.view(P, N, G, R, L).transpose(1, 2).reshape(B, N, R, L)
    score_BNRT = query_BNRH @ key_BNTH.transpose(2, 3)
    score = torch.cat([score_BNRL, score_BNRT], dim=-1).float()
    visible = None
    if unseen_PL is not None or (scores.window is not None and key_BNTH.shape[2] > scores.window):
        T = key_BNTH.shape[2]
        old_T = torch.arange(T, device=score.device) < (T - scores.window if scores.window is not None else 0)
        unseen_PL = unseen_PL if unseen_PL is not None else score.new_zeros(P, L, dtype=torch.bool)
        visible = ~torch.cat([unseen_PL, old_T.expand(P, T)], 1).repeat_interleave(G, 0)[:, None, None]
    weight = softmax(score.view(B, heads, 1, -1), visible, scores).view(score.shape).to(value.dtype)
    weight_PNgL = weight[..., :L].view(P, G, N, R, L).transpose(1, 2).reshape(P, N, G * R, L)
    out_BNRH = (weight_PNgL @ value_PNLH).view(P, N, G, R, -1).transpose(1, 2).reshape(B, N, R, -1)
    out_BNRH = out_BNRH + weight[..., L:] @ value_BNTH
    return out_BNRH.reshape(B, 1, heads, value.shape[-1]), None


def read_prompts(layer: int, query, key, value, scores: Scores, cache: PromptCache) -> Tensor:
    """Attention of the prompts that are being read, whose keys and values are stored."""
    # Prompts are padded on the right, so causality alone keeps real tokens from seeing padding.
    cache.store_prompts(layer, key, value)
    if not scores.plain(key.shape[2]):
        return attend(query, key, value, scores).transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scores.scale, enable_gqa=True
    )
    return out.transpose(1, 2)


@contextmanager
def attention_of_decoding(model: PreTrainedModel | Decoder, name: str, attend: Callable | None) -> Iterator[None]:
    """The model with `attend` as its attention, which transformers knows under `name`; None: it has that itself."""
    if isinstance(model, Decoder):
        model.attend = attend
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if attend is not None:
        ALL_ATTENTION_FUNCTIONS.register(name, attend)
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


class HFSampler:
    """Sampler over a transformers causal language model that shares its weights with the trainer.

    `allowed_V` (bool, one entry an id) marks the ids that may be sampled; log-probabilities are normalised over them.
    `rows` bounds the lists decoded at once. `autocast` is "bfloat16" or None. `weights` gives the model's parameters by
    name for as long as lists are sampled: those of a trainer that splits its own among processes, which wait for each
    other here and not between two tokens. `logit_map`: what the model does to its head's product.
    """

    owns_weights = False
    attention = ATTENTION_NAME
    attend = staticmethod(grouped_attention)

    def __init__(
        self,
        model: PreTrainedModel | Decoder,
        tokenizer,
        *,
        allowed_V: Tensor | None = None,
        rows: int = 256,
        autocast: str | None = None,
        weights: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
        logit_map: LogitMap | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.eos_ids, self.decode = eos_token_ids(model, tokenizer), list_decoder(tokenizer)
        self.banned_V = None if allowed_V is None or bool(allowed_V.all()) else ~allowed_V.to(model.device)
        self.rows, self.autocast, self.weights = rows, autocast, weights
        self.logit_map = logit_map or PLAIN

    @torch.no_grad()
    def sample(
        self,
        prompts: list[list[int]],
        *,
        group_size: int,
        seeds: list[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        seen: Sequence[Sequence[int]] | None = None,
        on_progress: Callable[[int], object] | None = None,
    ) -> list[list[Rollout]]:
        """Sample `group_size` completions a prompt; `on_progress(n)` hears of every n prompts that are done."""
        check_prompts(prompts, seeds)
        if seen is not None and len(seen) != len(prompts):
            raise ValueError(f"expected the seen items of {len(prompts)} prompts, got those of {len(seen)}")
        # Prompts of like length share a batch; the result is put back into the order asked for.
        order = sorted(range(len(prompts)), key=lambda p: len(prompts[p]), reverse=True)
        per_batch = max(1, self.rows // group_size)
        groups: list[list[Rollout]] = [[] for _ in prompts]
        device_type = self.model.device.type
        enabled = self.autocast is not None
        with self._ready():
            for start in range(0, len(order), per_batch):
                chosen = order[start : start + per_batch]
                uniform_BT = torch.cat(
                    [draw_uniforms(seeds[p], group_size, self._num_draws(max_new_tokens)) for p in chosen]
                )
                chosen_seen = [() if seen is None else seen[p] for p in chosen]
                with torch.autocast(device_type, dtype=torch.bfloat16, enabled=enabled):
                    ids, logps = self._decode(
                        [prompts[p] for p in chosen], chosen_seen, group_size, uniform_BT, temperature
                    )
                for place, p in enumerate(chosen):
                    rows = range(place * group_size, (place + 1) * group_size)
                    groups[p] = [self._rollout(ids[row], logps[row]) for row in rows]
                if on_progress is not None:
                    on_progress(len(chosen))
        return groups

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """The model with its weights and the attention of decoding."""
        was_training = self.model.training
        parameters = dict(self.model.named_parameters()) if self.weights is not None else {}
        try:
            for name, tensor in self.weights() if self.weights is not None else ():
                parameters[name].data = tensor
            self.model.eval()
            with attention_of_decoding(self.model, self.attention, self.attend):
                yield
        finally:
            self.model.train(was_training)
            for parameter in parameters.values():
                parameter.data = parameter.new_empty(0)

    def sleep(self) -> None:
        """Nothing to give back: weights are the trainer's, keys and values live inside `sample`."""

    def wake(self) -> None: ...

    def _num_draws(self, max_new_tokens: int) -> int:
        """Uniforms that a list may take."""
        return max_new_tokens

    def _decode(
        self,
        prompts: list[list[int]],
        seen: list[Sequence[int]],
        group_size: int,
        uniform_BT: Tensor,
        temperature: float,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Ids and log-probabilities of `group_size` lists a prompt, one prompt's lists after the other's."""
        device = self.model.device
        B, max_new_tokens = uniform_BT.shape
        uniform_BT = uniform_BT.to(device)
        prompt_len_P = torch.tensor([len(prompt) for prompt in prompts], device=device)
        cache = GroupedCache(prompt_len_P, group_size, max_new_tokens)
        hidden_BD = self._read(prompts, cache).repeat_interleave(group_size, dim=0)

        eos = torch.tensor(self.eos_ids, device=device)
        ids_BT = torch.full((B, max_new_tokens), -1, device=device)
        logp_BT = torch.zeros(B, max_new_tokens, device=device)
        live = torch.arange(B, device=device)  # rows of ids_BT still decoded; whole groups
        done_B = torch.zeros(B, dtype=torch.bool, device=device)
        next_position_B = prompt_len_P.repeat_interleave(group_size)
        for t in range(max_new_tokens):
            token_B, token_logp_B = self._draw(hidden_BD, uniform_BT[live, t], temperature)
            ids_BT[live, t] = torch.where(done_B[live], -1, token_B)
            logp_BT[live, t] = torch.where(done_B[live], 0.0, token_logp_B)
            done_B[live] |= torch.isin(token_B, eos)
            open_groups = (~done_B[live].view(-1, group_size)).any(1)
            if t + 1 == max_new_tokens or not bool(open_groups.any()):
                break
            # Copying the cache costs about a decoding step, so drop finished groups a quarter at a time.
            if int(open_groups.sum()) <= 0.75 * len(open_groups):
                keep = open_groups.nonzero().flatten()
                cache.keep_groups(keep)
                live_PG = live.view(-1, group_size)[keep]
                token_B = token_B.view(-1, group_size)[keep].flatten()
                live = live_PG.flatten()
            hidden_B1D = self._hidden(token_B[:, None], (next_position_B[live] + t)[:, None], cache)
            hidden_BD = hidden_B1D[:, 0]
            cache.num_sampled += 1
        ids, logps = ids_BT.tolist(), logp_BT.tolist()
        lengths = (ids_BT >= 0).sum(1).tolist()
        return [row[:n] for row, n in zip(ids, lengths, strict=True)], [
            row[:n] for row, n in zip(logps, lengths, strict=True)
        ]

    def _read(self, prompts: list[list[int]], cache: PromptCache) -> Tensor:
        """Hidden state of every prompt's last token, (P, D). A few prompts at a time: the batch is sorted by length, so
        little of what is read is padding."""
        device, last_pD = self.model.device, []
        for start in range(0, len(prompts), PROMPTS_READ):
            part = prompts[start : start + PROMPTS_READ]
            cache.reading = slice(start, start + len(part))
            length_p = torch.tensor([len(prompt) for prompt in part], device=device)
            ids_pl = pad_sequence(
                [torch.tensor(prompt) for prompt in part], batch_first=True, padding_value=self.tokenizer.pad_token_id
            ).to(device)
            hidden_plD = self._hidden(ids_pl, torch.arange(ids_pl.shape[1], device=device)[None], cache)
            last_pD.append(hidden_plD[torch.arange(len(part), device=device), length_p - 1])
        cache.reading = None
        return torch.cat(last_pD)

    def _hidden(self, ids: Tensor, position_ids: Tensor, cache: PromptCache) -> Tensor:
        """What the head is given; some models divide it first."""
        if isinstance(self.model, Decoder):
            return self.model(ids, position_ids=position_ids, use_cache=False, grouped_cache=cache).last_hidden_state
        held: list[Tensor] = []
        with forward_replaced(output_head(self.model), lambda hidden: held.append(hidden) or hidden):
            self.model(ids, position_ids=position_ids, use_cache=False, grouped_cache=cache)
        return held[0]

    def _draw(self, hidden_BD: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The next token of every list and its log-probability."""
        logits_BV = self.logit_map(self.model.get_output_embeddings()(hidden_BD).float())
        return self._draw_from(self._ban(logits_BV), uniform_B, temperature)

    def _ban(self, logits_BV: Tensor) -> Tensor:
        return logits_BV if self.banned_V is None else logits_BV.masked_fill(self.banned_V, float("-inf"))

    def _draw_from(self, logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        if temperature not in (0, 1):
            logits_BV = logits_BV / temperature
        peak_B1 = logits_BV.amax(1, keepdim=True)
        weight_BV = (logits_BV - peak_B1).exp_()  # exp(0) at the peak: the sum is neither 0 nor infinite
        lse_B = peak_B1[:, 0] + weight_BV.sum(1).log()
        if not bool(lse_B.isfinite().all()):
            raise SamplingError("the model's logits are not finite: its weights are broken or training has diverged")
        if temperature == 0:
            token_B = logits_BV.argmax(1)
        else:
            cumulative_BV = weight_BV.cumsum_(1)
            total_B1 = cumulative_BV[:, -1:]
            # right=True never picks an id of probability 0 (its cumulative value equals the one before it), and the
            # threshold stays below the total, which the product may round up to.
            threshold_B1 = torch.minimum(uniform_B[:, None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
            token_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1)
        return token_B, logits_BV.gather(1, token_B[:, None]).squeeze(1) - lse_B

    def _rollout(self, ids: list[int], logp: list[float]) -> Rollout:
        text = self.decode(ids)
        return Rollout(ids, logp, text, finished=bool(ids) and ids[-1] in self.eos_ids)


def draw_uniforms(seed: int, group_size: int, max_new_tokens: int) -> Tensor:
    """(G, T) uniforms of one prompt, in [0, 1); list g's row does not depend on the number of lists."""
    rows = []
    for g in range(group_size):
        generator = torch.Generator().manual_seed((seed + g * 0x9E3779B97F4A7C15) % 2**63)
        rows.append(torch.rand(max_new_tokens, generator=generator))
    return torch.stack(rows)
