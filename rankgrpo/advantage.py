"""Advantages within a group of lists for one prompt (paper: "Rank-GRPO", arXiv 2510.20150, Eq. 7). Torch only."""

# Shape letters: P prompts, G lists a prompt, B lists, K ranks.

from __future__ import annotations

import torch
from torch import Tensor


def group_advantage(
    reward_PGK: Tensor,
    group_B: Tensor | None = None,
    *,
    scale_by_std: bool = True,
    ddof: int = 1,
    eps: float = 1e-4,
) -> Tensor:
    """Centre, and by default scale, each reward among the G lists of its prompt at the same rank.

    A_{p,i,k} = (r_{p,i,k} - mean over i' of r_{p,i',k}) / (std over i' of r_{p,i',k} + eps)

    With one reward a list (GRPO, GSPO) K is 1. A rank at which all G rewards are equal gets exactly 0, not rounding
    noise divided by eps; so does a group of one list, which has nothing to be compared with.

    Args:
      reward_PGK: floating point, finite. With `group_B` it is (B, K).
      group_B: integer id of every list's group: groups of any sizes, their lists in any order. It waits for the device.
      scale_by_std: False only centres.
      ddof: 1 is the unbiased standard deviation (the released code), 0 the biased one.

    Returns: the shape of the rewards. Raises ValueError for another shape, an integer dtype, ddof not 0 or 1, or
    eps < 0.
    """
    _check(reward_PGK, group_B, ddof, eps)
    if group_B is not None:
        return _ragged_advantage(reward_PGK, group_B, scale_by_std, ddof, eps)
    advantage_PGK = reward_PGK - reward_PGK.mean(dim=1, keepdim=True)
    if scale_by_std:
        degrees = max(reward_PGK.shape[1] - ddof, 1)
        std_P1K = (advantage_PGK.square().sum(dim=1, keepdim=True) / degrees).sqrt()
        advantage_PGK = advantage_PGK / (std_P1K + eps)
    # The mean of equal rewards need not round to the reward itself, so equality is tested on the rewards.
    constant_P1K = reward_PGK.amin(dim=1, keepdim=True) == reward_PGK.amax(dim=1, keepdim=True)
    return torch.where(constant_P1K, 0.0, advantage_PGK)


def _ragged_advantage(reward_BK: Tensor, group_B: Tensor, scale_by_std: bool, ddof: int, eps: float) -> Tensor:
    _, group_B, size_P = torch.unique(group_B, return_inverse=True, return_counts=True)
    empty_PK = reward_BK.new_zeros(len(size_P), reward_BK.shape[1])
    place_BK = group_B[:, None].expand_as(reward_BK)
    advantage_BK = reward_BK - (empty_PK.scatter_add(0, place_BK, reward_BK) / size_P[:, None])[group_B]
    if scale_by_std:
        square_PK = empty_PK.scatter_add(0, place_BK, advantage_BK.square())
        std_PK = (square_PK / (size_P - ddof).clamp(min=1)[:, None]).sqrt()
        advantage_BK = advantage_BK / (std_PK[group_B] + eps)
    low_PK = empty_PK.scatter_reduce(0, place_BK, reward_BK, "amin", include_self=False)
    high_PK = empty_PK.scatter_reduce(0, place_BK, reward_BK, "amax", include_self=False)
    return torch.where((low_PK == high_PK)[group_B], 0.0, advantage_BK)


def _check(reward: Tensor, group_B: Tensor | None, ddof: int, eps: float) -> None:
    if group_B is None and (reward.ndim != 3 or reward.shape[1] == 0):
        raise ValueError(f"reward_PGK must have shape (P, G, K) with G >= 1, got {tuple(reward.shape)}")
    if group_B is not None and (reward.ndim != 2 or group_B.shape != reward.shape[:1]):
        raise ValueError(
            f"with group_B, rewards must be (B, K) and group_B (B,), got {tuple(reward.shape)} and "
            f"{tuple(group_B.shape)}"
        )
    if group_B is not None and (group_B.is_floating_point() or group_B.dtype == torch.bool):
        raise ValueError(f"group_B must hold integer ids, got {group_B.dtype}")
    if not reward.is_floating_point():
        raise ValueError(f"reward_PGK must be floating point, got {reward.dtype}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 (biased) or 1 (unbiased), got {ddof}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
