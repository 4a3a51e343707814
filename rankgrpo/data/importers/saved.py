"""Reddit-v2 and ReDial as released with Rank-GRPO: folders that Hugging Face's `save_to_disk` wrote.

A row has `prompt` and (for the warm start) `completion`, each a list of messages; `seen_titles`; and
`groundtruth_with_release_year`, pairs of a title and a year, the year as a string. The conversation is what the prompt
says after "Here is the conversation:", turns prefixed `USER:` and `SYSTEM:`. The same conversation recurs with the
ground truth of every answer it got, so a row's id is its place in the file.

Files are Arrow streams, read by pyarrow: `pip install rankgrpo[import]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rankgrpo.data.importers.common import Imported, Notes, parse_groundtruth, parse_seen, split_name
from rankgrpo.data.samples import Sample, Turn
from rankgrpo.errors import DataError
from rankgrpo.items.catalog import Catalog

STATE = "state.json"
MARK = "Here is the conversation:"
GROUNDTRUTH = "groundtruth_with_release_year"
LAYOUT = "a folder that save_to_disk wrote has state.json, dataset_info.json and data-*.arrow, one such folder a split"
NOTHING_SAID = "rows that hold no more than the cue of the next speaker, left out"
MAX_DEPTH = 4

_SPEAKER = re.compile(r"(?:\A|\n)[ \t]*(USER|SYSTEM):[ \t]?")
_ROLES = {"USER": "user", "SYSTEM": "assistant"}


def find_saved(path: Path) -> list[Path]:
    """Folders under a path, itself included, that hold a saved data set or the remains of one."""
    folders = [path, *(folder for depth in range(1, MAX_DEPTH + 1) for folder in path.glob("/".join("*" * depth)))]
    return sorted(f for f in folders if f.is_dir() and ((f / STATE).is_file() or any(f.glob("*.arrow"))))


def read_saved(path: Path, *, catalog: Catalog | None = None) -> Imported:
    """Samples of one saved data set, of a folder of splits, or of the whole release (`processed_datasets`).

    Of the release the training split is the RL one (`grpo`), whose rows take the completion of the same row of the SFT
    training split where that has one. Raises DataError for anything else that has two folders a split.
    """
    notes = Notes()
    folders = _by_split(path)
    errors: list[str] = []
    splits: dict[str, list[Sample]] = {}
    for split, folder in folders.items():
        splits[split] = list(_read_split(folder, f"{path.resolve().name}-{split}", catalog, notes, errors))
    if errors:
        raise DataError(f"{path}: {len(errors)} unusable row(s):", errors)
    if "sft" in splits:
        splits["train"] = _with_completions(splits["train"], splits.pop("sft"), notes)
    return Imported(f"saved data sets under {path}", splits, notes=notes)


def _by_split(path: Path) -> dict[str, Path]:
    """Folder by split; the SFT training split as "sft" where there is an RL one beside it."""
    found: dict[str, list[Path]] = {}
    for folder in find_saved(path):
        split = split_name(folder.name)
        if split is None and folder != path:
            raise DataError(f"{folder}: its name is no split; expected train, validation or test")
        found.setdefault(split or "train", []).append(folder)
    if not found:
        raise DataError(f"{path}: no saved data set here; {LAYOUT}")
    by_split = {}
    for split, folders in found.items():
        rl = [folder for folder in folders if any("grpo" in part for part in folder.relative_to(path).parts)]
        if split == "train" and len(folders) == 2 and len(rl) == 1:
            by_split["sft"] = next(folder for folder in folders if folder not in rl)
            folders = rl
        if len(folders) > 1:
            names = ", ".join(str(folder) for folder in folders)
            raise DataError(f"{path}: several folders for {split}: {names}; name the one to import")
        by_split[split] = folders[0]
    return by_split


def _read_split(
    folder: Path, prefix: str, catalog: Catalog | None, notes: Notes, errors: list[str]
) -> Iterator[Sample]:
    rows = tqdm(_arrow_rows(folder), desc=folder.name, unit=" rows", unit_scale=True, dynamic_ncols=True)
    for place, row in enumerate(rows):
        where = f"{folder}: row {place}"
        try:
            sample = _to_sample(row, f"{prefix}-{place}", catalog, notes, where)
        except DataError as error:
            errors.append(f"{where}: {error}")
            continue
        if sample.conversation:
            yield sample
        else:
            notes.add(NOTHING_SAID, where)


def _arrow_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of the files that the folder's state names, in order."""
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{folder}: reading Arrow files needs pyarrow: pip install 'rankgrpo[import]'") from None
    for path in _arrow_files(folder):
        try:
            with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as reader:
                if missing := {"prompt", "seen_titles", GROUNDTRUTH} - set(reader.schema.names):
                    names = ", ".join(reader.schema.names)
                    raise DataError(f"{path}: column {' and '.join(sorted(missing))} missing; there is {names}")
                for batch in reader:
                    yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a whole Arrow stream ({error}); copy it again") from None


def _arrow_files(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except FileNotFoundError:
        raise DataError(f"{folder}: Arrow files without {STATE}; {LAYOUT}; copy the whole folder") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / STATE}: not what save_to_disk writes ({error!r}); copy it again") from None
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise DataError(
            f"{folder}: {', '.join(missing)} missing, of {len(names)} files that {STATE} names; copy it again"
        )
    return [folder / name for name in names]


def _to_sample(row: Mapping[str, Any], sample_id: str, catalog: Catalog | None, notes: Notes, where: str) -> Sample:
    groundtruth, weights = parse_groundtruth(row[GROUNDTRUTH] or [], catalog, notes, where)
    return Sample(
        id=sample_id,
        conversation=said(parse_prompt(message_of(row["prompt"], "prompt", "user"))),
        seen_titles=parse_seen(row["seen_titles"] or [], catalog, notes, where),
        groundtruth=groundtruth,
        weights=weights,
        completion=message_of(row["completion"], "completion", "assistant") if row.get("completion") else None,
    )


def said(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns in which something is said; the cue of the next speaker ends many a row."""
    return tuple(turn for turn in turns if turn.content)


def message_of(messages: object, name: str, role: str) -> str:
    """The text of the last message of a role."""
    if isinstance(messages, list):
        for message in reversed(messages):
            if isinstance(message, dict) and message.get("role") == role and isinstance(message.get("content"), str):
                return message["content"]
    raise DataError(f"{name} must be a list of messages, one of them {role}'s, got {messages!r:.80}")


def parse_prompt(text: str) -> tuple[Turn, ...]:
    """The turns that a prompt of the release quotes; the inverse of `rankgrpo.data.prompt.format_prompt`."""
    _, mark, context = text.partition(MARK)
    if not mark:
        raise DataError(f"the prompt does not say {MARK!r}: {text!r:.80}")
    before, *parts = _SPEAKER.split(context.strip())
    if before.strip() or not parts:
        raise DataError(f"expected turns that begin with USER: or SYSTEM:, got {context!r:.80}")
    return tuple(Turn(_ROLES[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True))


def _with_completions(rl: list[Sample], sft: list[Sample], notes: Notes) -> list[Sample]:
    """RL samples with the completions of the same conversations and ground truths."""
    completions = {(sample.conversation, sample.groundtruth): sample for sample in sft}
    samples = []
    for sample in rl:
        other = completions.pop((sample.conversation, sample.groundtruth), None)
        samples.append(sample if other is None else replace(sample, completion=other.completion))
    for other in completions.values():
        notes.add("SFT rows that the RL split does not have, left out", other.id)
    return samples
