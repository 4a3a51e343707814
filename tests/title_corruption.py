"""Titles as a language model writes them: a labelled set made from a catalog, for tests/test_match.py and to print.

A catalog is split: its kept items are what a matcher may answer, the held-out ones become negatives. Lines are the
items' names after one or two corruptions; further negatives are invented sequels, plurals and remakes of kept items.
`python tests/title_corruption.py ../shared/data/redial/catalog.jsonl` prints precision and recall by corruption.
"""

import random
import re
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass

from rankgrpo.items.catalog import Catalog, normalise_title

ROMAN = {"2": "II", "3": "III", "4": "IV", "5": "V", "6": "VI", "7": "VII", "8": "VIII"}
WORDS = {"One": "1", "Two": "2", "Three": "3", "Seven": "7", "Eight": "8", "Eleven": "11", "Twelve": "12"}
KEYS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Labelled:
    """Example: Labelled("Matrix, The (1999)", 12, "article moved")"""

    line: str
    index: int | None
    """Item of the kept catalog that the line means; None when that film is not in it."""
    kind: str


def article_moved(title, rng):
    return re.sub(r"^(The|A|An) ([^:]+)", r"\2, \1", title)


def article_dropped(title, rng):
    return re.sub(r"^(The|A|An) ", "", title)


def accents_lost(title, rng):
    return "".join(c for c in unicodedata.normalize("NFD", title) if not unicodedata.combining(c))


def punctuation_lost(title, rng):
    return " ".join(re.sub(r"[^\w\s&]|_", " " if rng.random() < 0.3 else "", title).split())


def ampersand(title, rng):
    return title.replace(" & ", " and ") if " & " in title else title.replace(" and ", " & ", 1)


def numerals(title, rng):
    def swap(match):
        word = match[0]
        other = {v: k for k, v in ROMAN.items()} | WORDS | ROMAN
        return other.get(word, word)

    changed = re.sub(r"\b(Part|Vol\.|Volume|Chapter) (?=\w+$|\w+:)", "" if rng.random() < 0.5 else r"\1 ", title)
    return changed[0] + re.sub(r"(?<=\s)(\d|[IV]{2,4}|VI{1,3}|One|Two|Three|Seven|Eight)\b", swap, changed[1:])


def subtitle_dropped(title, rng):
    return re.split(r": | – ", title)[0]


def separator_changed(title, rng):
    return re.sub(r": | – ", rng.choice([" - ", " – ", ": ", " "]), title)


def letters_swapped(title, rng):
    places = [
        m.start() for m in re.finditer(r"(?<=[a-z])[a-z]{2}(?=[a-z])", title) if title[m.start()] != title[m.end() - 1]
    ]
    if not places:
        return title
    i = rng.choice(places)
    return title[:i] + title[i + 1] + title[i] + title[i + 2 :]


def letter_wrong(title, rng):
    places = [m.start() for m in re.finditer(r"(?<=[a-z])[a-z](?=[a-z])", title)]
    if not places:
        return title
    i = rng.choice(places)
    return title[:i] + rng.choice(["", title[i] * 2, rng.choice(KEYS)]) + title[i + 1 :]


def case_changed(title, rng):
    return rng.choice([str.upper, str.lower, str.title])(title)


TITLE_CORRUPTIONS = {
    article_moved: 3, article_dropped: 2, accents_lost: 3, punctuation_lost: 2, ampersand: 3, numerals: 3,
    subtitle_dropped: 2, separator_changed: 3, letters_swapped: 1, letter_wrong: 1, case_changed: 2,
}  # fmt: skip
YEARS = {"exact": 7, "off by one": 2, "missing": 1}
LINES = (
    "{title} ({year})", "{place}. {title} ({year})", '{place}) "{title}" ({year})', "- **{title}** ({year})",
    "**{title} ({year})** - one to watch", "{title} [{year}]", "{title} - {year}", "{title}, {year}",
    "{title} (directed by somebody, {year})",
)  # fmt: skip
LINES_WITHOUT_YEAR = ("{title}", "{place}. {title}", '"{title}"', "- **{title}**", "**{title}** - one to watch")


def write_line(title, year, rng):
    """The line of a list that names a title and perhaps its year."""
    return rng.choice(LINES if year else LINES_WITHOUT_YEAR).format(title=title, year=year, place=rng.randint(1, 20))


def corrupt(item, rng):
    """(title, year or None, kind): the item's name after up to two corruptions that change it."""
    title, names = item.title, []
    weights = {c: w for c, w in TITLE_CORRUPTIONS.items() if c(title, random.Random(0)) != title}
    for _ in range(rng.choice([0, 1, 1, 2]) if weights else 0):
        change = rng.choices([*weights], [*weights.values()])[0]
        changed = change(title, rng)
        if changed != title and normalise_title(changed):
            title, names = changed, [*names, change.__name__.replace("_", " ")]
    years = rng.choices([*YEARS], [*YEARS.values()])[0]
    year = {"exact": item.year, "off by one": item.year + rng.choice([-1, 1]), "missing": None}[years]
    return title, year, f"{' + '.join(names) or 'spelt right'}, year {years}"


def invented(item, rng):
    """(title, year, kind) of a film that no catalog has: a sequel, a plural, a spin-off or a remake of the item."""
    title, later = item.title, item.year + rng.randint(2, 9)
    singular, plural = re.sub(r"(?<=[^s])s$", "", title), f"{title}es" if title.endswith("s") else f"{title}s"
    return rng.choice(
        [
            (f"{title} {rng.choice('23456789')}", later, "sequel"),
            (f"{title} {rng.choice(['II', 'III', 'Part II', 'Part Two'])}", later, "sequel"),
            (f"{title}: {rng.choice(['The Return', 'Resurrection', 'Next Generation'])}", later, "sequel"),
            (singular if singular != title else plural, item.year + rng.randint(-1, 1), "plural"),
            (f"{rng.choice(['Son of', 'Bride of', 'Escape from', 'Beyond'])} {title}", item.year, "spin-off"),
            (title, item.year + rng.choice([-1, 1]) * rng.randint(4, 40), "remake"),
        ]
    )


def make_labelled(catalog, *, seed=0, held_out=0.2, num_lines=3):
    """(kept catalog, labelled lines): `num_lines` lines an item, kept or held out, and an invented film a kept item.

    Two kinds of line are left out because their label would be wrong: a corruption that is another film's very name
    ("Taxi Driver (1976)" for the one of 1977), and an invention that a film of about that year might be.
    """
    rng = random.Random(seed)
    kept, lost = [], []
    for item in catalog:
        (lost if rng.random() < held_out else kept).append(item)
    labelled = []
    for item, index in [*((item, index) for index, item in enumerate(kept)), *((item, None) for item in lost)]:
        for title, year, kind in (corrupt(item, rng) for _ in range(num_lines)):
            named = {catalog.items[i] for i in catalog.title_indices(title) if year in (None, catalog.items[i].year)}
            if not named or item in named:
                kind = kind if index is not None else f"not in the catalog: {kind}"
                labelled.append(Labelled(write_line(title, year, rng), index, kind))
    titles_of = defaultdict(set)
    for item in catalog:
        titles_of[item.year].add(normalise_title(item.title))
    for item in kept:
        title, year, kind = invented(item, rng)
        near = set().union(*(titles_of[y] for y in range(year - 2, year + 3)))
        if kind != "remake":  # a plural and a spin-off are of the item's own year
            near -= {normalise_title(item.title)}
        if not any(normalise_title(item.title) in real for real in near):
            labelled.append(Labelled(write_line(title, year, rng), None, f"invented {kind}"))
    return Catalog(kept), labelled


@dataclass(frozen=True)
class Result:
    num_answered: int
    num_right: int
    num_positive: int
    wrong: list
    """(labelled, answer) of every wrong answer."""
    missed: list
    """Labelled lines of kept items that were not answered."""

    @property
    def precision(self):
        return self.num_right / self.num_answered

    @property
    def recall(self):
        return self.num_right / self.num_positive


def score(matcher, labelled):
    answers = [matcher.match_line(one.line) for one in labelled]
    pairs = list(zip(labelled, answers, strict=True))
    return Result(
        num_answered=sum(answer is not None for answer in answers),
        num_right=sum(answer is not None and answer == one.index for one, answer in pairs),
        num_positive=sum(one.index is not None for one in labelled),
        wrong=[(one, answer) for one, answer in pairs if answer not in (None, one.index)],
        missed=[one for one, answer in pairs if answer is None and one.index is not None],
    )


def main(path, seed=0):
    from rankgrpo.items.match import TitleMatcher

    kept, labelled = make_labelled(Catalog.from_file(path), seed=int(seed))
    start = time.perf_counter()
    matcher = TitleMatcher(kept)
    built = time.perf_counter()
    result = score(matcher, labelled)
    seconds = time.perf_counter() - built
    print(f"{len(kept)} items, {len(labelled)} lines, {result.num_positive} of them about kept items")
    print(f"precision {result.precision:.4f}, recall {result.recall:.4f}")
    print(f"index {1e3 * (built - start):.0f} ms, 20 lines {2e4 * seconds / len(labelled):.2f} ms")
    for name, group in (("wrong", [one for one, _ in result.wrong]), ("missed", result.missed)):
        totals = Counter(one.kind for one in labelled)
        print(f"\n{len(group)} {name}, most frequent kinds:")
        for kind, count in Counter(one.kind for one in group).most_common(40):
            print(f"  {count:5} of {totals[kind]:5}  {kind}")
    for one, answer in result.wrong:
        print(f"wrong: {one.line!r} -> {kept.items[answer].title} ({kept.items[answer].year})  [{one.kind}]")
    for one in result.missed[:: max(1, len(result.missed) // 60)]:
        print(f"missed: {one.line!r}  [{kept.items[one.index].title}] [{one.kind}]")


if __name__ == "__main__":
    main(*sys.argv[1:])
