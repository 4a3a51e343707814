"""The sampler's weights are the trainer's: streamed after every update, and checked bit by bit.

The trainer fingerprints each tensor as it leaves, the sampler the tensors it will compute with. A tensor that was left
out, cut, or went to the wrong place differs, and is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from rankgrpo.errors import SamplingError
from rankgrpo.model.adapter import merged_parameters
from rankgrpo.sampler.base import CopySampler, Sampler, fingerprint

OTHERS = "tensors whose place in the sampler is not known"


def sync_weights(sampler: Sampler, model: nn.Module) -> None:
    """Wake the sampler and give it the model's weights; every process must call it.

    Raises SamplingError naming the tensors that did not arrive.
    """
    if not sampler.owns_weights:
        return
    sampler.wake()
    sent: dict[str, Tensor] = {}
    stream = _recorded(merged_parameters(model, sampler.dtype), sampler, sent)
    sampler.load_weights(stream)
    for _ in stream:  # a loader that stops early must not leave the other processes waiting, nor hide what it left out
        pass
    if different := _different(sampler, sent):
        raise SamplingError(
            f"the sampler does not have the weights that were just sent, so its lists would be another policy's: "
            f"{describe(different)} differ. The last checkpoint is intact; rl.sampler=hf samples without a copy"
        )


def different_tensors(sampler: Sampler, model: nn.Module) -> list[str]:
    """Names of the sampler's tensors that are not the model's now; every process must call it."""
    if not sampler.owns_weights:
        return []
    sampler.wake()
    sent: dict[str, Tensor] = {}
    for _ in _recorded(merged_parameters(model, sampler.dtype), sampler, sent):
        pass
    return _different(sampler, sent)


def explain_mismatch(sampler: Sampler, model: nn.Module) -> str:
    """Why the sampler's log-probs are not the model's, as far as weights tell; every process must call it."""
    if sampler.owns_weights and not sampler.holds_weights:
        return "The sampler dropped its weights for the update, so they cannot be compared; rl.vllm_sleep=1 keeps them"
    if different := different_tensors(sampler, model):
        return f"The sampler's weights are not the trainer's: {describe(different)}"
    return "Their weights are equal bit for bit, so the two compute differently (number types, kernels, masks)"


def describe(names: list[str], shown: int = 4) -> str:
    """Example: "model.norm.weight, model.embed_tokens.weight and 12 more" """
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


@torch.no_grad()
def _recorded(
    named: Iterable[tuple[str, Tensor]], sampler: CopySampler, sent: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Add the fingerprint of every tensor to `sent` by stored name and pass it on."""
    for name, tensor in named:
        key, value = sampler.stored_name(name), fingerprint(tensor)
        sent[key] = sent[key] + value if key in sent else value
        yield name, tensor


def _different(sampler: CopySampler, sent: dict[str, Tensor]) -> list[str]:
    stored = sampler.fingerprints()
    expected = dict(zip(sent, torch.stack(list(sent.values())).tolist(), strict=True))
    names = [key for key in expected if key in stored and stored[key] not in (None, expected[key])]
    # Tensors that the sampler stores under a name of its own can still be compared as a whole.
    left_over = sum(value for key, value in expected.items() if key not in stored)
    unexplained = sum(value or 0 for key, value in stored.items() if key not in expected)
    return names + ([OTHERS] if left_over != unexplained else [])
