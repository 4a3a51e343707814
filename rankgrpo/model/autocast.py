"""The type that torch.autocast computes in."""

from __future__ import annotations

import torch
from torch import Tensor


def in_autocast_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's type where it is on, else as they are. Rotary embeddings return float32 under it."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
