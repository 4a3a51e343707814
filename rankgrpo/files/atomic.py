"""Files and folders that exist under their name only once they are complete and on disk."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from safetensors import SafetensorError

from rankgrpo.errors import BusyError, SaveError

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = ".incomplete-"


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final` (replacing it) if the block succeeds, and vanishes if it fails.

    Raises SaveError when the disk is full or not writable.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(final)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                sync(path)
        sync(temporary)
        if final.is_dir():
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(explain(final, error)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write lines to `path`, which is then either the old file or the new one, whole, whatever happens.

    Raises SaveError when the disk is full or not writable.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SaveError(explain(path, error)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, as `write_lines` writes lines."""
    from safetensors.torch import save_file  # torch is wanted by few of those who write files

    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        sync(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise SaveError(explain(path, error)) from error


def point_link(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to its sibling `target`, in one atomic step.

    A folder in its place, as a copy that follows links leaves one, is removed; that takes more than one step.
    """
    temporary = temporary_name(link)
    for old in (temporary, link):
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)


@contextmanager
def only_one(folder: Path, patience_s: float = 20.0) -> Iterator[None]:
    """Let no other process work in `folder` meanwhile, on this machine or another that shares the file system.

    Raises BusyError when another does and does not end within `patience_s`: one whose parent was killed may need a
    moment to follow it. The hold ends with the process, however that dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        deadline = time.monotonic() + patience_s
        while not _try_lock(lock):
            if time.monotonic() > deadline:
                raise BusyError(
                    f"{folder}: another process is at work in this run folder; wait for it, stop it, or name a new run "
                    f"folder (`fuser {folder / '.lock'}` tells which process it is)"
                )
            time.sleep(0.1)
        yield


def is_busy(folder: Path) -> bool:
    """Whether a process holds `only_one(folder)`."""
    path = folder / ".lock"
    if not path.is_file():
        return False
    with path.open("a") as lock:
        return not _try_lock(lock)


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of saves that were interrupted."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)


def remove_folder(folder: Path) -> None:
    """Remove a folder that must never be seen half removed."""
    temporary = temporary_name(folder)
    os.replace(folder, temporary)
    shutil.rmtree(temporary)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Where `path` is written before it is complete."""
    return path.with_name(f"{TEMPORARY}{path.name}")


def explain(path: Path, error: BaseException) -> str:
    """What to tell the user of an error while `path` was written."""
    # safetensors reports an I/O error as text only.
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full:
        return (
            f"{path}: not saved, the disk is full. Nothing saved before was touched: free some space and run the same "
            f"command again to continue from the last complete checkpoint"
        )
    return f"{path}: not saved ({error}). Nothing saved before was touched"
