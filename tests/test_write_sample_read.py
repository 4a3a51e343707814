"""Write, sample, read: an item of any format comes back from any list that is sampled under the catalog's trie."""

import random
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trie import NAMES, tokenizer_named
from transformers import PreTrainedTokenizerFast

from rankgrpo.items.format import ItemFormat
from rankgrpo.items.lines import make_catalog, make_item
from rankgrpo.items.trie import CatalogTrie

# What `make tokenizers` downloads: those of Qwen 2.5, Llama 3.1 and Gemma 3.
REAL = Path(__file__).parents[1] / "build" / "tokenizers"
REAL_NAMES = ["qwen2_5", "llama3_1", "gemma3"]
TITLES = [
    "Heat",
    "HEAT",
    "1984",
    "2001: A Space Odyssey",
    "12 Rules for Life: An Antidote (2nd ed., 2018)",
    "7. Kreuz",
    "(500) Days of Summer",
    "[REC]",
    "- Minus -",
    "* Starred *",
    '"Surely You\'re Joking"',
    "It's, well, this and that",
    "A - B – C — D",
    "Blade Runner (1982) Final Cut",
    "**Bold**",
    "Amélie",
    "Amelie",
    "海辺のカフカ",
    "기생충 (Parasite)",
    "Война и мир",
    "ألف ليلة وليلة",
    "संस्कृत",
    '3-in-1 Pack, 8.5" x 11", 20 lb. - White/Blue',
    "Pen #2 & Pencil @ 50% off; 100 pcs",
    " ".join(f"word{n}" for n in range(31))[:219],
    ('Heavy-Duty Binder, 3 Rings, 1.5" Spine, ' * 6)[:219].strip(),
]
ROWS = [
    {"title": title, "author": author, "year": 1950 + n, "sid": f"<a_{n % 5}><b_{n}>"}
    for n, title in enumerate(TITLES)
    for author in ("Jane Austen", "村上 春樹")
]
FORMATS = ["{title} ({year})", "{title}", "{author} - {title}", "{title} by {author}", "{sid}"]


@cache
def tokenizer_of(name):
    if name in NAMES:
        return tokenizer_named(name)
    folder = REAL / name
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no {folder / 'tokenizer.json'}; `make tokenizers` downloads it")
    return PreTrainedTokenizerFast.from_pretrained(folder)


@cache
def catalog_of(template):
    item_format = ItemFormat(template)
    unique = {item.line: item for item in (make_item(row, item_format) for row in ROWS)}
    return make_catalog(list(unique.values()), item_format)


@cache
def trie_of(name, template):
    return CatalogTrie.build(
        catalog_of(template).lines, tokenizer_of(name), num_ranks=20, eos_id=tokenizer_of(name).eos_token_id
    )


@pytest.mark.parametrize("template", FORMATS)
@pytest.mark.parametrize("name", [*NAMES, *REAL_NAMES])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), num_ranks=st.integers(2, 20))
def test_an_item_that_is_written_and_sampled_is_read_back(name, template, seed, num_ranks):
    catalog, tokenizer, trie, rng = (
        catalog_of(template),
        tokenizer_of(name),
        trie_of(name, template),
        random.Random(seed),
    )
    walk, ids = trie.start(num_ranks), []
    while not walk.done:
        ids.append(rng.choice(walk.allowed().tolist()))
        walk.advance(ids[-1])
    assert len(walk.items) == len(set(walk.items)) == num_ranks
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text.split("\n") == [catalog.lines[item] for item in walk.items]
    assert [catalog.lookup(item.title, item.year) for item in catalog.parse(text)] == walk.items
