"""The parser: hand cases for lines, a slow byte-walking oracle for token ranks, and agreement of the two on any ids.

Tokenizers are trained here, so nothing is downloaded. They differ in what a token may hold: `gpt2` keeps line breaks
apart from their neighbours, `qwen` merges `)\\n` and `\\n\\n`, `superword` crosses spaces and lines, `bytes` has one
byte a token, `sentencepiece` has Metaspace pieces and byte fallback.
"""

import functools
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rankgrpo.parse import ListedItem, RankSegmenter, parse_list

# --------------------------------------------------------------------------------------------------------------------
# Text -> items


def parse_one(line):
    (item,) = parse_list(line)
    return item.title, item.year


DECORATED = r"""
Heat (1995)
  Heat (1995)
Heat [1995]
Heat( 1995 )
1. Heat (1995)
1.Heat (1995)
1) Heat (1995)
1.) Heat (1995)
(1) Heat (1995)
[1] Heat (1995)
#1 Heat (1995)
#1. Heat (1995)
#1: Heat (1995)
1 - Heat (1995)
- Heat (1995)
-Heat (1995)
– Heat (1995)
* Heat (1995)
+ Heat (1995)
• Heat (1995)
•Heat (1995)
- 1. Heat (1995)
1. - Heat (1995)
### 1. Heat (1995)
> Heat (1995)
**Heat** (1995)
**Heat (1995)**
*Heat* (1995)
_Heat_ (1995)
***Heat*** (1995)
__Heat (1995)__
`Heat` (1995)
Heat **(1995)**
**Heat** *(1995)*
1. **Heat** (1995)
1.**Heat** (1995)
**1. Heat** (1995)
**1.** Heat (1995)
**1. Heat (1995)**
* **Heat** (1995): *a crime film*
"Heat" (1995)
"Heat (1995)"
"Heat" (1995),
“Heat” (1995)
„Heat“ (1995)
'Heat' (1995)
'Heat (1995)'
‘Heat’ (1995)
1. "Heat" (1995)
1."Heat" (1995)
1. **"Heat" (1995)**
1. **"Heat (1995)"**
"**Heat**" (1995)
Heat (1995) - a crime film
Heat (1995), remade from L.A. Takedown (1989)
Heat (1995) (Director's Cut)
Heat (1995).""".strip("\n").split("\n")
UNUSUAL_SPACES = ["\u00a0Heat\u3000(1995)", "\ufeff1. \u200bHeat (1995)", "\x00Heat\x7f (1995)", "20.\tHeat (1995)\t"]


@pytest.mark.parametrize("line", DECORATED + UNUSUAL_SPACES)
def test_decorated_line_is_the_bare_title(line):
    assert parse_one(line) == ("Heat", 1995)


HARD_TITLES = """
12 Angry Men = 1957
2001: A Space Odyssey = 1968
10 Things I Hate About You = 1999
(500) Days of Summer = 2009
48 Hrs. = 1982
1917 = 2019
1984 = 1984
300 = 2006
9 = 2009
8½ = 1963
50/50 = 2011
2.0 = 2018
3-Iron = 2004
3:10 to Yuma = 2007
10,000 BC = 2008
13: Game of Death = 2006
1408 = 2007
(1408) = 2007
2012 (Doomsday) = 2009
-30- = 1959
+1 = 2013
#Alive = 2020
*batteries not included = 1987
61* = 2001
M*A*S*H = 1970
'Round Midnight = 1986
’Til There Was You = 1997
Rockin' = 1999
Schindler's List = 1993
"Crocodile" Dundee = 1986
"Weird" and "Wonderful" = 2001
The "Human" Factor = 1975
[REC] = 2007
(T)Raumschiff Surprise = 2004
Birdman or (The Unexpected Virtue of Ignorance) = 2014
Jay and Silent Bob Strike Back... = 2001
...And Justice for All = 1979
Class of 1984 = 1982
Se7en = 1995
$ = 1971
Amélie = 2001
千と千尋の神隠し = 2001
Сталкер = 1979""".strip().split("\n")
HARD_TITLES = [(line.rpartition(" = ")[0], int(line.rpartition(" = ")[2])) for line in HARD_TITLES]
DECORATIONS = [
    "{title} ({year})",
    "{title} [{year}]",
    "1. {title} ({year})",
    "12) {title} ({year})",
    "(7) {title} ({year})",
    "#3 {title} ({year})",
    "4 - {title} ({year})",
    "- {title} ({year})",
    "• 5. {title} ({year})",
    "1. **{title}** ({year})",
    "**{title} ({year})** - why not",
    "“{title}” ({year})",
    '2. "{title}" ({year})',
    "{title} ({year}) and more",
]


@pytest.mark.parametrize("decoration", DECORATIONS)
@pytest.mark.parametrize(("title", "year"), HARD_TITLES)
def test_no_decoration_takes_a_part_of_a_title(title, year, decoration):
    assert parse_one(decoration.format(title=title, year=year)) == (title, year)


UNPARSABLE = """
Ronin
10 Things I Hate About You
Here are 20 recommendations:
Heat, 1995
Heat - 1995
Heat (1995
Heat (95)
Heat (19955)
Heat (1995 film)
(1995)
1. (1995)
- (1995)
12.
---
***""".strip().split("\n")


@pytest.mark.parametrize("line", [*UNPARSABLE, "\u00a0", "\u200b (1995)", "\ufffd"])
def test_line_without_title_or_year_is_unparsable(line):
    assert parse_one(line) == (None, None)


def test_only_one_list_number_is_removed():
    assert parse_one("1. 7. Koğuştaki Mucize (2019)") == ("7. Koğuştaki Mucize", 2019)


def test_unparsable_line_keeps_its_rank():
    items = parse_list("Here you go:\nHeat (1995)\nRonin\nThief (1981)\nAmadeus (19")
    assert [item.title for item in items] == [None, "Heat", None, "Thief", None]
    assert [item.year for item in items] == [None, 1995, None, 1981, None]


@pytest.mark.parametrize(
    "text",
    [
        "Heat (1995)\nThief (1981)",
        "\n\n Heat (1995)\nThief (1981)\n\n",
        "Heat (1995)\r\nThief (1981)\r\n",
        "Heat (1995)\rThief (1981)\r",
        "Heat (1995)\n\nThief (1981)",
        "Heat (1995)\n \t\x0b\x0c\nThief (1981)",
        "\r\n\r\nHeat (1995)\r\n   \r\nThief (1981)\n\r",
    ],
)
def test_blank_lines_and_line_break_styles_cost_no_rank(text):
    assert [(item.title, item.year) for item in parse_list(text)] == [("Heat", 1995), ("Thief", 1981)]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_only_cr_and_lf_end_a_line(separator):
    assert parse_list(f"Heat (1995){separator}Thief (1981)") == [ListedItem("Heat", 1995, (0, 24))]


@pytest.mark.parametrize("text", ["", "\n", " \r\n\t\n", "\x00\n\x1f"])
def test_text_without_visible_character_is_an_empty_list(text):
    assert parse_list(text) == []


def test_chars_are_the_whole_line():
    assert parse_list("\n 1. Heat (1995) \r\nRonin") == [
        ListedItem("Heat", 1995, (1, 17)),
        ListedItem(None, None, (19, 24)),
    ]


def test_overflowing_list_is_not_cut():
    items = parse_list("\n".join(f"{i + 1}. Film {i} ({1990 + i})" for i in range(30)))
    assert [(item.title, item.year) for item in items] == [(f"Film {i}", 1990 + i) for i in range(30)]


LIST_ALPHABET = st.sampled_from(list("ab19.()[]#*_-\"'“” \t\r\n\u00a0\u2028é\ufffd") + ["(1995)", "1. ", "**", "\r\n"])


@given(st.one_of(st.text(max_size=60), st.lists(LIST_ALPHABET, max_size=40).map("".join)))
def test_items_are_the_non_blank_lines_of_any_text(text):
    lines = text.replace("\r", "\n").split("\n")
    expected = [line for line in lines if any(ord(c) > 32 and ord(c) != 127 for c in line)]
    items = parse_list(text)
    assert [text[start:end] for start, end in (item.chars for item in items)] == expected
    for item, line in zip(items, expected, strict=True):
        assert (item.title is None) == (item.year is None)
        if item.title is not None:
            assert item.title and item.title == item.title.strip() and item.title in line
            assert f"{item.year:04d}" in line[line.index(item.title) + len(item.title) :]


# --------------------------------------------------------------------------------------------------------------------
# Token ids -> ranks: tokenizers trained here

TITLES = [title for title, _ in HARD_TITLES] + ["Heat", "Thief", "The Thing", "Paris, Texas", "Les quatre cents coups"]
CORPUS = ["\n".join(f"{t} ({1950 + 7 * i % 70})" for i, t in enumerate(TITLES[k:] + TITLES[:k])) for k in range(12)]
CORPUS += [text.replace("\n", "\n\n") for text in CORPUS[:3]] + [text.replace("\n", "\r\n") for text in CORPUS[3:6]]
CORPUS += ["\n".join(f"{i + 1}. **{t}** ({1960 + i})" for i, t in enumerate(TITLES[k : k + 20])) for k in range(6)]

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES = ["gpt2", "qwen", "superword", "bytes", "sentencepiece"]
EOS = "<|im_end|>"


def byte_level_backend(split, vocab_size):
    backend = Tokenizer(models.BPE())
    steps = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece_backend():
    """Llama-2 style: pieces with U+2581 for a space, `<0xHH>` for bytes; a few line breaks as pieces of their own."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n\n", ")\n", "H", "e", "a", "t", "He", "é"]
    pieces += ["(", ")", *"0123456789", "\n", "▁(", "at", "Heat", "▁Heat"]
    merges = [("H", "e"), ("a", "t"), ("He", "at"), ("▁", "Heat"), ("▁", "("), (")", "\n"), ("\n", "\n")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


@functools.cache
def tokenizer_named(name):
    backend = {
        "gpt2": lambda: byte_level_backend(GPT2_SPLIT, 600),
        "qwen": lambda: byte_level_backend(QWEN_SPLIT, 600),
        "superword": lambda: byte_level_backend(None, 900),
        "bytes": lambda: byte_level_backend(None, 256),
        "sentencepiece": sentencepiece_backend,
    }[name]()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token="<|pad|>")
    tokenizer.add_tokens([AddedToken("line one\nline two", special=False), AddedToken("\n \n", special=False)])
    return tokenizer


@functools.cache
def segmenter_named(name):
    return RankSegmenter(tokenizer_named(name))


@functools.cache
def token_bytes_of(name):
    """Bytes of every id, by other means than the code under test: transformers' own byte table, and literals."""
    tokenizer, byte_of = tokenizer_named(name), {char: byte for byte, char in bytes_to_unicode().items()}
    pieces = []
    for token_id in range(len(tokenizer)):
        token = tokenizer.convert_ids_to_tokens(token_id)
        if token in (EOS, "<|pad|>"):
            pieces.append(b"")
        elif name != "sentencepiece" and set(token) <= set(byte_of):
            pieces.append(bytes(byte_of[char] for char in token))
        elif name == "sentencepiece" and token.startswith("<0x"):
            pieces.append(bytes([int(token[3:5], 16)]))
        else:
            pieces.append(token.replace("▁", " ").encode())
    return pieces


def loop_ranks(pieces):
    """The definition, one byte at a time: ranks of consecutive tokens given their bytes."""
    ranks, line, line_has_text = [], -1, False
    for piece in pieces:
        rank = None
        for byte in piece:
            if byte in b"\r\n":
                line_has_text = False
            elif byte > 32 and byte != 127:
                if not line_has_text:
                    line, line_has_text = line + 1, True
                rank = line if rank is None else rank
        ranks.append(max(line, 0) if rank is None else rank)
    return ranks


def ranks_of(segmenter, ids):
    ids = torch.tensor(ids, dtype=torch.long)
    return segmenter(ids, torch.ones_like(ids)).tolist()


def test_trained_tokenizers_cover_the_cases_they_stand_for():
    pieces = {name: set(token_bytes_of(name)[:-2]) for name in NAMES}
    assert not any(b"\n" in piece.strip(b"\r\n") or b")\n" in piece for piece in pieces["gpt2"])
    assert b")\n" in pieces["qwen"] and b")\n\n" in pieces["qwen"]
    assert any(b"\n" in piece.strip() and b" " in piece for piece in pieces["superword"])
    assert all(len(piece) <= 1 for piece in pieces["bytes"] - {b"line one\nline two"})
    assert any(len(piece) > 1 and not piece.isascii() for piece in pieces["superword"])


@pytest.mark.parametrize("name", NAMES)
def test_vocabulary_bytes(name):
    tokenizer, expected = tokenizer_named(name), token_bytes_of(name)
    segmenter = segmenter_named(name)
    assert segmenter.text([tokenizer.eos_token_id, tokenizer.pad_token_id]) == ""
    for token_id, piece in enumerate(expected):
        assert segmenter.text([token_id]) == piece.decode("utf-8", "replace")


# --------------------------------------------------------------------------------------------------------------------
# Hand cases on hand-made vocabularies

PIECES = [
    b"Heat",
    b" (1995)",
    b"\n",
    b"\r",
    b" ",
    b"a\nb\nc",
    b"x\n",
    b"\ny",
    b"\n\n",
    b"\xe5\x8d",
    b"\x83",
    b"",
    b")\n",
]
HEAT, YEAR, LF, CR, SPACE, ABC, X_LF, LF_Y, LF2, CUT_1, CUT_2, NONE, CLOSE = range(len(PIECES))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([HEAT, YEAR, LF, HEAT, YEAR, NONE], [0, 0, 0, 1, 1, 1]),  # the break and EOS belong to the item before
        ([LF, SPACE, LF, HEAT, LF, HEAT], [0, 0, 0, 0, 0, 1]),  # leading blank lines belong to the first item
        ([HEAT, LF, LF, SPACE, LF, HEAT], [0, 0, 0, 0, 0, 1]),  # blank lines in between
        ([HEAT, CR, LF, HEAT, CR, LF], [0, 0, 0, 1, 1, 1]),  # \r\n over two tokens
        ([HEAT, CR, HEAT, LF, NONE], [0, 0, 1, 1, 1]),  # lone \r; a trailing break costs EOS no rank
        ([HEAT, CLOSE, HEAT, CLOSE, LF2, HEAT], [0, 0, 1, 1, 1, 2]),
        ([ABC, HEAT, LF, HEAT], [0, 2, 2, 3]),  # lines opened inside a token count afterwards
        ([HEAT, ABC, HEAT], [0, 0, 2]),
        ([HEAT, LF, ABC, SPACE, LF, ABC], [0, 0, 1, 3, 3, 4]),
        ([X_LF, X_LF, LF_Y, LF_Y, SPACE, HEAT], [0, 1, 2, 3, 3, 3]),
        ([X_LF, LF, LF_Y], [0, 0, 1]),
        ([HEAT, SPACE, LF, SPACE, HEAT], [0, 0, 0, 0, 1]),  # indentation of an item belongs to the one before
        ([HEAT, LF, CUT_1, CUT_2, LF, CUT_1], [0, 0, 1, 1, 1, 2]),  # half a character is visible
        ([NONE, NONE, HEAT, NONE, HEAT, LF, NONE, HEAT], [0, 0, 0, 0, 0, 0, 0, 1]),  # special tokens have no text
        ([LF, SPACE, NONE, LF2], [0, 0, 0, 0]),  # nothing visible at all
        ([HEAT, 99, LF, -7, HEAT], [0, 0, 0, 0, 1]),  # ids the vocabulary does not have
    ],
)
def test_hand_cases(ids, expected):
    assert ranks_of(RankSegmenter.from_token_bytes(PIECES), ids) == expected


def test_visible_means_neither_ascii_whitespace_nor_control():
    segmenter = RankSegmenter.from_token_bytes([bytes([byte]) for byte in range(256)])
    visible = [byte for byte in range(256) if ranks_of(segmenter, [ord("x"), ord("\n"), byte])[2] == 1]
    assert visible == [byte for byte in range(256) if byte > 0x20 and byte != 0x7F]


def test_overflowing_list_has_ranks_beyond_twenty():
    ids = [HEAT, YEAR, LF] * 30
    assert ranks_of(RankSegmenter.from_token_bytes(PIECES), ids) == [k for k in range(30) for _ in range(3)]


def test_real_ids_merge_line_breaks_as_they_like():
    text = "Heat (1995)\n\nThe Thing (1982)\r\nAmélie (2001)\n"
    assert [item.title for item in parse_list(text)] == ["Heat", "The Thing", "Amélie"]
    for name in NAMES:
        tokenizer = tokenizer_named(name)
        ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        ranks = ranks_of(segmenter_named(name), ids)
        assert ranks == sorted(ranks) and set(ranks) == {0, 1, 2} and ranks[-1] == 2


# --------------------------------------------------------------------------------------------------------------------
# Properties over random ids and random list-like texts


def ids_strategy(name, max_size=60):
    pieces = token_bytes_of(name)
    line_shaping = [i for i, piece in enumerate(pieces) if not piece.strip() or b"\n" in piece or b"\r" in piece]
    return st.lists(st.sampled_from(line_shaping) | st.integers(0, len(pieces) - 1), max_size=max_size)


LINES = st.one_of(
    st.tuples(st.sampled_from(DECORATIONS), st.sampled_from(HARD_TITLES)).map(
        lambda pair: pair[0].format(title=pair[1][0], year=pair[1][1])
    ),
    st.sampled_from(["", " ", "\t", "\u3000", "\u2028", "Ronin", "Here you are:", "Heat (19", "💥 (1999)", "\x00"]),
    st.text(max_size=12),
)
LIST_TEXTS = st.lists(st.tuples(LINES, st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\n \n", " \n"])), max_size=30).map(
    lambda pairs: "".join(line + end for line, end in pairs)
)


@pytest.mark.parametrize("name", NAMES)
def test_any_ids_agree_with_the_loop(name):
    @settings(max_examples=150, deadline=None)
    @given(ids_strategy(name))
    def check(ids):
        assert ranks_of(segmenter_named(name), ids) == loop_ranks([token_bytes_of(name)[i] for i in ids])

    check()


@pytest.mark.parametrize("name", NAMES)
def test_any_ids_agree_with_the_items_of_their_text(name):
    tokenizer, segmenter = tokenizer_named(name), segmenter_named(name)

    @settings(max_examples=150, deadline=None)
    @given(ids_strategy(name))
    def check(ids):
        text = segmenter.text(ids)
        if name != "sentencepiece":
            assert text == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        pieces, ranks, before = [token_bytes_of(name)[i] for i in ids], ranks_of(segmenter, ids), b""
        for piece, rank in zip(pieces, ranks, strict=True):
            if first_visible := re.search(rb"[^\x00-\x20\x7f]", piece):
                up_to_there = before + piece[: first_visible.end()]
                assert rank + 1 == len(parse_list(up_to_there.decode("utf-8", "replace")))
            before += piece
        num_items = len(parse_list(text))
        if not any(re.search(rb"[\r\n]", piece.strip()) for piece in pieces):  # no token has text on two lines
            assert max(ranks, default=0) + 1 == max(num_items, 1)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_list_texts_round_trip(name):
    tokenizer, segmenter = tokenizer_named(name), segmenter_named(name)

    @settings(max_examples=80, deadline=None)
    @given(LIST_TEXTS)
    @example("\r\n\u00a01. Amélie (2001)\r\n\r\n")
    def check(text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = [token_bytes_of(name)[i] for i in ids]
        decoded = b"".join(pieces).decode()
        if name == "sentencepiece":
            assert decoded in (" " + text, text)  # the normalizer's dummy prefix, which the decoder takes off again
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == decoded.removeprefix(" ")
        else:
            assert decoded == text
        check_tokens_against_spans(decoded, pieces, ranks_of(segmenter, ids))

    check()


def check_tokens_against_spans(text, pieces, ranks):
    """A token with visible characters is labelled with the line of the first; only a line break in it gives it more."""
    char_of_byte = [i for i, char in enumerate(text) for _ in char.encode()]
    items, covered, first_byte = parse_list(text), set(), 0
    for piece, rank in zip(pieces, ranks, strict=True):
        visible = {char_of_byte[first_byte + j] for j, byte in enumerate(piece) if byte > 32 and byte != 127}
        first_byte += len(piece)
        lines = [k for k, item in enumerate(items) if any(item.chars[0] <= c < item.chars[1] for c in visible)]
        covered.update(lines)
        assert bool(lines) == bool(visible)
        if lines:
            assert rank == lines[0]
        assert len(lines) <= 1 or b"\n" in piece or b"\r" in piece
    assert covered == set(range(len(items)))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(-1, len(PIECES)), st.booleans()), min_size=9, max_size=9), min_size=1))
def test_masked_tokens_are_as_if_absent(rows):
    segmenter = RankSegmenter.from_token_bytes(PIECES)
    ids_BT = torch.tensor([[token for token, _ in row] for row in rows])
    mask_BT = torch.tensor([[kept for _, kept in row] for row in rows])
    rank_BT = segmenter(ids_BT, mask_BT)
    for ids_T, mask_T, rank_T in zip(ids_BT, mask_BT, rank_BT, strict=True):
        pieces = [PIECES[i] if 0 <= i < len(PIECES) else b"" for i in ids_T[mask_T].tolist()]
        assert rank_T[mask_T].tolist() == loop_ranks(pieces)
        assert (rank_T[~mask_T] == -1).all()


# --------------------------------------------------------------------------------------------------------------------
# Shapes, devices, errors


def test_padding_on_either_side_changes_nothing():
    segmenter, pad = RankSegmenter.from_token_bytes(PIECES), -100
    ids = [LF, HEAT, YEAR, LF, HEAT, NONE]
    expected = [0, 0, 0, 0, 1, 1]
    ids_BT = torch.tensor([ids + [pad] * 3, [pad] * 3 + ids, [pad, *ids, pad, pad]])
    rank_BT = segmenter(ids_BT, ids_BT != pad)
    assert rank_BT.tolist() == [expected + [-1] * 3, [-1] * 3 + expected, [-1, *expected, -1, -1]]
    assert rank_BT.dtype == torch.int64


def test_masked_row_is_all_minus_one():
    ids_BT = torch.tensor([[HEAT, LF, HEAT], [HEAT, LF, HEAT]])
    mask_BT = torch.tensor([[0, 0, 0], [1, 1, 1]])
    assert RankSegmenter.from_token_bytes(PIECES)(ids_BT, mask_BT).tolist() == [[-1, -1, -1], [0, 0, 1]]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 3, 0)])
def test_empty_batches_keep_their_shape(shape):
    ids = torch.zeros(shape, dtype=torch.int32)
    assert RankSegmenter.from_token_bytes(PIECES)(ids, torch.ones(shape)).shape == shape


def test_batch_dimensions_are_independent_lists():
    segmenter = RankSegmenter.from_token_bytes(PIECES)
    ids_PGT = torch.randint(0, len(PIECES), (3, 4, 20), generator=torch.Generator().manual_seed(0))
    mask_PGT = torch.ones_like(ids_PGT)
    rank_PGT = segmenter(ids_PGT.int(), mask_PGT)
    assert rank_PGT.shape == (3, 4, 20)
    for p in range(3):
        for g in range(4):
            assert rank_PGT[p, g].tolist() == loop_ranks([PIECES[i] for i in ids_PGT[p, g].tolist()])


def test_runs_without_reading_a_value():
    # A meta tensor has no values: .item(), boolean indexing and data-dependent shapes raise on it.
    ids_BT = torch.zeros(2, 5, dtype=torch.long, device="meta")
    rank_BT = RankSegmenter.from_token_bytes(PIECES)(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
    assert rank_BT.device.type == "meta" and rank_BT.shape == (2, 5) and rank_BT.dtype == torch.int64


def test_special_tokens_have_no_text_and_other_added_tokens_do():
    tokenizer, segmenter = tokenizer_named("gpt2"), segmenter_named("gpt2")
    two_lines = tokenizer.convert_tokens_to_ids("line one\nline two")
    assert segmenter.text([two_lines, tokenizer.eos_token_id]) == "line one\nline two"
    assert ranks_of(segmenter, [tokenizer.pad_token_id, two_lines, tokenizer.eos_token_id, two_lines]) == [0, 0, 1, 1]


def test_tokenizer_without_decoder_joins_tokens_with_spaces():
    backend = Tokenizer(models.WordLevel({"Heat": 0, "(1995)": 1, "\n": 2, "[UNK]": 7}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    segmenter = RankSegmenter(tokenizer)
    assert segmenter.text([0, 1, 2, 0]).rstrip() == tokenizer.decode([0, 1, 2, 0])
    assert ranks_of(segmenter, [0, 1, 2, 5, 0]) == [0, 0, 0, 0, 1]  # id 5 is a hole in the vocabulary


def test_metaspace_decoder():
    backend = Tokenizer(models.WordLevel({"▁Heat": 0, "▁": 1, "\n": 2, "[UNK]": 3}, unk_token="[UNK]"))
    backend.decoder = decoders.Metaspace()
    assert RankSegmenter(PreTrainedTokenizerFast(tokenizer_object=backend)).text([0, 1, 2]) == " Heat \n"


@pytest.mark.parametrize(
    "decoder", [decoders.WordPiece(), decoders.Replace(Regex("a+"), " "), decoders.Strip("\n", 1, 0), decoders.CTC()]
)
def test_decoder_that_is_no_map_of_tokens_is_refused(decoder):
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.decoder = decoder
    with pytest.raises(ValueError, match="from_token_bytes"):
        RankSegmenter(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_slow_tokenizer_is_refused():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(ValueError, match=r"SlowTokenizer .* RankSegmenter\.from_token_bytes"):
        RankSegmenter(SlowTokenizer())


def test_wrong_shapes_and_dtypes_are_refused():
    segmenter = RankSegmenter.from_token_bytes(PIECES)
    ids_BT = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2, 4\)"):
        segmenter(ids_BT, torch.ones(2, 4))
    with pytest.raises(ValueError, match="must both be"):
        segmenter(torch.tensor(1), torch.tensor(1))
    with pytest.raises(ValueError, match=r"integer dtype, got torch\.bool"):
        segmenter(torch.ones(2, 3, dtype=torch.bool), ids_BT)
