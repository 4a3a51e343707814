"""What a model does to the product of its head: a bias, a scale and a soft cap, found out by trying.

    logits = c tanh(s (W h + b) / c), or s (W h + b) without a cap

Granite and Cohere scale, Gemma 2 and NanoChat cap, Phi has a bias. No name is asked for: the head is replaced by one
that returns known numbers, and what the model makes of them is fitted and checked. The scale and the cap reach the
streamed heads as a temperature of T / s and a cap of c / s, the bias as one more column of weights.
"""

# Shape letters: V vocabulary, D hidden, N tokens.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rankgrpo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankgrpo.model.decoder import Decoder
    from rankgrpo.model.plain_tokenizer import PlainTokenizer

TOLERANCE = 1e-4
"""Relative; half precision in a model's last step is beyond it, and refused."""


@dataclass(frozen=True, slots=True)
class LogitMap:
    """What comes after the head's product."""

    scale: float = 1.0
    soft_cap: float | None = None

    def options(self, temperature: float) -> dict[str, float | None]:
        """temperature and soft_cap of a streamed head whose logits are `self` of its products, over `temperature`."""
        return {
            "temperature": temperature / self.scale,
            "soft_cap": None if self.soft_cap is None else self.soft_cap / self.scale,
        }

    def __call__(self, product: Tensor) -> Tensor:
        scaled = product * self.scale if self.scale != 1 else product
        return scaled if self.soft_cap is None else self.soft_cap * torch.tanh(scaled / self.soft_cap)


PLAIN = LogitMap()


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The model's head. Raises ModelError when it is no Linear layer."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{type(model).__name__}: its head is {type(head).__name__}, and only a Linear layer is known")
    return head


def valid_token_mask(model: PreTrainedModel | Decoder, tokenizer: PreTrainedTokenizerBase | PlainTokenizer) -> Tensor:
    """(V,) bool on the CPU: True for the ids the tokenizer knows.

    Qwen's head has rows beyond its tokenizer, for alignment. Their ids have no text, so they must neither be sampled
    nor share in the log-sum-exp of the trainer.
    """
    mask_V = torch.zeros(model.get_output_embeddings().weight.shape[0], dtype=torch.bool)
    mask_V[torch.tensor(sorted(tokenizer.get_vocab().values()))] = True
    return mask_V


def head_operands(head: nn.Linear, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and weight whose product is the head's, its bias included."""
    if head.bias is None:
        return hidden_ND, head.weight
    ones_N1 = hidden_ND.new_ones(len(hidden_ND), 1)
    return torch.cat([hidden_ND, ones_N1], 1), torch.cat([head.weight, head.bias[:, None].to(head.weight.dtype)], 1)


@torch.no_grad()
def find_logit_map(model: PreTrainedModel) -> LogitMap:
    """What `model` does to its head's product.

    Raises ModelError when that is neither a scale nor a soft cap.
    """
    head = output_head(model)
    known_V = torch.linspace(-60, 60, 121, dtype=torch.float32, device=model.device)
    with forward_replaced(head, lambda hidden: known_V.expand(*hidden.shape[:-1], -1)):
        got_V = model(input_ids=torch.tensor([[1, 1]], device=model.device), use_cache=False).logits[0, -1].float()
    for found in _candidates(known_V, got_V):
        if torch.allclose(found(known_V), got_V, rtol=TOLERANCE, atol=TOLERANCE * float(got_V.abs().max())):
            return found
    raise ModelError(
        f"{type(model).__name__} changes its head's output by more than a scale or a soft cap, so its log-probs "
        "cannot be streamed; take another model"
    )


def _candidates(known_V: Tensor, got_V: Tensor) -> Iterator[LogitMap]:
    yield PLAIN
    middle = len(known_V) // 2  # known_V is symmetric about 0 and its steps are 1
    scale = float(got_V[-1] / known_V[-1])
    if scale > 0:
        yield LogitMap(scale)
    # With y1 = c tanh(a) and y2 = c tanh(2a): y2 / y1 = 2 / (1 + tanh(a)^2).
    for at in (1, 4, 15, 30):
        one, two = (float(got_V[middle + place].double()) for place in (at, 2 * at))
        square = 2 * one / two - 1 if two else 0.0
        if 1e-4 < square < 1:
            ratio = square**0.5
            soft_cap = one / ratio
            yield LogitMap(_rounded(soft_cap * float(torch.atanh(torch.tensor(ratio, dtype=torch.float64))) / at),
                           _rounded(soft_cap))  # fmt: skip


def _rounded(value: float) -> float:
    """To the digits that float32 leaves of the fit, so that a cap of 30 is 30."""
    return float(f"{value:.4g}")


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Another forward inside the block."""
    before = module.__dict__.get("forward")  # offloading wrappers hang theirs on the instance
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
