"""Thoughts are no part of a list: text and tokens agree, also where ordinary tokens spell a mark and cut it anywhere.

The oracle walks a completion byte by byte and knows no table.
"""

import functools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parse import EOS, NAMES, loop_ranks, ranks_of, token_bytes_of, tokenizer_named
from test_write_sample_read import REAL_NAMES
from test_write_sample_read import tokenizer_of as real_tokenizer
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.items.format import ItemFormat
from rankgrpo.items.lines import make_catalog, make_item
from rankgrpo.parse import RankSegmenter, parse_list
from rankgrpo.thoughts import MARKS, list_decoder, list_start

BLOCKS = [
    "<think>\nHeat (1995)?\n</think>\n\n",
    "[THINK]Heat (1995)[/THINK]",
    "<seed:think>a\nb</seed:think>",
    "<|channel>thought\nHm\n<channel|>",
    "<|channel|>analysis<|message|>Hm\n<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|channel|>final<|message|>",
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_thought_is_no_item(block):
    for before in ("", "\n", block, "its beginning stands in the prompt\n</think>"):
        text = f"{before}{block}Heat (1995)\nRonin (1998)"
        items = parse_list(text)
        assert [item.title for item in items] == ["Heat", "Ronin"]
        assert [text[slice(*item.chars)] for item in items] == ["Heat (1995)", "Ronin (1998)"]


@pytest.mark.parametrize("begins", MARKS)
def test_a_thought_that_never_ends_leaves_no_list(begins):
    assert parse_list(f"{begins}Heat (1995)\nRonin (1998)") == []
    assert parse_list(f"</think>Heat (1995)\n{begins}Ronin (1998)") == []
    assert list_start(f"Heat{begins}") == len(f"Heat{begins}")


@pytest.mark.parametrize(
    "text", ["<thinking> (1995)", "[REC] (2007)", "<|message|>Heat (1995)", "</ think>Heat (1995)"]
)
def test_what_only_looks_like_a_mark_is_a_line(text):
    assert len(parse_list(text)) == 1 and list_start(text) == 0


def test_catalogs_of_every_format_read_the_list_alone():
    text = "<think>Emma by Jane Austen\n</think>\nDune by Frank Herbert\nHeat (1995)"
    rows = [{"title": "Dune", "author": "Frank Herbert"}, {"title": "Emma", "author": "Jane Austen"}]
    form = ItemFormat("{title} by {author}")
    books = make_catalog([make_item(row, form) for row in rows], form)
    assert [item.title for item in books.parse(text)] == ["Dune by Frank Herbert", None]
    assert [item.title for item in Catalog([Item("Heat", 1995)]).parse(text)] == [None, "Heat"]


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def loop_ranks_after_thoughts(pieces):
    """Ranks of consecutive tokens given their bytes: the last mark is looked for at every byte."""
    whole, place, ends = b"".join(pieces), -1, True
    owner = [token for token, piece in enumerate(pieces) for _ in piece]
    for at in range(1, len(whole) + 1):
        marks = [e for b, end in MARKS.items() for m, e in ((b, False), (end, True)) if whole[:at].endswith(m.encode())]
        if marks:
            place, ends = at, any(marks)
    if place < 0:
        return loop_ranks(pieces)
    if not ends:
        return [-1] * len(pieces)
    token = owner[place - 1]
    rest = whole[place : place + owner[place:].count(token)]
    return [-1] * (token + 1) + loop_ranks([rest, *pieces[token + 1 :]])[1:]


@functools.cache
def marked_tokenizer(name):
    """A tokenizer with marks among its tokens, those of gpt-oss special, others not; its segmenter; its ids' bytes."""
    if name in REAL_NAMES:
        tokenizer = real_tokenizer(name)
        segmenter = RankSegmenter(tokenizer)
        return tokenizer, segmenter, segmenter._token_bytes  # vocabulary bytes are tested in test_parse
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_named(name).backend_tokenizer.to_str()),
        eos_token=EOS,
        pad_token="<|pad|>",
    )
    plain, special = (
        ["<think>", "</think>", "[/THINK]\n", "k>\nHeat\n", "<|ch"],
        ["<|channel|>", "<|message|>", "<|end|>"],
    )
    tokenizer.add_tokens([AddedToken(token, special=False) for token in plain])
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special], special_tokens=True)
    pieces = [*token_bytes_of(name), *(token.encode() for token in [*plain, *special[:2]]), b""]
    assert len(pieces) == len(tokenizer)
    return tokenizer, RankSegmenter(tokenizer), pieces


def answers(pieces):
    """Ids of lists with marks in them: as tokens of their own, byte by byte with special tokens in between, cut."""
    byte_id = {piece[0]: i for i, piece in enumerate(pieces) if len(piece) == 1}
    empty = [i for i, piece in enumerate(pieces) if not piece]
    brackets = [i for i, piece in enumerate(pieces) if re.search(rb"[<>\[\]]", piece)]
    shaping = [i for i, piece in enumerate(pieces) if b"\n" in piece or b"\r" in piece]

    def spell(text, at=-1):
        ids = [byte_id[byte] for byte in text.encode()]
        return ids if at < 0 else [*ids[:at], *empty[:1], *ids[at:]]

    spelled = st.builds(spell, st.sampled_from([*MARKS, *MARKS.values()]), st.integers(-9, 30))
    lines = st.sampled_from(["Heat (1995)\n", "\n", "Ronin\r\n", "final", "[REC] (2007)"]).map(spell)
    one = st.one_of(st.sampled_from(brackets), st.sampled_from(shaping), st.integers(0, len(pieces) - 1))
    parts = st.lists(st.one_of(one.map(lambda i: [i]), spelled, lines), max_size=14)
    return parts.map(lambda lists: [i for each in lists for i in each])


@pytest.mark.parametrize("name", [*NAMES, *REAL_NAMES])
def test_text_and_tokens_agree(name):
    tokenizer, segmenter, pieces = marked_tokenizer(name)
    decode = list_decoder(tokenizer)

    @settings(max_examples=100, deadline=None)
    @given(answers(pieces))
    def check(ids):
        own = [pieces[i] for i in ids]
        ranks = ranks_of(segmenter, ids)
        assert ranks == loop_ranks_after_thoughts(own)
        text = segmenter.text(ids)
        if name not in ("sentencepiece", "gemma3"):
            assert decode(ids) == text
        # A byte is a character of Latin-1, which is visible or not as the byte is, so places are those of bytes.
        whole, seen = b"".join(own).decode("latin-1"), 0
        start = list_start(whole)
        for piece, rank in zip(own, ranks, strict=True):
            if rank < 0:
                assert seen < start or start == len(whole)
            elif visible := re.search(rb"[^\x00-\x20\x7f]", piece):
                assert seen >= start and rank + 1 == len(parse_list(whole[: seen + visible.end()]))
            seen += len(piece)

    check()


def test_rows_of_a_batch_have_thoughts_of_their_own():
    tokenizer, segmenter, pieces = marked_tokenizer("qwen")
    texts = ["<think>Heat</think>Ronin\nHeat", "Heat\nRonin", "<think>Heat", "</think>", "a</think>\n\nRonin\nHeat"]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    longest = max(map(len, rows)) + 2
    ids_BT = torch.tensor([[*row, *[-100] * (longest - len(row))] for row in rows])
    expected = [[*loop_ranks_after_thoughts([pieces[i] for i in row]), *[-1] * (longest - len(row))] for row in rows]
    assert segmenter(ids_BT, ids_BT >= 0).tolist() == expected
    assert segmenter(ids_BT.flip(1).view(1, 5, -1), ids_BT.flip(1).view(1, 5, -1) < -200).unique().tolist() == [-1]


def test_the_marks_of_gpt_oss_are_special_tokens_and_its_end_is_none_of_them():
    tokenizer, segmenter, _ = marked_tokenizer("gpt2")
    text = f"{BLOCKS[4]}Heat (1995)\nRonin (1998)\n"
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids("<|end|>")]
    assert tokenizer.convert_tokens_to_ids("<|channel|>") in ids
    assert "channel" not in tokenizer.decode(ids, skip_special_tokens=True)
    assert [item.title for item in parse_list(list_decoder(tokenizer)(ids))] == ["Heat", "Ronin"]
    ranks = ranks_of(segmenter, ids)
    assert ranks[0] == -1 and ranks[-1] == 1 and set(ranks) == {-1, 0, 1}
