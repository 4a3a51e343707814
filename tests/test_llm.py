import json
import time

import pytest
from fake_openai import LIST, FakeServer

from rankgrpo.distill import llm
from rankgrpo.distill.llm import Endpoint, ReplyLog, ask_all, estimate_calls
from rankgrpo.errors import EndpointError


def ask(server, tmp_path, prompts, *, is_readable=lambda prompt, reply: reply != "As an AI", **settings):
    endpoint = Endpoint(server.url, "m", **{"backoff_s": 0.01, "max_attempts": 4, "timeout_s": 0.5} | settings)
    log = ReplyLog(tmp_path / "calls.jsonl")
    return ask_all(endpoint, prompts, log, max_tokens=50, is_readable=is_readable, title="test")


@pytest.mark.parametrize(
    ("trouble", "cause"),
    [
        (429, "429"),
        (500, "500"),
        (503, "503"),
        (408, "408"),
        ("empty", "empty"),
        ("nonsense", "unreadable"),
        ("slow", "time-out"),
        ("<html>", "broken response"),
        ('"hello"', "empty"),
        ("[]", "empty"),
        ("{}", "empty"),
        ('{"choices": []}', "empty"),
        ('{"choices": [{}]}', "empty"),
        ('{"choices": [{"message": null}], "usage": null}', "empty"),
        ('{"choices": {"message": {"content": "x"}}}', "empty"),
    ],
)
def test_what_passes_is_asked_again(tmp_path, trouble, cause):
    with FakeServer(lambda prompt, nth: trouble if nth == 0 else "good") as server:
        replies, report = ask(server, tmp_path, ["a", "b"])
    assert replies == [LIST, LIST]
    assert report.retries == {cause: 2} and not report.failed and report.num_answered == 2
    assert (report.prompt_tokens, report.reply_tokens) == (14, 6)
    assert f"2 x {cause}" in str(report) and "LEFT OPEN" not in str(report)


def test_what_does_not_pass_is_counted_and_left_open(tmp_path):
    troubles = {"a": 500, "b": "nonsense", "c": "empty", "d": 400}
    with FakeServer(lambda prompt, nth: troubles.get(prompt, "good")) as server:
        replies, report = ask(server, tmp_path, ["a", "b", "c", "d", "e"])
        assert replies == [None, None, None, None, LIST]
        assert report.failed == {"500": 1, "unreadable": 1, "empty": 1, "400": 1}
        assert server.calls == {"a": 4, "b": 4, "c": 4, "d": 1, "e": 1}  # what was asked wrongly is asked once
        assert "4 LEFT OPEN after the last attempt" in str(report)
        troubles.clear()
        replies, report = ask(server, tmp_path, ["a", "b", "c", "d", "e"])
        assert replies == [LIST] * 5 and server.calls["e"] == 1
        assert (report.num_known, report.num_answered) == (1, 4)


def test_nonsense_is_asked_again_with_another_draw(tmp_path):
    with FakeServer(lambda prompt, nth: "nonsense" if nth == 0 and prompt == "a" else "good") as server:
        ask(server, tmp_path, ["a", "b"])
        assert server.temperatures == {"a": [0.0, llm.RETRY_TEMPERATURE], "b": [0.0]}


def test_a_server_that_is_not_there_stops_the_run(tmp_path):
    with FakeServer() as server:
        pass
    with pytest.raises(EndpointError, match="20 questions in a row were given up, the last for no connection"):
        ask(server, tmp_path, [str(n) for n in range(40)], max_attempts=2)


def test_a_server_that_always_fails_stops_the_run_and_keeps_the_answers(tmp_path):
    with FakeServer(lambda prompt, nth: "good" if prompt == "0" else 500) as server:
        with pytest.raises(EndpointError, match="20 questions in a row .* the last for 500"):
            ask(server, tmp_path, [str(n) for n in range(40)], max_attempts=1, concurrency=2)
    assert list(ReplyLog(tmp_path / "calls.jsonl").replies.values()) == [LIST]


@pytest.mark.parametrize(("status", "message"), [(401, "OPENAI_API_KEY"), (404, "does not know the model 'm'")])
def test_a_refusal_stops_at_once(tmp_path, status, message):
    with FakeServer(lambda prompt, nth: status) as server, pytest.raises(EndpointError, match=message):
        ask(server, tmp_path, [str(n) for n in range(40)], concurrency=1)
    assert server.calls.total() == 1


def test_many_at_once_and_no_more(tmp_path):
    def behave(prompt, nth):
        time.sleep(0.02)
        return "good"

    with FakeServer(behave) as server:
        ask(server, tmp_path, [str(n) for n in range(20)], concurrency=4, timeout_s=5)
    assert 2 <= server.most_in_flight <= 4


def test_the_rate_limit_spaces_the_calls(tmp_path):
    began = time.monotonic()
    with FakeServer() as server:
        ask(server, tmp_path, ["a", "b", "c", "d", "e"], requests_per_minute=1200)
    assert time.monotonic() - began >= 4 * 60 / 1200


def test_the_same_question_is_asked_once(tmp_path):
    with FakeServer() as server:
        replies, report = ask(server, tmp_path, ["a", "a", "b"])
        assert replies == [LIST] * 3 and server.calls == {"a": 1, "b": 1} and report.num_known == 1
        ask(server, tmp_path, ["a"], temperature=1.0)
        assert server.calls["a"] == 2  # another sampling is another question


def test_thoughts_are_no_answer(tmp_path):
    with FakeServer(lambda prompt, nth: "<think>Heat? Ronin?</think>\n\nHeat (1995)") as server:
        assert ask(server, tmp_path, ["a"])[0] == ["Heat (1995)"]


def test_a_line_cut_by_a_kill_is_dropped_and_a_broken_one_named(tmp_path):
    path = tmp_path / "calls.jsonl"
    log = ReplyLog(path)
    log.append("k", "yes", {"prompt_tokens": 1, "reply_tokens": 2})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "l", "re')
    log = ReplyLog(path)
    assert log.replies == {"k": "yes"} and path.read_bytes() == whole
    log.append("l", "no\u2028", {})
    assert ReplyLog(path).replies == {"k": "yes", "l": "no\u2028"}
    path.write_bytes(b'{"key": 3}\n' + whole)
    with pytest.raises(ValueError, match=r"calls\.jsonl:1: key and reply must be strings; delete that line"):
        ReplyLog(path)


def test_the_estimate_counts_what_is_still_to_ask(tmp_path):
    endpoint, log = Endpoint("http://x/v1", "m"), ReplyLog(tmp_path / "calls.jsonl")
    known, new = "k" * 400, "n" * 4000
    log.append(endpoint.key(known, 50), "yes", {})
    estimate = estimate_calls(endpoint, [known, new, new], 50, log)
    assert (estimate.num_calls, estimate.prompt_tokens, estimate.reply_tokens) == (1, 1000, 50)
    twice = estimate + estimate
    assert "2 calls, about 2,000 tokens" in twice.describe(0, 0) and "prices" not in twice.describe(0, 0)
    assert "at most 6.00 at the given prices" in twice.describe(2000.0, 20000.0)


def test_answers_are_on_disk_one_by_one(tmp_path):
    seen = []

    def behave(prompt, nth):
        path = tmp_path / "calls.jsonl"
        seen.append(len(path.read_text().splitlines()) if path.exists() else 0)
        return "good"

    with FakeServer(behave) as server:
        ask(server, tmp_path, ["a", "b", "c"], concurrency=1, timeout_s=5)
    assert seen == [0, 1, 2]
    rows = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert [row["prompt_tokens"] for row in rows] == [7, 7, 7]


@pytest.mark.parametrize("settings", [{"concurrency": 0}, {"timeout_s": 0.0}, {"temperature": -1.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="must"):
        Endpoint("http://x/v1", "m", **settings)
