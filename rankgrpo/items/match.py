"""Fuzzy but safe title matching: a line that some other model wrote -> the catalog item it means, or None.

For the lines of a teacher, which spells titles as it likes: "Matrix, The", "Godfather 2", "Léon" without its accent or
subtitle, a year off by one, a typing error. It never settles for the nearest title. A line is matched in steps, from
the exact title to the loosest spelling, and the first step at which the catalog has exactly one item decides; the
looser the spelling, the closer the year must be, and numbers ("Toy Story 2", "Part III") must agree at every step.
A title that fits two items is nobody's.

Rewards do not use this: there a title counts as the catalog spells it, or one of its other titles (`Catalog.lookup`).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from rankgrpo.items.catalog import Catalog, normalise_title
from rankgrpo.items.lines import LineCatalog, LineMatcher
from rankgrpo.items.titles import ARTICLES as MOVED_ARTICLES
from rankgrpo.parse import bare_title, parse_list

YEAR_TOLERANCE = 1
MIN_CHARS = 6
"""A shorter title must be spelt right and have its very year: another film bears nearly the same name."""

ARTICLES = frozenset({"the", "a", "an"})
_PART_WORDS = frozenset({"part", "pt", "vol", "volume", "chapter", "ch", "episode", "ep", "book", "no"})
_EPISODE_WORDS = frozenset({"episode", "ep"})
_SMALL_WORDS = frozenset({"of", "in", "on", "and", "to", "for", "at"})
_SAME_WORD = {"versus": "vs", "doctor": "dr", "mister": "mr", "saint": "st"}
_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )
}
_ROMAN = re.compile(r"(x{0,3})(ix|iv|v?i{0,3})")
_ROMAN_UNITS = {"": 0, "i": 1, "ii": 2, "iii": 3, "iv": 4, "v": 5, "vi": 6, "vii": 7, "viii": 8, "ix": 9}

_SEPARATOR = re.compile(r":\s+|\s-+\s|\s/\s|[()\[\]]|,?\s+or(?=:\s|\s\()|,\s+or\s")
_TWO_TITLES = re.compile(r"(?P<first>.*\S)\s*[(\[](?P<second>[^()\[\]]+)[)\]]")
_SECOND_TITLE = re.compile(r"\s[(\[]|,?\s+or(?=:\s|\s\()|,\s+or\s")
_LAST_ARTICLE = re.compile(rf"(?P<title>.+),\s*(?P<article>{MOVED_ARTICLES})\s*")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_FRACTION = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")
_LETTERS = str.maketrans({"ø": "o", "ł": "l", "æ": "ae", "œ": "oe", "đ": "d", "ð": "d", "þ": "th", "ı": "i"})
_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"\d+")

_YEAR_IN_BRACKETS = re.compile(r"[(\[][^()\[\]]*?\b(?P<year>(?:18|19|20)\d\d)\b[^()\[\]]*[)\]]")
_YEAR_AT_END = re.compile(r"(?P<title>.*\S)\s*[,;:|\-–—]\s*(?P<year>(?:18|19|20)\d\d)\.?")
_BARE_YEAR_AT_END = re.compile(r"(?P<title>.*\S)\s+(?P<year>(?:18|19|20)\d\d)\.?")
_MARKED = re.compile(r"\*\*(?P<bold>[^*]+)\*\*|[\"“](?P<quoted>[^\"“”]+)[\"”]")


@dataclass(frozen=True, slots=True)
class Spelling:
    """A title reduced to what different writers agree on.

    Example: Spelling.of("Godfather, The: Part II") has key "godfather2", words ("godfather", "2"), articles ("the",)
    and numbers {("2",)}.
    """

    key: str
    """The words glued together: "Spider-Man" is "Spiderman", "E.T." is "ET"."""
    words: tuple[str, ...]
    """Without articles, and without the "Part" of "Part 2"."""
    articles: tuple[str, ...]
    heads: tuple[str, ...]
    """Keys of what is left when a subtitle or "Episode IV" is dropped."""
    aliases: tuple[str, ...]
    """Those heads that are the same film for certain: without a second title ("or", brackets) or an episode."""
    tails: tuple[str, ...]
    """Keys of subtitles that could stand alone: two words and more."""
    numbers: frozenset[tuple[str, ...]]
    """The numbers of the title, and of the title without "Episode IV"; titles that share neither are other films."""

    @classmethod
    def of(cls, title: str) -> Spelling:
        segments = [words for part in _SEPARATOR.split(_fold(title)) if (words := _words(part))]
        if len(segments) == 1 and len(_without_articles(segments[0])) == 1:
            segments = [_words(_fold(title), numbers=False)]  # a number alone is a name: Nine is not 9
        bare = [_without_parts(_without_articles(words)) for words in segments]
        plain = [_without_parts(kept) for words in segments if (kept := _without_episode(_without_articles(words)))]
        words = tuple(word for words in bare for word in words)
        key, plain_key = _glue(words), _glue(word for words in plain for word in words)
        heads = {plain_key, *(_glue(segments[0]) for segments in (bare, plain) if segments)}
        before = _SECOND_TITLE.split(title)[0].strip()
        aliases = heads if plain_key != key else {cls.of(before).key} if before != title.strip() else set()
        return cls(
            key=key,
            words=words,
            articles=tuple(words[place] for words in segments for place in _article_places(words)),
            heads=tuple(sorted(heads - {key, ""})),
            aliases=tuple(sorted(aliases - {key, ""})),
            tails=tuple(_glue(words) for words in plain[1:] if len(words) > 1),
            numbers=frozenset(tuple(_NUMBER.findall(k)) for k in (key, plain_key)),
        )


class TitleMatcher:
    """The catalog's spellings, indexed once.

    Example: TitleMatcher(catalog).match_line("3. Matrix, The (1998) - a hacker wakes up")
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        # A name's number below len(catalog) is that item's own title; the other titles follow.
        others = [(index, name) for index, item in enumerate(catalog) for name in item.aliases]
        self._item_of = [*range(len(catalog)), *(index for index, _ in others)]
        self._years = [catalog.items[index].year for index in self._item_of]
        self._spellings = [Spelling.of(name) for name in (*(i.title for i in catalog), *(name for _, name in others))]
        self._by_key: dict[str, list[int]] = defaultdict(list)
        self._by_head: dict[str, list[int]] = defaultdict(list)
        self._by_tail: dict[str, list[int]] = defaultdict(list)
        self._keys = [spelling.key for spelling in self._spellings]
        self._by_year: dict[int, tuple[list[int], list[str]]] = {}
        for name, (spelling, year) in enumerate(zip(self._spellings, self._years, strict=True)):
            self._by_key[spelling.key].append(name)
            for head in spelling.heads:
                self._by_head[head].append(name)
            for tail in spelling.tails:
                self._by_tail[tail].append(name)
            names, keys = self._by_year.setdefault(year, ([], []))
            names.append(name)
            keys.append(spelling.key)
        self._vocabulary = frozenset(word for spelling in self._spellings for word in spelling.words)

    def match_line(self, line: str) -> int | None:
        """Index of the item that a free-form line of a list names, or None. See `readings` for what a line may hold."""
        for title, year in readings(line):
            index = self.match(title, year)
            if index is not None:
                return index
        return None

    def match(self, title: str, year: int | None = None) -> int | None:
        """Index of the item meant by a title and perhaps its year, or None when none or more than one is."""
        if year is not None and type(year) is not int:
            raise ValueError(f"year must be an int or None, got {year!r} for title {title!r}")
        spelling = Spelling.of(title)
        if not spelling.key:
            return None
        if year is None:
            return self._match_without_year(title, spelling)
        for candidates in (self._catalog.title_indices(title), self._by_key.get(spelling.key, ())):
            if exact := self._near(candidates, year, 0):
                return self._only(exact)
        if (both := _TWO_TITLES.fullmatch(title)) and (named := self._in_brackets(both.groups(), spelling, year)):
            return self._only(named)
        subtitle_differs = self._subtitle_differs(spelling, year)
        off_by_one = self._near(self._same_articles(spelling), year, YEAR_TOLERANCE)
        if off_by_one and len(spelling.key) >= MIN_CHARS:
            return None if subtitle_differs else self._only(off_by_one)
        if subtitle_differs:
            in_series = {self._item_of[name] for name in self._sharing(spelling.key)}
            return self._only(subtitle_differs) if len(in_series) < 2 else None
        return self._typing_error(spelling, year)

    def _in_brackets(self, titles: Iterable[str], spelling: Spelling, year: int) -> list[int]:
        """Names of this very year that a title or the one in brackets after it is: "기생충 (Parasite)"."""
        found = []
        for title in titles:
            candidates = self._catalog.title_indices(title) or self._by_key.get(Spelling.of(title).key, ())
            found += self._near(candidates, year, 0)
        return [name for name in found if not spelling.numbers.isdisjoint(self._spellings[name].numbers)]

    def _match_without_year(self, title: str, spelling: Spelling) -> int | None:
        """The one item with this spelling. One word must be the very title, a long title may have a typing error."""
        alike = self._catalog.title_indices(title)
        if len(spelling.words) < 2:
            rivals = {self._item_of[name] for name in self._by_key.get(spelling.key, ())}
            is_number = len(title.strip()) < 3 and title.strip().isdecimal()  # of a line, rather than a title
            return alike[0] if len(alike) == 1 and rivals == set(alike) and not is_number else None
        alike = alike or self._same_articles(spelling)
        return self._only(alike) if alike else self._typing_error(spelling, None)

    def _only(self, names: Iterable[int]) -> int | None:
        """The item that all these names are of; None when there is none or more than one."""
        items = {self._item_of[name] for name in names}
        return items.pop() if len(items) == 1 else None

    def _same_articles(self, spelling: Spelling) -> list[int]:
        """Items of this spelling, articles included unless the title is long: "The Heat" is not "Heat"."""
        alike = self._by_key.get(spelling.key, ())
        return [i for i in alike if len(spelling.words) > 3 or self._spellings[i].articles == spelling.articles]

    def _near(self, candidates: Iterable[int], year: int, tolerance: int) -> list[int]:
        """Candidates of the nearest year within the tolerance: one, or several that are equally near."""
        distances = {index: abs(self._years[index] - year) for index in candidates}
        nearest = min(distances.values(), default=tolerance + 1)
        return [index for index, distance in distances.items() if distance == nearest <= tolerance]

    def _sharing(self, key: str) -> set[int]:
        """Items that a key names, whole or without their subtitle."""
        return {*self._by_key.get(key, ()), *self._by_head.get(key, ()), *self._by_tail.get(key, ())}

    def _subtitle_differs(self, spelling: Spelling, year: int) -> list[int]:
        """Items of this very year that are this title but for a subtitle which one of the two lacks."""
        shorter = {i for part in (*spelling.aliases, *spelling.tails) for i in self._by_key.get(part, ())}
        return [
            i
            for i in sorted(self._sharing(spelling.key) | shorter)
            if self._years[i] == year and not spelling.numbers.isdisjoint(self._spellings[i].numbers)
        ]

    def _typing_error(self, spelling: Spelling, year: int | None) -> int | None:
        """The one item whose spelling is a few edits away, nothing that is a word of its own being changed."""
        from rapidfuzz import process  # only here: exact catalogs work without it
        from rapidfuzz.distance import OSA

        num_chars = len(spelling.key)
        if year is None:
            searches = [(range(len(self._keys)), self._keys, min(_num_edits(num_chars - 8), 1))]
        else:
            near = [(year, _num_edits(num_chars))]
            near += [(year + d, _num_edits(num_chars - 5)) for d in (-YEAR_TOLERANCE, YEAR_TOLERANCE)]
            searches = [(*self._by_year[y], num_edits) for y, num_edits in near if y in self._by_year]
        found: dict[int, int] = {}
        for indices, keys, limit in searches:
            if limit > 0:
                near = process.extract(spelling.key, keys, scorer=OSA.distance, score_cutoff=limit, limit=None)
                found |= {indices[place]: distance for _, distance, place in near}
        similar = {i: d for i, d in found.items() if self._is_typing_error(spelling, self._spellings[i])}
        return self._only([name for name, distance in similar.items() if distance == min(similar.values())])

    def _is_typing_error(self, written: Spelling, meant: Spelling) -> bool:
        if written.numbers != meant.numbers or written.key[0] != meant.key[0]:
            return False
        if len(written.words) < 3 and written.articles != meant.articles:
            return False
        extra, lost = Counter(written.words), Counter(meant.words)
        extra, lost = extra - lost, lost - extra
        pairs = [(written.key, meant.key), *((a, b) for a in extra for b in lost)]
        if any(_is_plural(*pair) for pair in pairs) or extra.keys() & self._vocabulary:
            return False  # another word is another film: Dark Water, Dark Waters
        return bool(extra) or lost.keys() <= _SMALL_WORDS


def open_matcher(catalog: Catalog) -> TitleMatcher | LineMatcher:
    """The matcher for the lines of teachers that goes with the catalog's format."""
    return LineMatcher(catalog) if isinstance(catalog, LineCatalog) else TitleMatcher(catalog)


def readings(line: str) -> list[tuple[str, int | None]]:
    """What a line may mean as (title, year), likeliest first; empty for a line without text.

    The year is in brackets, alone (`Heat (1995)`) or with more (`Heat (Michael Mann, 1995)`), or ends the line
    (`Heat - 1995`); list numbers, bullets, quotes, emphasis and what follows the year are removed, and of a line that
    marks a part of itself (`**Heat**: a heist`) the part is a reading too.
    """
    line = line.strip()
    title, year = None, None
    for item in parse_list(line):
        if item.title is not None:
            title, year = item.title, item.year
    if title is None and (match := _YEAR_IN_BRACKETS.search(line)) and line[: match.start()].strip():
        title, year = bare_title(line[: match.start()]), int(match["year"])
    found: list[tuple[str, int | None]] = []
    if title is not None:
        found.append((title, year))
    else:
        bare = bare_title(line)
        if match := _YEAR_AT_END.fullmatch(bare):
            found.append((bare_title(match["title"]), int(match["year"])))
        found.append((bare, None))
        if match := _BARE_YEAR_AT_END.fullmatch(bare):
            found.append((match["title"], int(match["year"])))
    for match in _MARKED.finditer(line):
        found.append(((match["bold"] or match["quoted"]).strip(" :-–—"), year))
    return [(title, year) for title, year in dict.fromkeys(found) if title]


# ----------------------------------------------------------------------------------------------------------------------
# Spelling


def _fold(title: str) -> str:
    """Lower case without accents, "and" for &; dashes and quotes are ASCII already, percent escapes undone."""
    folded = normalise_title(_FRACTION.sub(" ", unquote(title)))
    plain = "".join(c for c in unicodedata.normalize("NFKD", folded) if not unicodedata.combining(c))
    return _THOUSANDS.sub("", plain.translate(_LETTERS)).replace("&", " and ").replace(" + ", " and ")


def _words(part: str, *, numbers: bool = True) -> list[str]:
    if match := _LAST_ARTICLE.fullmatch(part.strip()):
        part = f"{match['article']} {match['title']}"
    words = _WORD.findall(part.replace("'", "").replace("⁄", " "))
    return [_as_number(words, place) for place in range(len(words))] if numbers else words


def _as_number(words: Sequence[str], place: int) -> str:
    """The word at a place, numbers as digits: "II", "Part One", "Eleven"; "I", "V" and "X" where they must be one."""
    word = words[place]
    if word in _NUMBER_WORDS:
        return _NUMBER_WORDS[word]
    after_part = place > 0 and words[place - 1] in _PART_WORDS
    last = place == len(words) - 1
    roman = _ROMAN.fullmatch(word) if place > 0 else None
    if roman and (len(word) > 1 or after_part or (last and word != "i")):
        return str(10 * len(roman[1]) + _ROMAN_UNITS[roman[2]])
    return "vs" if word == "v" else _SAME_WORD.get(word, word)


def _article_places(words: Sequence[str]) -> list[int]:
    """Where an article stands before a word; the A of M*A*S*H and of Plan A is none."""
    return [i for i, word in enumerate(words[:-1]) if word in ARTICLES and len(words[i + 1]) > 1]


def _without_articles(words: Sequence[str]) -> list[str]:
    articles = set(_article_places(words))
    return [word for place, word in enumerate(words) if place not in articles]


def _without_parts(words: list[str]) -> list[str]:
    """ "Part 2" is "2"."""
    following = [*words[1:], ""]
    return [w for w, after in zip(words, following, strict=True) if not (w in _PART_WORDS and after.isdecimal())]


def _without_episode(words: list[str]) -> list[str]:
    """ "Star Wars Episode 4" is "Star Wars": the episode is told by the subtitle or the year."""
    kept = list(words)
    for place in range(len(words) - 2, -1, -1):
        if words[place] in _EPISODE_WORDS and words[place + 1].isdecimal():
            del kept[place : place + 2]
    return kept


def _is_plural(a: str, b: str) -> bool:
    short, long = sorted((a, b), key=len)
    return long == f"{short}es" if short.endswith("s") else long == f"{short}s"


def _num_edits(num_chars: int) -> int:
    """Typing errors that a title of so many characters bears without becoming another."""
    return sum(num_chars >= length for length in (MIN_CHARS, 14, 24))


def _glue(words: Iterable[str]) -> str:
    """Words without spaces, except between numbers."""
    return re.sub(r"(?<!\d) | (?!\d)", "", " ".join(words))
