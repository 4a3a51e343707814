"""Lists held to the catalog in vLLM's own server, of a folder that `rankgrpo export` wrote:

    vllm serve FOLDER --logits-processors rankgrpo.sampler.vllm_serve:RowCatalog

The processor reads catalog and settings from FOLDER. It holds the requests whose `vllm_xargs` have `rankgrpo_seen`, the
catalog indices of what the user has seen, and leaves all others alone. `RowCatalog` is for vLLM's model runner V1
(CPUs, and GPUs without Triton), `SlotCatalog` for V2 (`rankgrpo.sampler.vllm_trie` says which is which).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rankgrpo.errors import ConfigError
from rankgrpo.items.format import ItemFormat
from rankgrpo.items.lines import open_catalog
from rankgrpo.model.constraint import Constraint, open_constraint
from rankgrpo.model.presets import load_tokenizer

SETTINGS_FILE = "lists.json"


def read_constraint(folder: Path) -> Constraint:
    """The constraint of an exported folder. Raises ConfigError for a folder that is none, naming the file."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; serve a folder that `rankgrpo export RUN FOLDER` wrote")
    settings = json.loads(path.read_text(encoding="utf-8"))
    catalog, _ = open_catalog(folder / "catalog.jsonl", ItemFormat(settings["item"]))
    tokenizer = load_tokenizer(str(folder))
    return open_constraint(catalog, tokenizer, num_ranks=settings["num_ranks"], forbid=settings["forbid"])


def __getattr__(name: str) -> Any:
    """RowCatalog and SlotCatalog, made when vLLM asks for them by name: their base class is vLLM's."""
    from rankgrpo.sampler.vllm_trie import RowLists, SlotLists, on_base

    lists = {"RowCatalog": RowLists, "SlotCatalog": SlotLists}.get(name)
    if lists is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import vllm

    base = on_base(vllm, lists, None)

    def start(self, vllm_config, *rest) -> None:
        # The folder's own; vLLM passes the rest by place.
        self.constraint = read_constraint(Path(vllm_config.model_config.model))
        base.__init__(self, vllm_config, *rest)

    return type(name, (base,), {"__init__": start, "__module__": __name__})
