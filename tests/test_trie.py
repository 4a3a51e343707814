"""The catalog's trie against slow definitions: sets of whole lists, and the tokenizer's own ids."""

import functools
import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rankgrpo.items.trie import CatalogTrie
from rankgrpo.model.allowed import allowed_logprobs
from rankgrpo.model.tiny import WORD_PATTERN

# ----------------------------------------------------------------------------------------------------------------------
# A catalog of 40 lines with shared beginnings, and tokenizers of four kinds

TITLES = [
    "Heat",
    "Heat 2",
    "The Thing",
    "The Thing from Another World",
    "The",
    "Amélie",
    "東京物語",
    "It",
    "It Follows",
]
TITLES += [f"Star Wars: Episode {n}" for n in ("I", "II", "III", "IV", "IX")]
LINES = [f"{title} ({year})" for title in TITLES for year in (1982, 1995, 2011)][:40]
LINES = [*LINES[:39], "The Thing (1951)"]
EOS = "<|im_end|>"

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_level(split, *, special=(), phrases=(), vocab=400):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["\n".join(LINES)], trainer)
    backend.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return backend


def sentencepiece():
    """Llama-2 style: a space before the text, pieces with U+2581 for spaces, `<0xHH>` for what has no piece."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"HeatThingIFolwsSr:W()0123456789"]
    pieces += ["He", "at", "Heat", "▁Heat", "▁(", "Th", "The", "▁The", "19", "20", "It", "▁It"]
    pieces = list(dict.fromkeys(pieces))
    merges = [("H", "e"), ("a", "t"), ("He", "at"), ("▁", "Heat"), ("▁", "("), ("T", "h"), ("Th", "e"), ("▁", "The")]
    merges += [("1", "9"), ("2", "0"), ("I", "t"), ("▁", "It")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


NAMES = ["merges", "apart", "sentencepiece", "tiny"]


@functools.cache
def tokenizer_named(name):
    backend = {
        "merges": lambda: byte_level(QWEN_SPLIT),
        "apart": lambda: byte_level(GPT2_SPLIT),
        "sentencepiece": sentencepiece,
        "tiny": lambda: byte_level(WORD_PATTERN, phrases=["The Thing (1982)", "Heat (1995)", "The Thing (1951)"]),
    }[name]()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token="<|pad|>")


@functools.cache
def trie_named(name, num_ranks=3):
    tokenizer = tokenizer_named(name)
    return CatalogTrie.build(LINES, tokenizer, num_ranks=num_ranks, eos_id=tokenizer.eos_token_id)


def ids_of(name, items):
    tokenizer = tokenizer_named(name)
    text = "\n".join(LINES[i] for i in items)
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_tokenizers_are_of_the_kinds_they_stand_for():
    tokens = {n: tokenizer_named(n).convert_ids_to_tokens(ids_of(n, [1, 6, 0])) for n in NAMES}
    assert ")Ċ" in tokens["merges"] and tokens["merges"][-2] == ")"
    assert "Ċ" in tokens["apart"] and "Ċ" in tokens["tiny"] and "The Thing (1982)" in tokens["tiny"]
    assert tokens["sentencepiece"][0] == "▁Heat" and tokens["sentencepiece"].count("<0x0A>") == 2
    assert len(LINES) == len(set(LINES)) == 40
    roots = {name: trie_named(name).num_roots for name in NAMES}
    assert roots == {"merges": 2, "apart": 2, "sentencepiece": 3, "tiny": 2}


# ----------------------------------------------------------------------------------------------------------------------
# Paths


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("name", NAMES)
def test_lists_have_the_ids_of_the_tokenizer(name, num_ranks):
    trie, rng = trie_named(name, num_ranks), random.Random(num_ranks)
    for _ in range(20):
        items = rng.sample(range(40), num_ranks)
        assert trie.list_ids(items) == ids_of(name, items)
        assert trie.choices([ids_of(name, items)], num_ranks).items == [items]


@pytest.mark.parametrize("name", NAMES)
def test_nodes_are_the_distinct_beginnings_of_paths(name):
    trie = trie_named(name)
    for place, root, rank in (
        ("first", trie.root_first, 0),
        ("middle", trie.root_middle, 1),
        ("last", trie.root_last, 2),
    ):
        paths = [tuple(trie.line_ids(line, rank)) for line in range(40)]
        beginnings = {path[:n] for path in paths for n in range(len(path) + 1)}
        assert trie.root(rank, 3) == root
        stats = trie.describe()["places"][place]
        assert stats["nodes"] == len(beginnings)
        assert stats["root"] == len({path[0] for path in paths})
        assert stats["tokens_a_line"] == sum(map(len, paths)) / 40
        followers = {b: {p[len(b)] for p in paths if p[: len(b)] == b and len(p) > len(b)} for b in beginnings}
        forced = sum(len(followers[path[:n]]) == 1 for path in paths for n in range(len(path)))
        assert stats["forced"] == pytest.approx(forced / sum(map(len, paths)))


def test_equal_lines_are_one_line_and_reported():
    tokenizer = tokenizer_named("merges")
    lines = ["Heat (1995)", "It (2017)", "Heat (1995)", "The (1982)", "It (2017)", "Heat (1995)"]
    trie = CatalogTrie.build(lines, tokenizer, num_ranks=3, eos_id=tokenizer.eos_token_id)
    assert trie.num_lines == 3 and trie.merged == [[0, 2, 5], [1, 4]]
    assert trie.describe()["merged"] == 3
    walk = trie.start()
    for token_id in trie.list_ids([2, 4, 3]):
        walk.advance(token_id)
    assert walk.done and walk.items == [0, 1, 3]
    with pytest.raises(ValueError, match="seen"):
        trie.start(forbid="repeats+seen", seen=[5])


# ----------------------------------------------------------------------------------------------------------------------
# What is allowed, against sets of whole lists


@functools.cache
def paths_of(name, rank, num_ranks):
    return {line: trie_named(name).line_ids(line, rank, num_ranks) for line in range(40)}


def allowed_by_sets(name, prefix, num_ranks, forbidden, repeats):
    """Ids that follow `prefix` in some list of num_ranks catalog lines: by walking over lines, one at a time."""
    named, rest, rank = [], list(prefix), 0
    while True:
        paths = paths_of(name, rank, num_ranks)
        done = [line for line, path in paths.items() if rest[: len(path)] == path]
        if not done:
            break
        named.append(done[0])
        rest = rest[len(paths[done[0]]) :]
        rank += 1
        if rank == num_ranks:
            return set()
    closed = set(forbidden) | (set() if repeats else set(named))
    return {p[len(rest)] for line, p in paths.items() if line not in closed and p[: len(rest)] == rest}


@pytest.mark.parametrize("forbid", ["none", "repeats", "repeats+seen"])
@pytest.mark.parametrize("name", NAMES)
def test_allowed_ids_are_those_of_the_lists_that_are_left(name, forbid):
    trie, rng = trie_named(name), random.Random(7)
    for num_ranks in (2, 3, 12):
        seen = rng.sample(range(40), 9)
        forbidden = seen if forbid == "repeats+seen" else []
        walk, ids = trie.start(num_ranks, forbid=forbid, seen=seen), []
        asked = []
        while not walk.done:
            allowed = walk.allowed().tolist()
            assert set(allowed) == allowed_by_sets(name, ids, num_ranks, forbidden, forbid == "none")
            assert allowed == sorted(allowed)
            asked.append(allowed)
            run = walk.copy().follow()
            assert (len(run) > 0) == (len(allowed) == 1)
            # Go where few are left, so that whole branches close.
            ids.append(min(allowed, key=lambda i: (i != allowed[0], rng.random())))
            walk.advance(ids[-1])
        assert walk.allowed().tolist() == [] and walk.copy().follow() == []
        choices = trie.choices([ids], num_ranks, forbid=forbid, seen=[seen])
        assert choices.is_choice.tolist() == [len(allowed) > 1 for allowed in asked]
        assert choices.num_allowed.tolist() == [len(allowed) for allowed in asked]
        for token in choices.token_C.tolist():
            assert choices.allowed_at(token).tolist() == asked[token]
        assert choices.items == [walk.items]
        assert (choices.at_root_C == np.isin(choices.token_C, line_starts(trie, walk.lines, num_ranks))).all()


def line_starts(trie, lines, num_ranks):
    sizes = [len(trie.line_ids(line, rank, num_ranks)) for rank, line in enumerate(lines)]
    return np.cumsum([0, *sizes[:-1]])


@pytest.mark.parametrize("name", NAMES)
def test_a_forced_run_goes_to_the_next_choice_or_the_end(name):
    trie, rng = trie_named(name), random.Random(1)
    for _ in range(10):
        walk = trie.start()
        while not walk.done:
            run, before = walk.copy().follow(), walk.copy()
            for token_id in run:
                assert walk.allowed().tolist() == [token_id]
                walk.advance(token_id)
            assert walk.done or len(walk.allowed()) > 1
            assert before.follow() == run  # the copy was not moved
            assert before.done == walk.done and before.allowed().tolist() == walk.allowed().tolist()
            if not walk.done:
                walk.advance(rng.choice(walk.allowed().tolist()))


def test_batch_of_lists_has_the_allowed_ids_of_each():
    trie, rng = trie_named("merges"), random.Random(2)
    walks = [trie.start(5, forbid="repeats+seen", seen=rng.sample(range(40), k)) for k in range(12)]
    for _ in range(25):
        batch = trie.allowed_batch(walks)
        ids, mask = batch.padded()
        for row, walk in enumerate(walks):
            assert batch.ids_F[batch.start[row] : batch.start[row + 1]].tolist() == walk.allowed().tolist()
            assert ids[row, mask[row]].tolist() == walk.allowed().tolist()
            assert (batch.row_F == row).sum() == len(walk.allowed())
            walk.advance(rng.choice(walk.allowed().tolist()))
        walks = [walk for walk in walks if not walk.done]
    walk = trie.start(1) if trie.root_only is not None else walks[0]
    while not walk.done:
        walk.advance(walk.allowed().tolist()[0])
    with pytest.raises(ValueError, match="list 1 of 2 is done"):
        trie.allowed_batch([trie.start(), walk])


def test_some_lists_up_to_some_length_are_as_if_read_alone():
    trie, rng = trie_named("merges"), random.Random(5)
    lists = [trie.list_ids(rng.sample(range(40), 3)) for _ in range(6)]
    seen = [rng.sample(range(40), 12) for _ in lists]
    seen = [
        [item for item in own if item not in trie.choices([ids]).items[0]] for own, ids in zip(seen, lists, strict=True)
    ]
    chosen = [4, 1, 3]
    length = [rng.randint(1, len(lists[b])) for b in chosen]
    options = {"forbid": "repeats+seen"}
    part = trie.choices(lists, seen=seen, **options).of_lists(chosen, length)
    alone = trie.choices(
        [lists[b][:n] for b, n in zip(chosen, length, strict=True)], seen=[seen[b] for b in chosen], **options
    )
    assert len(alone.token_C) > 5 and len(alone.closed_X) > 0
    for name in ("length", "token_C", "node_C", "child_C", "choice_X", "closed_X"):
        assert getattr(part, name).tolist() == getattr(alone, name).tolist(), name
    assert part.is_choice.tolist() == alone.is_choice.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_lists_that_were_cut(name):
    trie = trie_named(name)
    items = [4, 0, 30]
    whole = trie.list_ids(items)
    full = trie.choices([whole])
    starts = [*line_starts(trie, items, 3), len(whole)]
    for length in range(len(whole) + 1):
        cut = trie.choices([whole[:length]])
        assert cut.is_choice.tolist() == full.is_choice[:length].tolist()
        assert cut.items == [[item for item, end in zip(items, starts[1:], strict=True) if end <= length]]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(NAMES), num_ranks=st.integers(2, 40), data=st.data())
def test_any_choices_give_distinct_catalog_lines_in_the_tokenizers_own_ids(name, num_ranks, data):
    trie, tokenizer = trie_named(name), tokenizer_named(name)
    seed = data.draw(st.integers(0, 2**32))
    rng = random.Random(seed)
    walk, ids = trie.start(num_ranks), []
    while not walk.done:
        ids.append(rng.choice(walk.allowed().tolist()))
        walk.advance(ids[-1])
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    lines = text.split("\n")
    assert len(lines) == len(set(lines)) == num_ranks
    assert lines == [LINES[i] for i in walk.items]
    assert ids[:-1] == tokenizer(text, add_special_tokens=False)["input_ids"]


# ----------------------------------------------------------------------------------------------------------------------
# Probabilities


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_of_all_lists_sum_to_one(name):
    """All 59,280 lists of 3 of 40 lines, under a random model that reads the last three ids and the position."""
    trie = trie_named(name)
    generator = torch.Generator().manual_seed(0)
    V, D = len(tokenizer_named(name)), 8
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64)
    tables = [torch.randn(V + 1, D, generator=generator, dtype=torch.float64) for _ in range(4)]
    paths = [[trie.line_ids(line, rank, 3) for line in range(40)] for rank in range(3)]
    total = 0.0
    for first in range(40):
        others = [i for i in range(40) if i != first]
        lists = [paths[0][first] + paths[1][i] + paths[2][j] for i, j in itertools.permutations(others, 2)]
        size = torch.tensor([len(ids) for ids in lists])
        ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in lists], batch_first=True)
        past_BT = torch.nn.functional.pad(ids_BT, (3, 0), value=V)  # V stands for what is before the list
        hidden_BTD = sum(tables[age][past_BT[:, 2 - age : 2 - age + ids_BT.shape[1]]] for age in range(3))
        hidden_BTD = hidden_BTD + tables[3][: ids_BT.shape[1]]
        mask_BT = torch.arange(ids_BT.shape[1]) < size[:, None]
        logp_N = allowed_logprobs(hidden_BTD[mask_BT], weight_VD, trie.choices(lists).for_head())
        logp_B = torch.zeros(len(lists), dtype=torch.float64)
        total += logp_B.index_add_(0, torch.arange(len(lists)).repeat_interleave(size), logp_N).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("block_entries", [1, 50, 10**9])
@pytest.mark.parametrize("name", NAMES)
def test_plan_of_the_head_allows_what_the_trie_allows(name, block_entries):
    trie, rng = trie_named(name), random.Random(5)
    lists, seen = [], [rng.sample(range(40), 5) for _ in range(12)]
    for forbidden in seen:
        walk, ids = trie.start(8, forbid="repeats+seen", seen=forbidden), []
        while not walk.done:
            ids.append(rng.choice(walk.allowed().tolist()))
            walk.advance(ids[-1])
        lists.append(ids[: rng.randrange(1, len(ids) + 1)])
    plan = trie.choices(lists, 8, forbid="repeats+seen", seen=seen).for_head(block_entries=block_entries)
    masks, flat = [], [i for ids in lists for i in ids]
    for ids, forbidden in zip(lists, seen, strict=True):
        walk = trie.start(8, forbid="repeats+seen", seen=forbidden)
        for token_id in ids:
            mask = torch.zeros(len(tokenizer_named(name)), dtype=torch.bool)
            mask[walk.allowed().tolist()] = True
            masks.append(mask)
            walk.advance(token_id)
    hidden = torch.randn(len(flat), 6, dtype=torch.float64)
    weight = torch.randn(len(masks[0]), 6, dtype=torch.float64)
    logits = (hidden @ weight.t()).masked_fill(~torch.stack(masks), -torch.inf)
    expected = logits.log_softmax(-1).gather(1, torch.tensor(flat)[:, None])[:, 0]
    torch.testing.assert_close(allowed_logprobs(hidden, weight, plan), expected)


# ----------------------------------------------------------------------------------------------------------------------
# Errors, one message each


def build(lines, num_ranks=1, name="merges"):
    tokenizer = tokenizer_named(name)
    return CatalogTrie.build(lines, tokenizer, num_ranks=num_ranks, eos_id=tokenizer.eos_token_id)


@pytest.mark.parametrize("lines, num_ranks, message", [
    ([], 1, "the catalog is empty"),
    (["Heat (1995)", " "], 1, "line 1 of the catalog is empty"),
    (["Heat\n(1995)"], 1, r"line 0 .* holds a line break"),
    (["Heat (1995)", "It\r"], 1, r"line 1 .* holds a line break"),
    (["Heat (1995)", "It"], 3, "list of 3 ranks needs as many distinct lines, the catalog has 2"),
    (["Heat (1995)", "Heat (1995)"], 2, "the catalog has 1"),
    (["Heat (1995)"], 0, "at least 1 rank"),
    (["Heat (1995)", f"Bad {EOS} (1995)", "It"], 2, "line 1 of the catalog"),
])  # fmt: skip
def test_catalogs_that_cannot_be_listed(lines, num_ranks, message):
    with pytest.raises(ValueError, match=message):
        build(lines, num_ranks)


def test_line_that_the_tokenizer_cannot_write():
    backend = Tokenizer(models.WordLevel({"Heat": 0, "It": 1, "\n": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, unk_token="<unk>")
    trie = CatalogTrie.build(["Heat", "It"], tokenizer, num_ranks=2, eos_id=tokenizer.eos_token_id)
    assert trie.list_ids([1, 0]) == [1, 2, 0, tokenizer.eos_token_id]
    with pytest.raises(ValueError, match=r"cannot write line 2 of the catalog, 'Ronin'"):
        CatalogTrie.build(["Heat", "It", "Ronin"], tokenizer, num_ranks=2, eos_id=tokenizer.eos_token_id)


def test_tokenizer_whose_lines_depend_on_their_neighbours():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(GPT2_SPLIT), eos_token=EOS)
    tokenizer.add_tokens([AddedToken("(1995)\nIt", special=False)])
    lines = ["Heat (1995)", "It (2017)", "The (1982)"]
    with pytest.raises(ValueError, match=r"line \d of the catalog.* depend on the lines beside it"):
        CatalogTrie.build(lines, tokenizer, num_ranks=2, eos_id=tokenizer.eos_token_id)


def test_tokens_that_are_not_allowed_name_list_and_position():
    trie = trie_named("merges")
    good, twice = trie.list_ids([0, 1, 2]), trie.line_ids(0, 0) + trie.line_ids(0, 1)
    with pytest.raises(ValueError, match=r"list 1, token \d+: id \d+ is not allowed at rank 1 of 3"):
        trie.choices([good, twice])
    assert trie.choices([good, twice], forbid="none").items == [[0, 1, 2], [0, 0]]
    with pytest.raises(ValueError, match=f"list 0, token {len(good)}: .* already done"):
        trie.choices([[*good, good[0]]])
    with pytest.raises(ValueError, match="list 0, token 0"):
        trie.choices([good], forbid="repeats+seen", seen=[list(range(0, 37))])
    walk = trie.start()
    with pytest.raises(ValueError, match="id 999999 is not allowed at rank 0"):
        walk.advance(999999)


def test_terms_that_cannot_be_met():
    trie = trie_named("merges")
    with pytest.raises(ValueError, match="list of 3 ranks needs 3 lines, but 2 of 40 are left"):
        trie.start(forbid="repeats+seen", seen=range(38))
    assert trie.start(forbid="repeats", seen=range(38)).allowed().size > 2
    with pytest.raises(ValueError, match=r"seen items must be in \[0, 40\)"):
        trie.start(forbid="repeats+seen", seen=[40])
    with pytest.raises(ValueError, match="forbid must be one of"):
        trie.start(forbid="seen")
    with pytest.raises(ValueError, match="built with num_ranks=1"):
        trie_named("sentencepiece").start(1)
    with pytest.raises(ValueError, match="seen items of each list, 2, got 1"):
        trie.choices([[], []], seen=[[]])


def test_one_line_left_is_forced():
    trie = trie_named("merges")
    walk = trie.start(2, forbid="repeats+seen", seen=range(38))
    run = walk.copy().follow()
    last = walk.copy()
    for token_id in run:
        last.advance(token_id)
    options = {tuple(trie.list_ids(pair)) for pair in itertools.permutations([38, 39])}
    finished = []
    for first in last.allowed().tolist():
        one = last.copy()
        one.advance(first)
        finished.append((*run, first, *one.copy().follow()))
    assert set(finished) == options
