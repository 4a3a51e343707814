"""Recurrent and convolutional layers over a pack: each prompt once, its final state forked to its lists.

Attention reads a prompt through its keys. A recurrent layer reads it through a state, S_t = f(S_{t-1}, x_t), and a
causal convolution of width k through the last k - 1 inputs. So a list that begins with the state and the last inputs of
its prompt is computed as if the whole prompt stood before it, and the gradients of all lists add up in the prompt's.

In transformers such a layer computes its projections, gates and norms row by row, for which the flat row of a pack is
as good as any. Place matters only in functions that its forward calls by name: `causal_conv1d_fn` and one scan. Each
layer found in a model gets a forward of its own in which these names mean the functions below; they read the pack's
layout from a context, which `pack_logprobs` and the recomputation of activation checkpointing open. A scan sees padded
batches: prompts (and whole sequences of one-list groups) from an empty state, then lists from their prompt's, with
steps that change nothing where a row is padded.
"""

# Shape letters: N packed tokens, R sequences of a batch, W its width, C channels, M rows whose window leaves their
# span, k width of a convolution.

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType, MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rankgrpo.model.by_sequence import prompt_rows
from rankgrpo.model.packing import SharedPrefixLayout

CONVOLUTION = "causal_conv1d_fn"
FUSED = {"mamba2_split_conv1d_scan_combined", "mamba_inner_fn"}
"""Functions that compute a whole layer where a kernel is installed, and else return None, after which the parts are."""
STEP = 64
"""Tokens by which the scans go. Sequences whose numbers of steps are alike share a batch."""
ALIKE = 0.75

_layout: ContextVar[SharedPrefixLayout | None] = ContextVar("rankgrpo_layout", default=None)


@contextmanager
def reading(layout: SharedPrefixLayout | None) -> Iterator[None]:
    """Inside, recurrent layers of packed models compute the pack of this layout."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def read_again() -> tuple[AbstractContextManager, AbstractContextManager]:
    """context_fn of torch.utils.checkpoint: the recomputation reads the layout of its own forward."""
    return nullcontext(), reading(_layout.get())


def fork_states(model: nn.Module, attention: str) -> None:
    """Let every layer that this module knows compute packs while the model's attention is `attention`.

    Layers of other kinds are left alone; `pack_logprobs` counts those that took part.
    """
    for module in model.modules():
        if "fork_with" in vars(module):
            continue
        forward = inspect.unwrap(type(module).forward)
        if names := _functions_by_place(forward):
            module.fork_with = model.config
            module.forward = MethodType(_forward_of(type(module).forward, forward, names, attention), module)


def _functions_by_place(forward: Callable) -> list[str]:
    """The convolution and the scan that a layer's forward calls; none where it is no such layer, or an unknown one."""
    called = getattr(forward, "__code__", None) and forward.__code__.co_names
    if not called or CONVOLUTION not in called:
        return []
    scans = [name for name in SCANS if name in called]
    has_state = "update_recurrent_state" in called
    return [CONVOLUTION, *scans] if len(scans) == has_state else []


def _forward_of(plain: Callable, inner: Callable, names: Sequence[str], attention: str) -> Callable:
    known = inner.__globals__
    replaced = {name: (lambda *args, **kwargs: None) for name in FUSED if name in known}
    replaced |= {name: _counted(_BY_PLACE[name], known[name]) for name in names}
    packed = FunctionType(inner.__code__, {**known, **replaced}, inner.__name__, inner.__defaults__, inner.__closure__)
    packed.__kwdefaults__ = inner.__kwdefaults__

    def forward(self, *args, **kwargs):
        layout = _layout.get()
        if self.fork_with._attn_implementation != attention:
            if layout is not None:
                raise ValueError(
                    "a packed forward, or its recomputation in backward, ran inside ordinary_attention(model): "
                    "leave it first"
                )
            return plain(self, *args, **kwargs)
        if layout is None:
            raise ValueError(
                f"{type(self).__name__} of a packed model was called without a layout: run packs through "
                "rankgrpo.model.forward.pack_logprobs, recompute them with rankgrpo.model.recurrent.read_again, "
                "and run dense forwards inside rankgrpo.model.attention.ordinary_attention(model)"
            )
        before = layout.num_forked
        out = packed(self, *args, **kwargs)
        if layout.num_forked - before != len(names):
            raise ValueError(f"{type(self).__name__} did not compute by {' and '.join(names)}: not supported")
        layout.num_calls += 1
        return out

    return forward


def _counted(by_place: Callable, function: Callable) -> Callable:
    """`by_place` of the current layout's forks, for `function` of transformers."""

    def replacement(*args, **kwargs):
        layout = _layout.get()
        layout.num_forked += 1
        return by_place(forks_of(layout), function, *args, **kwargs)

    return replacement


# ---- where the sequences of a pack lie -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of like length: R rows of W slots; `begins_R` are the places, among all roots, of their prompts."""

    num_rows: int
    width: int
    begins_R: Tensor | None


class Forks:
    """Where the sequences of a layout lie in padded batches: roots, which begin empty, before lists, which do not.

    slot_N: the slot of every row. row_of_slot: the row of every slot, 0 where it is padding, and then in pad_slots.
    """

    def __init__(self, layout: SharedPrefixLayout) -> None:
        self.device = layout.own.cu_q.device
        sizes = layout.own.q_sizes
        starts = [0]
        for size in sizes[:-1]:
            starts.append(starts[-1] + size)
        prompts = prompt_rows(layout)
        self.spans = list(zip(starts, sizes, strict=True))
        self.prompt_of = {start: rows.stop for start, rows in prompts.items()}
        roots = [span for span in self.spans if span[0] not in prompts]
        lists = [span for span in self.spans if span[0] in prompts]
        self.roots: list[Batch] = []
        self.lists: list[Batch] = []
        self._windows: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        slots: list[int] = []
        place: dict[int, int] = {}  # by where a root ends
        for alike in _alike(roots):
            for start, size in alike:
                place[start + size] = len(place)
            self.roots.append(self._lay_out(alike, slots, None))
        for alike in _alike(lists):
            begins = [place[self.prompt_of[start]] for start, _ in alike]
            self.lists.append(self._lay_out(alike, slots, torch.tensor(begins, device=self.device)))
        rows = torch.tensor(slots, device=self.device)
        self.pad_slots = (rows < 0).nonzero()[:, 0]
        self.row_of_slot = rows.clamp(min=0)
        self.slot_N = torch.empty(layout.num_tokens, dtype=torch.int64, device=self.device)
        real = (rows >= 0).nonzero()[:, 0]
        self.slot_N[rows[real]] = real

    def _lay_out(self, spans: list[tuple[int, int]], slots: list[int], begins_R: Tensor | None) -> Batch:
        width = max(size for _, size in spans)
        for start, size in spans:
            slots += [*range(start, start + size), *[-1] * (width - size)]
        return Batch(len(spans), width, begins_R)

    def pad(self, flat: Tensor) -> list[Tensor]:
        """(N, ...) as a batch (R, W, ...) for each of `roots` and then of `lists`, 0 where nothing is."""
        padded = _Move.apply(flat, self.row_of_slot, self.pad_slots, self.slot_N, None)
        batches = [*self.roots, *self.lists]
        parts = padded.split([batch.num_rows * batch.width for batch in batches])
        return [part.unflatten(0, (batch.num_rows, batch.width)) for part, batch in zip(parts, batches, strict=True)]

    def unpad(self, parts: list[Tensor]) -> Tensor:
        """What `pad` was given, from what it gave."""
        padded = torch.cat([part.flatten(0, 1) for part in parts])
        return _Move.apply(padded, self.slot_N, None, self.row_of_slot, self.pad_slots)

    def windows(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows whose `width` last rows are not the flat row's: (M,), those rows (M, k), and where there is none."""
        if width not in self._windows:
            rows, sources = [], []
            for start, size in self.spans:
                end = self.prompt_of.get(start)
                before = [] if end is None else list(range(self._start_of_root(end), end))
                before = [-1] * (width - 1) + before
                chain = before[len(before) - width + 1 :] + list(range(start, start + min(size, width - 1)))
                for i in range(min(size, width - 1)):
                    rows.append(start + i)
                    sources.append(chain[i : i + width])
            sources_Mk = torch.tensor(sources, device=self.device).view(-1, width)
            self._windows[width] = torch.tensor(rows, device=self.device), sources_Mk.clamp(min=0), sources_Mk < 0
        return self._windows[width]

    def _start_of_root(self, end: int) -> int:
        return next(start for start, size in self.spans if start + size == end)


def forks_of(layout: SharedPrefixLayout) -> Forks:
    """The forks of a layout, computed once."""
    if layout.forks is None:
        layout.forks = Forks(layout)
    return layout.forks


def _alike(spans: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Spans by falling size, in parts whose numbers of steps are alike."""
    parts: list[list[tuple[int, int]]] = []
    for span in sorted(spans, key=lambda span: -span[1]):
        if not parts or _steps(span) < ALIKE * _steps(parts[-1][0]):
            parts.append([])
        parts[-1].append(span)
    return parts


def _steps(span: tuple[int, int]) -> int:
    return -(-span[1] // STEP)


class _Move(torch.autograd.Function):
    """Rows `there` of a tensor, 0 at the places `empty`. `back` undoes it, so the gradient is no sum over an index."""

    @staticmethod
    def forward(ctx, x, there, empty, back, back_empty):
        ctx.back, ctx.back_empty = back, back_empty
        return _take(x, there, empty)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _take(grad, ctx.back, ctx.back_empty), None, None, None, None


def _take(x: Tensor, rows: Tensor, empty: Tensor | None) -> Tensor:
    out = x.index_select(0, rows)
    return out if empty is None or not len(empty) else out.index_fill_(0, empty, 0)


def _scan(forks: Forks, tensors: Sequence[Tensor], scan: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """(N, ...) of a scan over tensors (N, ...): scan(*batches, initial_state, width) gives outputs and final states."""
    batches = list(zip(*(forks.pad(tensor) for tensor in tensors), strict=True))
    outs, finals = [], []
    for batch, padded in zip(forks.roots, batches, strict=False):
        out, final = scan(*padded, None, batch.width)
        outs.append(out)
        finals.append(final)
    if forks.lists:
        states = torch.cat(finals)
        for batch, padded in zip(forks.lists, batches[len(forks.roots) :], strict=True):
            outs.append(scan(*padded, states.index_select(0, batch.begins_R), batch.width)[0])
    return forks.unpad(outs)


def _chunk(width: int, most: int) -> int:
    """Tokens of a chunk: no more than `most`, and for short sequences no more than the power of 2 that holds them."""
    return min(most, max(16, 1 << (width - 1).bit_length()))


# ---- the functions in which place matters, one a kind ---------------------------------------------------------------


def convolve(forks: Forks, function: Callable, hidden_1CN, weight, bias=None, activation=None, **kwargs) -> Tensor:
    """The causal depthwise convolution of a pack, y_n = act(b + sum_j w_j x_{n-j}), (1, C, N).

    The flat row is convolved as it is, and the first k - 1 rows of every span again, over the rows that precede them.
    """
    out_1CN = function(hidden_1CN, weight, bias, activation=activation)
    rows_M, sources_Mk, none_Mk = forks.windows(weight.shape[-1])
    if not len(rows_M):
        return out_1CN
    window_MkC = hidden_1CN[0].t().index_select(0, sources_Mk.flatten()).unflatten(0, sources_Mk.shape)
    window_MCk = window_MkC.masked_fill(none_Mk[..., None], 0).transpose(1, 2)
    first_MC = function(window_MCk, weight, bias, activation=activation)[..., -1]
    return out_1CN.index_copy(2, rows_M, first_MC.t()[None].to(out_1CN.dtype))


def gated_delta_rule(forks: Forks, function: Callable, query, key, value, *, g, beta, **kwargs) -> tuple[Tensor, None]:
    """S_t = S_{t-1} exp(g_t) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = S_t q_t (arXiv 2412.06464).

    exp(g_t) is a number a head, or a diagonal matrix over the channels of k_t (arXiv 2510.26692). Steps with g = 0 and
    beta = 0 leave a state as it is.
    """
    options = {name: kwargs[name] for name in ("use_qk_l2norm_in_kernel",) if name in kwargs}

    def scan(query, key, value, g, beta, state, width):
        return function(
            query, key, value, g=g, beta=beta, initial_state=state, output_final_state=True,
            chunk_size=_chunk(width, STEP), **options,
        )  # fmt: skip

    return _scan(forks, [tensor[0] for tensor in (query, key, value, g, beta)], scan)[None], None


def state_space_scan(
    forks: Forks, function: Callable, hidden_states, dt, A, B, C, *, chunk_size, D=None, dt_bias=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), **kwargs,
) -> Tensor:  # fmt: skip
    """Mamba-2: S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T, y_t = C_t S_t + D x_t (arXiv 2405.21060).

    Steps with dt = 0 leave a state as it is, so dt is made of its bias and bounds before it is padded.
    """
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)

    def scan(hidden_states, dt, B, C, state, width):
        return function(
            hidden_states, dt, A, B, C, chunk_size=_chunk(width, chunk_size), D=D, z=None, initial_states=state,
            return_final_states=True,
        )  # fmt: skip

    return _scan(forks, [tensor[0] for tensor in (hidden_states, dt, B, C)], scan)[None]


SCANS = {
    "torch_chunk_gated_delta_rule": gated_delta_rule,
    "chunk_kimi_delta_attention": gated_delta_rule,
    "mamba2_chunk_scan": state_space_scan,
}
_BY_PLACE = {CONVOLUTION: convolve, **SCANS}
