"""Prompts of one's own: nouns, forms, files, system prompts, and the placeholders that there are."""

import pytest
from test_prompt import CONVERSATION, INSTRUCTION, TOKENIZER

from rankgrpo.config import DataConfig
from rankgrpo.data.prompt import PromptFormat, encode_prompts, format_prompt, open_prompt, prompt_of_nouns
from rankgrpo.data.samples import Candidate, Sample, Turn
from rankgrpo.distill.metadata import metadata_prompt
from rankgrpo.distill.reflect import judge_prompt
from rankgrpo.errors import ConfigError
from rankgrpo.items.catalog import Item
from rankgrpo.items.format import ItemFormat

SAMPLE = Sample("a", CONVERSATION, ("Heat", "Ronin"), (), fields=(("mood", "{num_ranks} sad"),))
BOOK = "{title} by {author}"


def made(tmp_path, text="", **settings):
    if text:
        (tmp_path / "prompt.txt").write_text(text)
        settings["prompt"] = str(tmp_path / "prompt.txt")
    return open_prompt(DataConfig(**settings))


def test_without_settings_it_is_the_papers(tmp_path):
    assert made(tmp_path).text(SAMPLE, 20) == format_prompt(CONVERSATION, 20)
    films = made(tmp_path, item_noun="film").text(SAMPLE, 20)
    assert films == format_prompt(CONVERSATION, 20).replace("movie", "film")


def test_other_items_have_their_noun_and_their_form(tmp_path):
    prompt = made(tmp_path, item=BOOK, item_noun="book")
    text = prompt.text(SAMPLE, 200)
    assert text.startswith(
        "Pretend you are a book recommender system.\nI will give you a conversation between a user and "
    )
    assert (
        "you need to reply with 200 recommendations. List each book in a line of its own in the form of title by "
        in text
    )
    assert text.endswith("Here is the conversation: USER: I {like} Heat\nSYSTEM: Try Ronin\nUSER: Seen it\n")
    assert "a item recommender" in made(tmp_path, item="{sid}").text(SAMPLE, 1)


def test_a_file_has_every_placeholder_filled_at_once(tmp_path):
    text = "{mood}|{num_ranks}|{seen}|{noun}|{nouns}|{form}|{context}"
    prompt = made(tmp_path, text, item=BOOK, item_noun="story", item_nouns="stories")
    prompt.check([SAMPLE])
    context = "USER: I {like} Heat\nSYSTEM: Try Ronin\nUSER: Seen it\n"
    assert prompt.text(SAMPLE, 7) == f"{{num_ranks}} sad|7|Heat, Ronin|story|stories|title by author|{context}"
    braces = Sample("b", (Turn("user", "{seen} {num_ranks}"),), ("Heat",), (), fields=(("mood", "x"),))
    assert prompt.text(braces, 7).endswith("|USER: {seen} {num_ranks}\n")


def test_candidates_are_shown_with_their_text(tmp_path):
    candidates = (Candidate("[1]", None, "About ships."), Candidate("[2]"))
    sample = Sample("a", CONVERSATION, (), (), candidates=candidates)
    text = made(tmp_path, item="{label}", item_noun="passage").text(sample, 2)
    assert "candidate passages" in text and "the 2 best candidates" in text and "the form of label" in text
    assert "Here are the candidates:\n[1] About ships.\n[2]\nHere is the conversation: USER: " in text
    with pytest.raises(ConfigError, match="sample 'a' has candidates; the template needs {candidates}"):
        made(tmp_path, "{context}").check([sample])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("List {num_ranks} films", "the template needs {context}, where the conversation goes"),
        ("{context} {genre}", "{genre} is no placeholder for sample 'a'; there are {context}, {num_ranks}, {seen}, "),
        ("{context} {genre}", "{form}, {mood}, and further fields"),
    ],
)
def test_a_template_that_cannot_be_filled_lists_the_right_ones(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, text).check([SAMPLE])
    assert message in str(caught.value) and f"data.prompt = {tmp_path}" in str(caught.value)


def test_settings_that_cannot_be_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="data.prompt: nowhere.txt: no such file"):
        open_prompt(DataConfig(prompt="nowhere.txt"))
    with pytest.raises(ConfigError, match="data.chat_template_kwargs.*JSON object"):
        DataConfig(chat_template_kwargs="thinking")
    with pytest.raises(ConfigError, match="data.item.*names no column"):
        DataConfig(item="Title")


def test_a_system_prompt_and_arguments_reach_the_chat_template(tmp_path):
    tokenizer = TOKENIZER.__class__(tokenizer_object=TOKENIZER.backend_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{{ mode }}{{ date_string }}"
    )
    prompt = made(tmp_path, "{context}", system_prompt="Be brief.", chat_template_kwargs='{"mode": "plain "}')
    (ids,) = encode_prompts(tokenizer, [SAMPLE], 4096, 20, prompt=prompt)
    context = "USER: I {like} Heat\nSYSTEM: Try Ronin\nUSER: Seen it\n"
    assert tokenizer.decode(ids) == f"[system] Be brief.[user] {context}plain 26 Jul 2024"


def test_a_long_conversation_loses_turns_and_nothing_else(tmp_path):
    prompt = made(tmp_path, "Before {seen}. {context}After")
    turns = tuple(Turn("user", letter * 30) for letter in "xyz")
    sample = Sample("a", turns, ("Heat",), ())
    (whole,) = encode_prompts(TOKENIZER, [sample], 4096, 20, prompt=prompt)
    (ids,) = encode_prompts(TOKENIZER, [sample], len(whole) - 10, 20, prompt=prompt)
    text = TOKENIZER.decode(ids)
    assert "Before Heat. USER: y" in text and "x" not in text and "z" * 30 + "\nAfter" in text


def test_the_fixed_lines_are_those_of_the_prompt():
    lines = PromptFormat().fixed_lines(20)
    assert "\n".join(lines) == INSTRUCTION
    own = PromptFormat(template="Now {seen}, list {num_ranks}:\n{context}")
    assert own.fixed_lines(5) == ["Now ", ", list 5:"]


def test_the_questions_of_distill_speak_of_the_same_things():
    books = prompt_of_nouns(BOOK, "book")
    emma = Item("Emma by Jane Austen")
    assert "a book recommender system" in judge_prompt(SAMPLE, [emma], books)
    assert "candidate books" in judge_prompt(SAMPLE, [emma], books)
    assert "in the form of title by author####rating" in judge_prompt(SAMPLE, [emma], books)
    assert "in the form of movie_name (release_year)####rating" in judge_prompt(SAMPLE, [Item("Heat", 1995)])
    assert metadata_prompt(emma, books).startswith("Describe a book for") and metadata_prompt(emma, books).endswith(
        "The book is Emma by Jane Austen."
    )
    assert ItemFormat(BOOK) == books.item_format
