"""Advantages within a group of lists for one prompt (paper: "Rank-GRPO", arXiv 2510.20150, Eq. 7). Torch only."""

# Shape letters: P prompts, G lists a prompt, K ranks.

from __future__ import annotations

import torch
from torch import Tensor


def group_advantage(reward_PGK: Tensor, *, scale_by_std: bool = True, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """Centre, and by default scale, each reward among the G lists of its prompt at the same rank.

    A_{p,i,k} = (r_{p,i,k} - mean over i' of r_{p,i',k}) / (std over i' of r_{p,i',k} + eps)

    With one reward a list (GRPO, GSPO) K is 1. A rank at which all G rewards are equal gets exactly 0, not rounding
    noise divided by eps; so does a group of one list, which has nothing to be compared with.

    Args:
      reward_PGK: floating point, finite.
      scale_by_std: False only centres.
      ddof: 1 is the unbiased standard deviation (the released code), 0 the biased one.

    Returns: (P, G, K). Raises ValueError for another shape, an integer dtype, ddof not 0 or 1, or eps < 0.
    """
    if reward_PGK.ndim != 3 or reward_PGK.shape[1] == 0:
        raise ValueError(f"reward_PGK must have shape (P, G, K) with G >= 1, got {tuple(reward_PGK.shape)}")
    if not reward_PGK.is_floating_point():
        raise ValueError(f"reward_PGK must be floating point, got {reward_PGK.dtype}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 (biased) or 1 (unbiased), got {ddof}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    advantage_PGK = reward_PGK - reward_PGK.mean(dim=1, keepdim=True)
    if scale_by_std:
        degrees = max(reward_PGK.shape[1] - ddof, 1)
        std_P1K = (advantage_PGK.square().sum(dim=1, keepdim=True) / degrees).sqrt()
        advantage_PGK = advantage_PGK / (std_P1K + eps)
    # The mean of equal rewards need not round to the reward itself, so equality is tested on the rewards.
    constant_P1K = reward_PGK.amin(dim=1, keepdim=True) == reward_PGK.amax(dim=1, keepdim=True)
    return torch.where(constant_P1K, 0.0, advantage_PGK)
