"""Stage files that are made again only when their inputs or settings change."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rankgrpo.files.atomic import write_lines, write_tensors
from rankgrpo.files.rows import read_jsonl

KEYS = "keys.json"


class StageFiles:
    """The files of a folder, and in keys.json what each was made from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / KEYS
        self._keys: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def rows(self, name: str, key: str, make: Callable[[], tuple[Sequence[Mapping[str, Any]], bool]]) -> list[Any]:
        """The rows of the JSONL file `name`: read if it was made from `key`, else made now.

        `make` also says whether the rows are complete; rows that are not are written and made again the next time.
        """
        path = self.folder / name
        if not self._is_current(path, key):
            self._forget(name)
            rows, is_complete = make()
            write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))
            if is_complete:
                self._remember(name, key)
        rows = []
        for line, row in read_jsonl(path):
            if isinstance(row, str):
                raise ValueError(f"{path}:{line}: {row}; delete the file and run the command again")
            rows.append(row)
        return rows

    def tensors(self, name: str, key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of the safetensors file `name`: read if it was made from `key`, else made now."""
        path = self.folder / name
        if not self._is_current(path, key):
            self._forget(name)
            write_tensors(path, make())
            self._remember(name, key)
        return load_file(path)

    def _is_current(self, path: Path, key: str) -> bool:
        return path.exists() and self._keys.get(path.name) == key

    def _forget(self, name: str) -> None:
        # Before the file changes: a key must never stand beside the content of another.
        if self._keys.pop(name, None) is not None:
            self._write()

    def _remember(self, name: str, key: str) -> None:
        self._keys[name] = key
        self._write()

    def _write(self) -> None:
        write_lines(self.folder / KEYS, [json.dumps(self._keys, indent=1)])


def pack_rows(name: str, rows_ND: Tensor) -> dict[str, Tensor]:
    """A matrix of rows for a safetensors file, which holds dense tensors only."""
    if not rows_ND.is_sparse:
        return {name: rows_ND}
    return {
        f"{name}.index": rows_ND.indices(),
        f"{name}.value": rows_ND.values(),
        f"{name}.shape": torch.tensor(rows_ND.shape),
    }


def unpack_rows(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The matrix that `pack_rows` packed."""
    if name in tensors:
        return tensors[name]
    shape = tensors[f"{name}.shape"].tolist()
    return torch.sparse_coo_tensor(
        tensors[f"{name}.index"], tensors[f"{name}.value"], shape, is_coalesced=True, check_invariants=True
    )
