"""Atomic checkpoints and exact resume.

A folder exists under its final name only once everything in it is on disk: it is written under a temporary name, synced
and renamed, so a process killed at any moment leaves either the whole checkpoint or none. Parameters and optimizer
moments are safetensors, the rest is JSON; no pickle is written or read. What a checkpoint does not hold needs no
saving: data order and sampling seeds are functions of (seed, step).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rankgrpo.files import atomic_folder, remove_leftovers

STEP_FOLDER = re.compile(r"step-(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read."""


def save_checkpoint(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep_last: int,
) -> Path:
    """Save `folder/step-{step:08d}` and remove all but the newest `keep_last`; `state` is any JSON value."""
    final = folder / f"step-{step:08d}"
    names = {parameter: name for name, parameter in model.named_parameters()}
    with atomic_folder(final) as temporary:
        save_file(
            {name: p.detach().contiguous() for name, p in model.named_parameters()}, temporary / "model.safetensors"
        )
        save_file(_optimizer_tensors(optimizer, names), temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
    for old in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    return final


def load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fill `model` and `optimizer` in place and return the state saved with them (`step` included)."""
    try:
        parameters = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); delete this folder to continue from the one before"
        ) from error
    expected = dict(model.named_parameters())
    if parameters.keys() != expected.keys():
        differing = sorted(parameters.keys() ^ expected.keys())[:5]
        raise CheckpointError(f"{path}: holds another model; parameters that differ: {', '.join(differing)}")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(parameters[name])
    for name, parameter in expected.items():
        kept = {key.split("/", 1)[0]: tensor for key, tensor in moments.items() if key.endswith(f"/{name}")}
        if kept:
            step = kept.pop("step")
            optimizer.state[parameter] = {"step": step} | {k: t.to(parameter.device) for k, t in kept.items()}
    return state


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if STEP_FOLDER.fullmatch(p.name)) if folder.is_dir() else []


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; removes what an interrupted save left behind."""
    if folder.is_dir():
        remove_leftovers(folder)
    found = list_checkpoints(folder)
    return found[-1] if found else None


def _optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str]) -> dict[str, torch.Tensor]:
    tensors = {}
    for parameter, slots in optimizer.state.items():
        for slot, tensor in slots.items():
            tensors[f"{slot}/{names[parameter]}"] = tensor.detach().contiguous()
    return tensors
