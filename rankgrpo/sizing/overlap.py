"""Main memory of the processes that sample for rl.overlap."""

from __future__ import annotations

from rankgrpo.config import Config
from rankgrpo.sizing.architecture import Architecture

GB = 1e9
LIBRARIES = 0.5 * GB
"""What Python, torch and transformers take in a process: an allowance, not a count."""


def overlap_bytes(arch: Architecture, config: Config, cache: float) -> dict[str, float]:
    """Bytes by part of one such process; cache: its keys and values, as many as any sampler's.

    The copy of the weights is float32, or bfloat16 where a split model computes in it. It is counted once: trainer and
    sampler share its memory.
    """
    split = config.parallel.shard in ("full", "hybrid")
    half = config.model.autocast == "bfloat16" and split
    return {"weights": (2 if half else 4) * arch.num_parameters, "keys and values": cache, "libraries": LIBRARIES}


def overlap_lines(arch: Architecture, config: Config, cache: float) -> list[str]:
    """What `rankgrpo plan` says of rl.overlap; nothing where it is off."""
    if not config.rl.overlap:
        return []
    parts = overlap_bytes(arch, config, cache)
    told = ", ".join(f"{name} {value / GB:.2f}" for name, value in parts.items())
    return [
        f"GB of main memory for rl.overlap, beside every training process, {sum(parts.values()) / GB:.2f}: {told}",
        "  (a run on CPUs has it; on GPUs rl.overlap=true is refused)",
        "",
    ]
