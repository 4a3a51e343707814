"""Files and folders that exist under their name only once they are complete and on disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

TEMPORARY = ".incomplete-"


class SaveError(RuntimeError):
    """Something could not be written; what was saved before is untouched."""


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final` (replacing it) if the block succeeds, and vanishes if it fails.

    Raises SaveError when the disk is full or not writable.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(final)
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
        raise SaveError(_explain(final, error)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write lines to `path`, which is then either the old file or the new one, whole, whatever happens.

    Raises SaveError when the disk is full or not writable.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SaveError(_explain(path, error)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def point_link(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to its sibling `target`, in one atomic step."""
    temporary = _temporary(link)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of saves that were interrupted."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{path.name}")


def _explain(path: Path, error: Exception) -> str:
    # safetensors reports an I/O error as text only.
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full:
        return (
            f"{path}: not saved, the disk is full. Nothing saved before was touched: free some space and run the same "
            f"command again to continue from the last complete checkpoint"
        )
    return f"{path}: not saved ({error}). Nothing saved before was touched"
