from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rankgrpo.data import prompt
from rankgrpo.data.prompt import format_prompt
from rankgrpo.data.samples import Sample, Turn

encode_prompts = partial(prompt.encode_prompts, num_ranks=20)


def encode_prompt(tokenizer, conversation, max_tokens):
    (ids,) = encode_prompts(tokenizer, [Sample("one", tuple(conversation), (), ())], max_tokens)
    return ids


INSTRUCTION = (
    "Pretend you are a movie recommender system.\n"
    "I will give you a conversation between a user and you (a recommender system). Based on the conversation, you need "
    "to reply with 20 recommendations. List the standardized English title of each movie in each line in the form of "
    '"movie name" (release_year) with NO extra words or sentences.\nHere is the conversation: '
)


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED_TEMPLATE = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}" + (
    "Today: {{ date_string }}\n" + TEMPLATE
)


def make_tokenizer(template=TEMPLATE):
    """Byte-level, with a few merges so that pieces cross the places where text is cut."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("l", "l"), ("U", "S"), ("US", "ER"), ("E", "R"), (":", "Ġ"), ("a", "b"), ("ab", "ab")]
    words = alphabet + ["".join(merge) for merge in merges]
    backend = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = make_tokenizer()
CONVERSATION = (Turn("user", "I {like} Heat"), Turn("assistant", "Try Ronin"), Turn("user", "Seen it"))


def test_the_prompt_is_the_papers():
    assert format_prompt(CONVERSATION, 20) == INSTRUCTION + "USER: I {like} Heat\nSYSTEM: Try Ronin\nUSER: Seen it\n"
    assert format_prompt((), 20) == INSTRUCTION


def test_a_prompt_that_fits_is_the_whole_chat_template():
    ids = encode_prompt(TOKENIZER, CONVERSATION, 4096)
    assert TOKENIZER.decode(ids) == (
        f"<|im_start|>user\n{format_prompt(CONVERSATION, 20)}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert encode_prompt(TOKENIZER, CONVERSATION, len(ids)) == ids
    assert len(encode_prompt(TOKENIZER, CONVERSATION, len(ids) - 1)) < len(ids)


def test_a_template_that_writes_the_date_gives_the_same_prompt_every_day():
    text = TOKENIZER.decode(encode_prompt(make_tokenizer(DATED_TEMPLATE), CONVERSATION, 4096))
    assert text.startswith("Today: 26 Jul 2024\n<|im_start|>user")


EMPTY = len(encode_prompt(TOKENIZER, (), 4096))
TURN = st.builds(Turn, st.sampled_from(["user", "assistant"]), st.text("ab :\n\u00e9\u6f22SEUR", max_size=60))


@settings(max_examples=200, deadline=None)
@example([Turn("user", "::::::::::\u00e9\u00e9a")], 12)  # more than half of the turn is kept
@given(st.lists(TURN, min_size=1, max_size=6), st.integers(12, 400))
def test_cutting_keeps_the_instruction_and_the_newest_turns(conversation, room):
    budget = EMPTY + room
    ids = encode_prompt(TOKENIZER, conversation, budget)
    assert len(ids) <= budget
    head, tail = f"<|im_start|>user\n{INSTRUCTION}", "<|im_end|>\n<|im_start|>assistant\n"
    text = TOKENIZER.decode(ids)
    assert text.startswith(head) and text.endswith(tail)
    kept = text[len(head) : -len(tail)]
    suffixes = [format_prompt(conversation[drop:], 20)[len(INSTRUCTION) :] for drop in range(len(conversation))]
    last = conversation[-1]
    name = {"user": "USER", "assistant": "SYSTEM"}[last.role]
    if kept in suffixes:
        drop = suffixes.index(kept)
        # Nothing was dropped that fits, give or take the tokens that merge at the cut.
        assert drop == 0 or len(encode_prompt(TOKENIZER, conversation[drop - 1 :], 1 << 20)) > budget
    else:
        assert kept.startswith(f"{name}: ") and last.content.endswith(kept[len(name) + 2 : -1])
        more = len(kept) - len(name) - 3 + 8  # characters
        longer = Turn(last.role, last.content[max(0, len(last.content) - more) :])
        assert len(encode_prompt(TOKENIZER, [longer], 1 << 20)) > budget - 8
        assert len(encode_prompt(TOKENIZER, [last], 1 << 20)) > budget


def test_the_oldest_turns_go_first():
    old, middle, new = (Turn("user", letter * 40) for letter in "xyz")
    budget = len(encode_prompt(TOKENIZER, [middle, new], 4096))
    assert encode_prompt(TOKENIZER, [old, middle, new], budget) == encode_prompt(TOKENIZER, [middle, new], 4096)
    text = TOKENIZER.decode(encode_prompt(TOKENIZER, [old, middle, new], EMPTY + 20))
    assert "x" not in text.split("conversation: ")[1] and "y" not in text.split("conversation: ")[1]
    assert text.count("z") >= 10


@pytest.mark.parametrize("conversation", [CONVERSATION, ()])
def test_an_instruction_longer_than_the_budget_is_an_error(conversation):
    with pytest.raises(ValueError, match=f"take {EMPTY} tokens, max_tokens is {EMPTY - 1}; raise"):
        encode_prompt(TOKENIZER, conversation, EMPTY - 1)


def test_many_prompts_are_the_single_ones(monkeypatch):
    monkeypatch.setattr(prompt, "ENCODED_AT_ONCE", 3)
    texts = ["ab " * n for n in (1, 40, 3, 200, 5, 6, 7)]
    samples = [Sample(str(n), (Turn("user", "old"), Turn("user", text)), (), ()) for n, text in enumerate(texts)]
    expected = [encode_prompt(TOKENIZER, sample.conversation, EMPTY + 60) for sample in samples]
    assert encode_prompts(TOKENIZER, samples, EMPTY + 60) == expected
    assert max(map(len, expected)) > EMPTY + 50
    assert encode_prompts(TOKENIZER, [], EMPTY) == []


def test_the_prompt_asks_for_as_many_items_as_the_list_has_ranks():
    ten, twenty = (format_prompt(CONVERSATION, num_ranks) for num_ranks in (10, 20))
    assert "reply with 10 recommendations." in ten and ten == twenty.replace("with 20 ", "with 10 ")
    (ids,) = prompt.encode_prompts(TOKENIZER, [Sample("a", CONVERSATION, (), ())], 4096, 10)
    assert "reply with 10 recommendations." in TOKENIZER.decode(ids)
