"""Atomic checkpoints and exact resume.

A folder exists under its final name only once everything in it is on disk: it is written under a temporary name, synced
and renamed, so a process killed at any moment leaves either the whole checkpoint or none. Parameters and optimizer
moments are safetensors, the rest is JSON; no pickle is written or read. What a checkpoint does not hold needs no
saving: data order and sampling seeds are functions of (seed, step).
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

TEMPORARY = ".incomplete-"
STEP_FOLDER = re.compile(r"step-(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; what was saved before is untouched."""


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final` (replacing it) if the block succeeds, and vanishes if it fails.

    Raises CheckpointError when the disk is full or not writable.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f"{TEMPORARY}{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                _sync(path)
        _sync(temporary)
        if final.is_dir():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_explain(final, error)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that it is either the old one or the new one, whole, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(_explain(path, error)) from error


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
    for leftover in folder.glob(f"{TEMPORARY}*") if folder.is_dir() else []:
        shutil.rmtree(leftover)
    found = list_checkpoints(folder)
    return found[-1] if found else None


def point_link(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to its sibling `target`, in one atomic step."""
    temporary = link.with_name(f"{TEMPORARY}{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)


def _optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str]) -> dict[str, torch.Tensor]:
    tensors = {}
    for parameter, slots in optimizer.state.items():
        for slot, tensor in slots.items():
            tensors[f"{slot}/{names[parameter]}"] = tensor.detach().contiguous()
    return tensors


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(path: Path, error: Exception) -> str:
    # safetensors reports an I/O error as text only.
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full:
        return (
            f"{path}: not saved, the disk is full. Nothing saved before was touched: free some space and run the same "
            f"command again to continue from the last complete checkpoint"
        )
    return f"{path}: not saved ({error}). Nothing saved before was touched"
