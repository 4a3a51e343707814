"""Atomic checkpoints and exact resume, by any number of processes from any other.

A folder exists under its final name only once everything in it is on disk: it is written under a temporary name, synced
and renamed, so a process killed at any moment leaves either the whole checkpoint or none. What a checkpoint does not
hold needs no saving: data order and sampling seeds are functions of (seed, step).

Parameters and optimizer moments go through torch.distributed.checkpoint, which has every process write its own part and
read what it needs of all parts. Its default storage keeps the index of the parts in a pickle. The safetensors storage
used here keeps it in the headers of the files, so no pickle is written or read; the rest is JSON.
"""

from __future__ import annotations

import json
import re
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rankgrpo.errors import CheckpointError, SaveError
from rankgrpo.files.atomic import atomic_folder, explain, remove_folder, remove_leftovers, temporary_name
from rankgrpo.files.malloc import return_freed_memory
from rankgrpo.runtime.distributed import Parallel, split_parameters, wait_for_all

STEP_FOLDER = re.compile(r"step-(\d{8})")


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep_last: int,
    parallel: Parallel,
) -> Path:
    """Save `folder/step-{step:08d}` and remove all but the newest `keep_last`; `state` is any JSON value.

    Every process takes part. Raises SaveError on all of them when one cannot write, and CheckpointError when the main
    one does not see what the others wrote.
    """
    final = folder / f"step-{step:08d}"
    with atomic_folder(final) if parallel.is_main else nullcontext(temporary_name(final)) as temporary:
        wait_for_all(parallel)  # the folder is there
        tensors = _tensors(_trained(model), optimizer)
        try:
            writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, **_alone())
        except CheckpointException as error:
            raise SaveError(explain(final, _cause(error))) from error
        if parallel.is_main:
            saved = HuggingFaceStorageReader(str(temporary)).read_metadata().state_dict_metadata
            if missing := [name for name, tensor in tensors.items() if not _is_whole(saved.get(name), tensor)]:
                raise CheckpointError(
                    f"{final}: parts of {missing[0]} that other processes saved are not here; the run folder must be "
                    f"on a file system that all nodes share"
                )
            files = sorted(file.name for file in temporary.glob("*.safetensors"))
            (temporary / "state.json").write_text(json.dumps({"step": step, "files": files, **state}), encoding="utf-8")
    if parallel.is_main:
        for old in list_checkpoints(folder)[:-keep_last]:
            remove_folder(old)
    return_freed_memory()
    wait_for_all(parallel)
    return final


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fill `model` and `optimizer` in place and return the state saved with them (`step` included).

    Every process takes part, whatever number of them saved it. Raises CheckpointError for a damaged checkpoint and for
    one of another model, before anything is changed.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for file in state.pop("files"):
            (path / file).stat()  # the storage would take what is there for all there is
        saved = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(_damaged(path, error)) from error
    parameters = _trained(model)
    _check_same_model(path, saved, parameters)
    for name, parameter in parameters.items():
        slots = [key.split("/", 1)[0] for key in saved if key.endswith(f"/{name}") and not key.startswith("model/")]
        for slot in slots:
            # A moment is split like its parameter; the count of steps is one number on every process.
            split = saved[f"{slot}/{name}"].size == parameter.shape
            empty = torch.zeros_like(parameter) if split else torch.zeros((), device=parameter.device)
            optimizer.state[parameter][slot] = empty
    try:
        with torch.no_grad():
            dcp.load(_tensors(parameters, optimizer), storage_reader=HuggingFaceStorageReader(str(path)), **_alone())
    except CheckpointException as error:
        raise CheckpointError(_damaged(path, _cause(error))) from error
    return state


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if STEP_FOLDER.fullmatch(p.name)) if folder.is_dir() else []


def latest_checkpoint(folder: Path, parallel: Parallel) -> Path | None:
    """The newest complete checkpoint, the same on every process; removes what an interrupted save left behind."""
    found: list[Path] = []
    if parallel.is_main and folder.is_dir():
        remove_leftovers(folder)
        found = list_checkpoints(folder)
    names = parallel.gather([path.name for path in found[-1:]])[0]
    return folder / names[0] if names else None


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Frozen parameters are those the run started from: with adapters a checkpoint holds the adapters alone."""
    return {name: parameter for name, parameter in split_parameters(model).items() if parameter.requires_grad}


def _tensors(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything a checkpoint holds, by a name of its own: model/NAME, exp_avg/NAME, ..."""
    tensors = {f"model/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        tensors |= {f"{slot}/{name}": tensor.detach() for slot, tensor in optimizer.state.get(parameter, {}).items()}
    return tensors


def _check_same_model(path: Path, saved: dict[str, TensorStorageMetadata], parameters: dict[str, nn.Parameter]) -> None:
    shapes = {name.removeprefix("model/"): of.size for name, of in saved.items() if name.startswith("model/")}
    expected = {name: parameter.shape for name, parameter in parameters.items()}
    if differing := sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n)):
        one = differing[0]
        raise CheckpointError(
            f"{path}: holds another model; {len(differing)} parameters differ, the first is {one}: "
            f"{_shape(shapes.get(one))} here, {_shape(expected.get(one))} in the model. Continue with the model the "
            f"run was started with, or name a new run folder"
        )


def _shape(size: torch.Size | None) -> str:
    return "missing" if size is None else f"{tuple(size)}"


def _is_whole(saved: TensorStorageMetadata | None, tensor: Tensor) -> bool:
    """Do the saved parts make up a tensor of this shape?"""
    if saved is None or saved.size != tensor.shape:
        return False
    return sum(chunk.sizes.numel() for chunk in saved.chunks) == tensor.numel()


def _cause(error: CheckpointException) -> BaseException:
    """What went wrong on the first of the processes that failed."""
    return error.failures[min(error.failures)][0]


def _damaged(path: Path, problem: object) -> str:
    return f"{path}: cannot be read ({problem}); delete this folder to continue from the one before"


def _alone() -> dict[str, bool]:
    """Without torchrun nobody else takes part, which torch.distributed.checkpoint would warn of at every call."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    return {"no_dist": not td.is_initialized()}
