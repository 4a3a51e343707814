"""ReDial (Li et al. 2018) as its authors publish it: redial_dataset.zip, or the folder it unpacks to.

A line of train_data.jsonl or test_data.jsonl is a conversation between a seeker (`initiatorWorkerId`), here the user,
and a recommender (`respondentWorkerId`), here the assistant, whose messages name films as `@203371`. Afterwards both
filled in a form: for each film whether it was suggested by the recommender, and whether the seeker has seen it and
likes it (0 no, 1 yes, 2 did not say).

Every turn in which the recommender names new films makes a sample: the conversation before it, and as ground truth the
films of that turn and of the later ones. The official test split stays; validation is the newest conversations of the
rest, by their ids.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from rankgrpo.data.importers.common import Imported, Notes, parse_name
from rankgrpo.data.samples import Sample, Turn
from rankgrpo.errors import DataError
from rankgrpo.files.rows import parse_csv, parse_jsonl, type_name
from rankgrpo.items.catalog import Item, normalise_title

FILES = {"train": "train_data.jsonl", "test": "test_data.jsonl"}
NAMES = "movies_with_mentions.csv"
NUM_CONVERSATIONS = {"train": 10006, "test": 1342}
WHERE = "it is published at redialdata.github.io as redial_dataset.zip"

Choice = Literal["named", "accepted", "liked", "unseen"]
_MENTION = re.compile(r"@(\d+)")
_UNSAID = 2


@dataclass(frozen=True)
class Film:
    title: str
    year: int | None


@dataclass(frozen=True)
class Form:
    """What the two forms say of one film; None where neither says."""

    suggested: int | None = None
    seen: int | None = None
    liked: int | None = None

    def allows(self, choice: Choice) -> bool:
        """Whether a film that the recommender named is ground truth.

        named: whatever the forms say. accepted: unless the forms say that the seeker brought it up, or dislikes it.
        liked: only what the seeker likes. unseen: accepted, and not seen before.
        """
        accepted = self.suggested != 0 and self.liked != 0
        return {
            "named": True,
            "accepted": accepted,
            "liked": accepted and self.liked == 1,
            "unseen": accepted and self.seen == 0,
        }[choice]


def is_redial(path: Path) -> bool:
    """Whether a path is a zip archive or a folder with one of ReDial's files."""
    return path.suffix.lower() == ".zip" or (path.is_dir() and any((path / name).is_file() for name in FILES.values()))


def read_redial(path: Path, *, choice: Choice = "accepted", validation_frac: float = 0.1) -> Imported:
    """Samples and films of the archive or folder. Raises DataError naming every unusable line, or the missing file."""
    notes = Notes()
    errors: list[str] = []
    conversations: dict[str, list[dict[str, Any]]] = {}
    with _open(path) as files:
        films = _read_films(files[NAMES], f"{path}/{NAMES}", notes) if NAMES in files else {}
        for split, name in FILES.items():
            rows = list(_rows(files[name], f"{path}/{name}", errors))
            conversations[split] = rows
            if not errors and len(rows) != NUM_CONVERSATIONS[split]:
                notes.add(f"files that differ from the release, which has {NUM_CONVERSATIONS}", f"{name}: {len(rows)}")
    if errors:
        raise DataError(f"{path}: {len(errors)} bad line(s); if it is the end of a file, the copy is cut off:", errors)
    for rows in conversations.values():
        for row in rows:
            _add_films(films, row, notes)
    samples = {split: _samples(rows, films, choice, notes) for split, rows in conversations.items()}
    train, validation = _newest_apart(samples["train"], validation_frac)
    splits = {"train": train, "validation": validation, "test": samples["test"]}
    return Imported(f"ReDial at {path}", splits, _items(films, train), notes)


@contextmanager
def _open(path: Path) -> Iterator[dict[str, io.BufferedIOBase]]:
    """The files that count, by name; DataError when one is missing or the archive is broken."""
    wanted = {*FILES.values(), NAMES}
    if path.is_dir():
        found = {name: (path / name).open("rb") for name in wanted if (path / name).is_file()}
        try:
            _check_complete(path, found)
            yield found
        finally:
            for file in found.values():
                file.close()
        return
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise DataError(f"{path}: {broken} in this archive is damaged; download it again, {WHERE}")
            members = {Path(name).name: name for name in archive.namelist() if "__MACOSX" not in name}
            found = {name: archive.open(members[name]) for name in wanted if name in members}
            _check_complete(path, found)
            yield found
    except (zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a whole zip archive ({error}); download it again, {WHERE}") from None


def _check_complete(path: Path, found: Mapping[str, object]) -> None:
    if missing := [name for name in FILES.values() if name not in found]:
        raise DataError(f"{path}: {' and '.join(missing)} missing; ReDial has {' and '.join(FILES.values())}; {WHERE}")


def _rows(file: Iterable[bytes], where: str, errors: list[str]) -> Iterator[dict[str, Any]]:
    """Conversations whose fields have the right types; what is wrong with the others goes to `errors`."""
    for line, row in tqdm(parse_jsonl(file), desc=Path(where).name, unit=" conversations", dynamic_ncols=True):
        problem = row if isinstance(row, str) else _problem(row)
        if problem:
            errors.append(f"{where}:{line}: {problem}")
        else:
            yield row


def _problem(row: Mapping[str, Any]) -> str | None:
    needed = {"conversationId", "messages", "initiatorWorkerId", "respondentWorkerId", "movieMentions"}
    if missing := needed - row.keys():
        return f"missing {', '.join(sorted(missing))}"
    if not str(row["conversationId"]).isdecimal():
        return f"conversationId must be a number, got {row['conversationId']!r}"
    if not isinstance(row["messages"], list):
        return f"messages must be a list, got {type_name(row['messages'])}"
    for place, message in enumerate(row["messages"]):
        if not isinstance(message, dict) or not isinstance(message.get("text"), str):
            return f"messages[{place}] must be an object with a text"
        if message.get("senderWorkerId") not in (row["initiatorWorkerId"], row["respondentWorkerId"]):
            return f"messages[{place}].senderWorkerId is neither the initiator nor the respondent"
    for name in ("movieMentions", "initiatorQuestions", "respondentQuestions"):
        if not isinstance(row.get(name, []), dict | list):
            return f"{name} must be an object, got {type_name(row[name])}"
    return None


def _by_film(value: Any) -> dict[str, Any]:
    """Entries by film id: {"84779": ...}; an empty form is [], and the Hugging Face copy lists {"movieId": "84779"}."""
    if isinstance(value, dict):
        return value
    entries = [entry for entry in value if isinstance(entry, dict) and "movieId" in entry]
    return {str(entry["movieId"]): entry.get("movieName", entry) for entry in entries}


def _read_films(file: io.BufferedIOBase, where: str, notes: Notes) -> dict[str, Film]:
    films: dict[str, Film] = {}
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    for line, row in parse_csv(text, columns=("movieid", "moviename")):
        if isinstance(row, str):
            raise DataError(f"{where}:{line}: {row}")
        _add_film(films, row.get("movieid", ""), row.get("moviename"), notes)
    return films


def _add_films(films: dict[str, Film], row: Mapping[str, Any], notes: Notes) -> None:
    for film_id, name in _by_film(row["movieMentions"]).items():
        if film_id not in films:
            _add_film(films, film_id, name, notes)


def _add_film(films: dict[str, Film], film_id: str, name: object, notes: Notes) -> None:
    if not isinstance(name, str) or not name.strip():
        return  # a film that is nowhere named is noted where it is mentioned
    try:
        title, year = parse_name(name)
    except DataError as error:
        notes.add("films with an impossible year, never ground truth", f"film {film_id}: {name!r}: {error}")
        title, year = name.strip(), None
    else:
        if year is None:
            notes.add("films without a year, never ground truth", f"film {film_id}: {name!r}")
    films[film_id] = Film(title, year)


def _samples(rows: list[dict[str, Any]], films: Mapping[str, Film], choice: Choice, notes: Notes) -> list[Sample]:
    samples: list[Sample] = []
    known: set[str] = set()
    for row in rows:
        where = f"conversation {row['conversationId']}"
        if str(row["conversationId"]) in known:
            notes.add("conversations whose id was there before, left out", where)
        elif row["initiatorWorkerId"] == row["respondentWorkerId"]:
            notes.add("conversations of a worker with themselves, left out", where)
        else:
            known.add(str(row["conversationId"]))
            samples += _conversation_samples(row, films, choice, notes)
    return samples


def _conversation_samples(
    row: Mapping[str, Any], films: Mapping[str, Film], choice: Choice, notes: Notes
) -> Iterator[Sample]:
    turns, named = _turns(row, films, notes)
    forms = _forms(row)
    seen: dict[Film, None] = {}  # by name: a few films have two ids
    titles_before: list[tuple[str, ...]] = []  # by turn
    new: list[list[tuple[str, int]]] = []  # by turn
    for turn, film_ids in zip(turns, named, strict=True):
        titles_before.append(tuple(dict.fromkeys(film.title for film in seen)))
        new.append([])
        for film_id in film_ids:
            film = films[film_id]
            if turn.role == "assistant" and film not in seen and film.year is not None:
                if forms.get(film_id, Form()).allows(choice):
                    new[-1].append((film.title, film.year))
                else:
                    notes.add(f"films of the recommender that are not {choice} by the forms", f"{film.title}")
            seen.setdefault(film)
    for place in range(1, len(turns)):
        if new[place]:
            later = dict.fromkeys(title_year for group in new[place:] for title_year in group)
            sample_id = f"redial-{row['conversationId']}-{place}"
            yield Sample(sample_id, tuple(turns[:place]), titles_before[place], tuple(later))


def _turns(row: Mapping[str, Any], films: Mapping[str, Film], notes: Notes) -> tuple[list[Turn], list[list[str]]]:
    """Turns with names for ids, messages in a row of one speaker joined, and the known films that each names."""
    turns: list[Turn] = []
    named: list[list[str]] = []

    def name_of(match: re.Match[str]) -> str:
        film = films.get(match[1])
        if film is None:
            notes.add("mentions of a film without a name, left as they are", f"{match[0]} in {row['conversationId']}")
            return match[0]
        return film.title if film.year is None else f"{film.title} ({film.year})"

    for message in row["messages"]:
        text = " ".join(_MENTION.sub(name_of, message["text"]).split())
        if not text:
            continue
        role = "user" if message["senderWorkerId"] == row["initiatorWorkerId"] else "assistant"
        if turns and turns[-1].role == role:
            turns[-1] = Turn(role, f"{turns[-1].content} {text}")
        else:
            turns.append(Turn(role, text))
            named.append([])
        named[-1] += [film_id for film_id in _MENTION.findall(message["text"]) if film_id in films]
    return turns, named


def _forms(row: Mapping[str, Any]) -> dict[str, Form]:
    """Both forms in one: what the seeker says counts, the recommender's word where the seeker has none."""
    seeker = _by_film(row.get("initiatorQuestions", []))
    recommender = _by_film(row.get("respondentQuestions", []))
    forms = {}
    for film_id in {*seeker, *recommender}:
        said = {}
        for key in ("suggested", "seen", "liked"):
            answers = [form.get(film_id, {}).get(key) for form in (seeker, recommender)]
            said[key] = next((answer for answer in answers if answer not in (None, _UNSAID)), None)
        forms[film_id] = Form(**said)
    return forms


def _newest_apart(samples: list[Sample], frac: float) -> tuple[list[Sample], list[Sample]]:
    """(the rest, samples of the newest conversations): a share `frac` of the conversations, at least one."""
    numbers = sorted({_number(sample) for sample in samples})
    newest = set(numbers[len(numbers) - max(1, round(frac * len(numbers))) :])
    return (
        [sample for sample in samples if _number(sample) not in newest],
        [sample for sample in samples if _number(sample) in newest],
    )


def _number(sample: Sample) -> int:
    return int(sample.id.split("-")[1])


def _items(films: Mapping[str, Film], train: Iterable[Sample]) -> list[Item]:
    """Every film with a year, by how often it is ground truth in the training split."""
    popularity = Counter((normalise_title(t), year) for sample in train for t, year in sample.groundtruth)
    items = {
        (normalise_title(film.title), film.year): Item(film.title, film.year) for film in films.values() if film.year
    }
    counted = [replace(item, popularity=popularity[key]) for key, item in items.items()]
    return sorted(counted, key=lambda item: (-item.popularity, item.title, item.year))
