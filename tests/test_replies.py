"""Replies of teachers in the shapes that models give them: one line an item, none of two, none lost."""

import pytest
from fake_openai import LIST, FakeServer

from rankgrpo.distill import llm
from rankgrpo.distill.lists import is_list, read_lists
from rankgrpo.distill.llm import Endpoint, ReplyLog, ask_all
from rankgrpo.distill.replies import item_lines
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.items.format import ItemFormat
from rankgrpo.items.lines import make_catalog, make_item
from rankgrpo.items.match import open_matcher

NAMES = (
    "Heat (1995)|Ronin (1998)|Thief (1981)|The Town (2010)|Collateral (2004)|Up (2009)|Drive (2011)|"
    "The Good, the Bad and the Ugly (1966)|Inside Man (2006)|Rififi (1955)|12 Angry Men (1957)"
).split("|")
CATALOG = Catalog(Item(name[:-7], int(name[-5:-1])) for name in NAMES)
MATCH = open_matcher(CATALOG).match_line
TEN = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
PLAIN = "\n".join(NAMES[:10])
BARE = [name[:-7] for name in NAMES[:10]]

SHAPES = {
    "as asked": PLAIN,
    "commas": ", ".join(NAMES[:10]),
    "commas and a preamble": "Sure! Here are ten films: " + ", ".join(NAMES[:9]) + ", and " + NAMES[9] + ".",
    "semicolons": "; ".join(NAMES[:10]),
    "commas without years": ", ".join(BARE),
    "commas without years, preamble": "Here are 10 movies: " + ", ".join(BARE[:9]) + ", and " + BARE[9] + ".",
    "JSON": "[" + ", ".join(f'"{name}"' for name in NAMES[:10]) + "]",
    "JSON in a fence": "Here you go:\n```json\n[\n"
    + ",\n".join(f'  "{name}"' for name in NAMES[:10])
    + "\n]\n```\nEnjoy!",
    "JSON objects": "[" + ", ".join(f'{{"title": "{n[:-7]}", "year": {n[-5:-1]}}}' for n in NAMES[:10]) + "]",
    "JSON in an object": '{"movies": [' + ", ".join(f'{{"rank": 1, "movie": "{n}"}}' for n in NAMES[:10]) + "]}",
    "a table": "| # | Movie | Year | Why |\n|---|:---|---|---|\n"
    + "\n".join(f"| {place} | **{n[:-7]}** | {n[-5:-1]} | a heist, tense |" for place, n in enumerate(NAMES[:10], 1)),
    "a table without names": "| | |\n|---|---|\n" + "\n".join(f"| good | {n} |" for n in NAMES[:10]),
    "numbered": "\n".join(f"{place}. {n}" for place, n in enumerate(NAMES[:10], 1)),
    "numbered with sub-bullets": "\n".join(
        f"{place}. **{n}**\n   - Genre: crime\n   - Why: {NAMES[10]} fans like it"
        for place, n in enumerate(NAMES[:10], 1)
    ),
    "numbered with numbered remarks": "\n".join(
        f"{place}) {n}\n     1. tense\n     2. long" for place, n in enumerate(NAMES[:10], 1)
    ),
    "bullets with remarks": "\n".join(f"* {n}\n    * a heist" for n in NAMES[:10]),
    "preamble and advice": f"Here are 10 films that fit:\n\n{PLAIN}\n\n"
    "Let me know if you would like more films of this kind, slower or faster!",
    "headed": "### Recommendations\n"
    + "\n".join(f"{place}. {n} - tense" for place, n in enumerate(NAMES[:10], 1))
    + "\n\nI hope that you find something to watch tonight among these films.",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ten_items_in_every_shape(shape):
    reply = SHAPES[shape]
    assert is_list(reply, CATALOG.parse, MATCH)
    lists = read_lists([reply], CATALOG, MATCH, 20)
    assert lists.lists == [TEN], [lists.items[index] for index in lists.lists[0]]


@pytest.mark.parametrize(
    "reply",
    [
        "As an AI I cannot recommend films.",
        "The user likes heists, tense ones, and old ones, so I should think of something with thieves in it first.",
        '{"error": "no"}',
        "| a | b |\n|---|---|\n| c | d |",
        "1. What do you like?\n2. Which decade?",
    ],
)
def test_what_is_no_list(reply):
    assert not is_list(reply, CATALOG.parse, MATCH)


def test_a_comma_that_belongs_to_a_title_stays():
    names = ["The Good, the Bad and the Ugly (1966)", "I, Robot (2004)", "Crouching Tiger, Hidden Dragon (2000)"]
    catalog = Catalog(Item(name[:-7], int(name[-5:-1])) for name in names)
    match = open_matcher(catalog).match_line
    for reply in (", ".join(names), ", ".join(name[:-7] for name in names), "\n".join(names)):
        assert read_lists([reply], catalog, match, 20).lists == [[0, 1, 2]], reply
    assert item_lines("Crouching Tiger, Hidden Dragon", lambda line: False) == "Crouching Tiger, Hidden Dragon"


def test_what_is_said_of_an_item_names_no_others():
    remark = "Heat (1995) - for those who like Ronin (1998), Thief (1981), and The Town (2010)"
    assert read_lists([f"{remark}\nUp (2009)"], CATALOG, MATCH, 20).lists == [[0, 5]]


def test_items_without_years():
    item_format = ItemFormat("{title}")
    titles = ["Stapler, full strip, black", "Pens, 12-pack", "Paper: A4, 500 sheets", "Red tape"]
    catalog = make_catalog([make_item({"title": title}, item_format) for title in titles], item_format)
    match = open_matcher(catalog).match_line
    replies = [
        "\n".join(titles),
        ", ".join(titles),
        "Here are four products:\n" + "\n".join(f"{n}. {title}\n   - useful" for n, title in enumerate(titles, 1)),
        "[" + ", ".join(f'"{title}"' for title in titles) + "]",
        "Here is what I found for you:\n"
        + "\n".join(titles)
        + "\nTell me when you want more of these, or others that are cheaper.",
    ]
    assert read_lists(replies, catalog, match, 20).lists == [[0, 1, 2, 3]] * len(replies)


# ----------------------------------------------------------------------------------------------------------------------
# Replies that the limit cut


def ask(server, tmp_path, **settings):
    endpoint = Endpoint(server.url, "m", **{"backoff_s": 0.01, "max_attempts": 4, "timeout_s": 2.0} | settings)
    log = ReplyLog(tmp_path / "calls.jsonl")
    return ask_all(endpoint, ["q"], log, max_tokens=50, is_readable=lambda _, reply: is_list(reply), title="test")


THOUGHTS = "Okay, so the user wants films like Heat (1995), and they said that they liked Ronin (1998) a lot, and"


@pytest.mark.parametrize(
    "message",
    [
        {"content": f"<think>{THOUGHTS}"},
        {"content": THOUGHTS},
        {"content": "", "reasoning_content": THOUGHTS},
        {"content": None, "reasoning_content": THOUGHTS},
    ],
)
def test_a_reply_cut_in_its_thoughts_gets_more_room(tmp_path, message):
    def behave(prompt, nth):
        return reply(message, "length") if nth < 2 else f"<think>{THOUGHTS}</think>\n{LIST}"

    with FakeServer(behave) as server:
        replies, report = ask(server, tmp_path)
        assert server.limits["q"] == [50, 100, 200]
    assert replies == [LIST] and report.retries == {llm.CUT: 2} and not report.failed


def test_thoughts_that_never_end_are_counted(tmp_path):
    with FakeServer(lambda prompt, nth: reply({"content": f"<think>{THOUGHTS}"}, "length")) as server:
        replies, report = ask(server, tmp_path, max_attempts=6)
        assert server.limits["q"] == [50, 100, 200, 400, 400, 400]
    assert replies == [None] and report.failed == {llm.CUT: 1}
    assert "1 LEFT OPEN after the last attempt (1 x cut in its thoughts)" in str(report)


def test_a_list_that_the_limit_cut_is_a_list(tmp_path):
    with FakeServer(lambda prompt, nth: reply({"content": "Heat (1995)\nRonin (1998)\nThi"}, "length")) as server:
        replies, report = ask(server, tmp_path)
    assert replies == ["Heat (1995)\nRonin (1998)\nThi"] and not report.retries
    assert read_lists(replies, CATALOG, MATCH, 20).lists == [[0, 1]]


def reply(message, finish_reason):
    import json

    from fake_openai import completion

    body = json.loads(completion(""))
    body["choices"][0] |= {"message": {"role": "assistant", **message}, "finish_reason": finish_reason}
    return json.dumps(body)
