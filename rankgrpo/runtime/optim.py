"""The optimizer step: AdamW, learning-rate schedules, clipping, and a stop at the first number that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rankgrpo.config import RlConfig
from rankgrpo.errors import TrainingError


def make_optimizer(
    model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, never on norms and biases, nor on tables of which a few rows are trained
    (`rankgrpo.model.new_tokens`): it would move the others."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decays = [p.ndim >= 2 and not hasattr(p, "rankgrpo_first_rows") for p in trained]
    groups = [
        {"params": [p for p, decay in zip(trained, decays, strict=True) if decay], "weight_decay": weight_decay},
        {"params": [p for p, decay in zip(trained, decays, strict=True) if not decay], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(
    step: int,
    *,
    num_steps: int,
    peak: float,
    schedule: Literal["constant", "cosine", "two-phase"],
    warmup_frac: float = 0.0,
    second_phase_at: float = 1.0,
    second_phase_lr: float = 0.0,
) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then constant, cosine to 0, or the paper's two phases.

    two-phase (App. C, D.6: 1e-6, then 1e-7 in the second epoch) switches at step `second_phase_at * num_steps`.
    """
    warmup_steps = math.ceil(warmup_frac * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "two-phase":
        return second_phase_lr if step >= second_phase_at * num_steps else peak
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "constant":
        return peak
    raise ValueError(f"schedule must be constant, cosine or two-phase, got {schedule!r}")


def rl_learning_rate(step: int, rl: RlConfig) -> float:
    """`learning_rate` of a step of reinforcement learning."""
    return learning_rate(
        step,
        num_steps=rl.num_steps,
        peak=rl.lr,
        schedule=rl.schedule,
        warmup_frac=rl.warmup_frac,
        second_phase_at=rl.second_phase_at,
        second_phase_lr=rl.second_phase_lr,
    )


def optimizer_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], *, lr: float, grad_clip: float, where: str
) -> float:
    """Clip the global gradient norm, step, clear the gradients; returns the norm before clipping.

    Raises TrainingError before anything is changed when the norm is not finite.
    """
    total = nn.utils.clip_grad_norm_(list(parameters), grad_clip)
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    if not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise TrainingError(
            f"{where}: the gradient norm is {norm}; the weights were not changed and the last checkpoint is intact. "
            f"Resume with a lower learning rate under a new run name, or look at the batch of this step",
            everywhere=True,
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(value: float, where: str, what: str) -> None:
    """Raise TrainingError when `value`, a sum over the processes, is NaN or infinite."""
    if not math.isfinite(value):
        raise TrainingError(
            f"{where}: {what} is {value}; the weights were not changed and the last checkpoint is intact. "
            f"The usual cause is a learning rate that is too high",
            everywhere=True,
        )
