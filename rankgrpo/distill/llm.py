"""Questions to a language model behind an OpenAI-compatible endpoint: many at once, retried, every answer kept.

An answer is appended to a JSONL file, and flushed to disk, the moment it arrives; whoever asks the same again (the same
model, prompt and sampling) reads it from there, so a run that was stopped or killed repeats no answered call. What can
pass is retried with exponential back-off: 408, 409, 429 (its Retry-After is obeyed), 5xx, time-outs, broken
connections, empty answers, and answers that the caller cannot read. What is still wrong after that is counted by cause
and left open, and the next run asks it again. A key or a model that the endpoint refuses, and an endpoint that fails
call after call, stop the run.

The same words serve a hosted model and a local one: `vllm serve MODEL` is such an endpoint.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from rankgrpo.errors import EndpointError, SaveError
from rankgrpo.files.rows import read_jsonl

if TYPE_CHECKING:
    from openai import AsyncOpenAI

LONGEST_WAIT_S = 60.0
RETRY_TEMPERATURE = 0.7
"""Of a question whose answer could not be read: asked greedily again, it would get the same answer."""
CUT = "cut in its thoughts"
MOST_ROOM = 8
"""Times the usual limit that an answer may take which was cut in its thoughts; each attempt doubles it."""
LONG_LINE = 15
"""Words of a first line from which an answer that the limit cut is one that thinks aloud."""
CHARS_PER_TOKEN = 4.0
"""English text, for the estimate of the cost."""


@dataclass(frozen=True)
class Endpoint:
    """Where a model is and how it may be asked.

    Example: Endpoint("http://localhost:8000/v1", "Qwen/Qwen2.5-7B-Instruct", concurrency=32)
    """

    url: str
    model: str
    concurrency: int = 8
    requests_per_minute: int = 0
    """Rate limit; 0 is none."""
    max_attempts: int = 6
    timeout_s: float = 120.0
    backoff_s: float = 1.0
    """Wait before the second attempt; doubled before each further one, and varied at random by half."""
    temperature: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request's body, for example {"chat_template_kwargs": {"enable_thinking": false}}."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_attempts", "timeout_s", "backoff_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.requests_per_minute < 0 or self.temperature < 0:
            raise ValueError("requests_per_minute and temperature must not be negative")

    def key(self, prompt: str, max_tokens: int) -> str:
        """What makes two questions the same. The address is no part of it: a server may move."""
        asked = [self.model, prompt, max_tokens, self.temperature, dict(self.extra)]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class ReplyLog:
    """The answers so far, in memory and in an append-only JSONL file of {"key", "reply", "prompt_tokens", ...}."""

    def __init__(self, path: Path) -> None:
        """Read the file; a last line cut by a kill is dropped. Raises ValueError naming file and line of a bad one."""
        self.path = path
        self.replies: dict[str, str] = {}
        if not path.exists():
            return
        _drop_cut_line(path)
        for line, row in read_jsonl(path):
            if isinstance(row, str) or not isinstance(row.get("key"), str) or not isinstance(row.get("reply"), str):
                problem = row if isinstance(row, str) else "key and reply must be strings"
                raise ValueError(f"{path}:{line}: {problem}; delete that line to ask this question again")
            self.replies[row["key"]] = row["reply"]

    def append(self, key: str, reply: str, usage: Mapping[str, int]) -> None:
        """Keep an answer; it is on disk when this returns. Raises SaveError when the disk is full or not writable."""
        line = json.dumps({"key": key, "reply": reply, **usage}, ensure_ascii=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(f"{line}\n".encode("utf-8", errors="replace"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SaveError(f"{self.path}: not saved ({error}); the answers before it are kept") from error
        self.replies[key] = reply


def _drop_cut_line(path: Path) -> None:
    with path.open("rb+") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)


@dataclass
class CallReport:
    """What a round of questions came to; `str()` is a sentence for the screen."""

    num_questions: int = 0
    num_known: int = 0
    """Questions that an earlier run answered, or that this one asked twice."""
    num_answered: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    """Attempts that failed, by cause."""
    failed: Counter[str] = field(default_factory=Counter)
    """Questions left open after the last attempt, by its cause."""
    prompt_tokens: int = 0
    reply_tokens: int = 0

    def __str__(self) -> str:
        text = f"{self.num_questions} questions: {self.num_known} known, {self.num_answered} answered now"
        if self.prompt_tokens:
            text += f" ({self.prompt_tokens:,} tokens read, {self.reply_tokens:,} written)"
        if self.retries:
            text += f", {_causes(self.retries)} on the way"
        if self.failed:
            text += f"; {self.failed.total()} LEFT OPEN after the last attempt ({_causes(self.failed)})"
        return text


def _causes(counts: Counter[str]) -> str:
    return ", ".join(f"{count} x {cause}" for cause, count in sorted(counts.items()))


@dataclass(frozen=True)
class Estimate:
    """What a round of questions will cost, from the lengths of the texts; answers are counted at their limit."""

    num_calls: int
    prompt_tokens: int
    reply_tokens: int

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            self.num_calls + other.num_calls,
            self.prompt_tokens + other.prompt_tokens,
            self.reply_tokens + other.reply_tokens,
        )

    def share(self, part: float) -> Estimate:
        """The estimate for a part of the questions."""
        return Estimate(*(round(part * number) for number in (self.num_calls, self.prompt_tokens, self.reply_tokens)))

    def describe(self, price_in: float, price_out: float) -> str:
        """The estimate as a sentence; prices are for a million tokens, and 0 for both says nothing about money."""
        text = (
            f"{self.num_calls:,} calls, about {self.prompt_tokens:,} tokens to read and at most {self.reply_tokens:,} "
            "to write"
        )
        cost = (self.prompt_tokens * price_in + self.reply_tokens * price_out) / 1e6
        return f"{text}, at most {cost:,.2f} at the given prices" if price_in or price_out else text


def estimate_calls(endpoint: Endpoint, prompts: Sequence[str], max_tokens: int, log: ReplyLog) -> Estimate:
    """The cost of what `ask_all` would still have to ask."""
    keys = {endpoint.key(prompt, max_tokens): prompt for prompt in prompts}
    lengths = [len(prompt) / CHARS_PER_TOKEN for key, prompt in keys.items() if key not in log.replies]
    return Estimate(len(lengths), round(sum(lengths)), len(lengths) * max_tokens)


def ask_all(
    endpoint: Endpoint,
    prompts: Sequence[str],
    log: ReplyLog,
    *,
    max_tokens: int,
    is_readable: Callable[[str, str], bool],
    title: str,
) -> tuple[list[str | None], CallReport]:
    """An answer to every prompt, in order; None where none came that `is_readable(prompt, answer)`.

    Raises EndpointError when the endpoint refuses the key or the model, or fails call after call.
    """
    report = CallReport(num_questions=len(prompts))
    keys = [endpoint.key(prompt, max_tokens) for prompt in prompts]
    open_questions = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in log.replies}
    report.num_known = len(prompts) - len(open_questions)
    if open_questions:
        asyncio.run(_Round(endpoint, log, max_tokens, is_readable, report).ask(open_questions, title))
    return [log.replies.get(key) for key in keys], report


class _AttemptError(Exception):
    """An attempt that failed; `cause` is counted."""

    def __init__(self, cause: str, *, detail: str, retry: bool = True, wait_s: float = 0.0) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause, self.retry, self.wait_s = cause, retry, wait_s


@dataclass
class _Round:
    """One call of `ask_all`, in its event loop."""

    endpoint: Endpoint
    log: ReplyLog
    max_tokens: int
    is_readable: Callable[[str, str], bool]
    report: CallReport
    failures_in_a_row: int = 0
    next_start: float = 0.0

    async def ask(self, questions: Mapping[str, str], title: str) -> None:
        endpoint = self.endpoint
        waiting = iter(questions.items())
        with tqdm(total=len(questions), desc=title, unit="call", dynamic_ncols=True) as bar:
            async with _open_client(endpoint) as client:

                async def work() -> None:
                    for key, prompt in waiting:  # shared: each worker takes the next one
                        await self._ask_until_answered(client, key, prompt)
                        bar.update()

                # Raised outside `except*`, which in early releases of Python 3.11 would put it into a group again.
                stopped: BaseException | None = None
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(min(endpoint.concurrency, len(questions))):
                            group.create_task(work())
                except* (EndpointError, SaveError) as errors:
                    stopped = errors.exceptions[0]
                if stopped is not None:
                    raise stopped from None

    async def _ask_until_answered(self, client: AsyncOpenAI, key: str, prompt: str) -> None:
        endpoint = self.endpoint
        unreadable = False
        room = 1
        for attempt in range(endpoint.max_attempts):
            try:
                reply, usage = await self._attempt(client, prompt, attempt if unreadable else 0, room * self.max_tokens)
            except _AttemptError as error:
                unreadable = error.cause in ("empty", "unreadable")
                room = min(2 * room, MOST_ROOM) if error.cause == CUT else room
                if not error.retry or attempt + 1 == endpoint.max_attempts:
                    self._fail(error)
                    return
                self.report.retries[error.cause] += 1
                wait_s = min(endpoint.backoff_s * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.5, 1.5)
                await asyncio.sleep(max(wait_s, error.wait_s))
            else:
                self.log.append(key, reply, usage)
                self.failures_in_a_row = 0
                self.report.num_answered += 1
                self.report.prompt_tokens += usage["prompt_tokens"]
                self.report.reply_tokens += usage["reply_tokens"]
                return

    def _fail(self, error: _AttemptError) -> None:
        self.report.failed[error.cause] += 1
        self.failures_in_a_row += 1
        limit = max(20, 2 * self.endpoint.concurrency)
        if self.failures_in_a_row >= limit:
            raise EndpointError(
                f"{self.endpoint.url}: {limit} questions in a row were given up, the last for {error}. Answers so far "
                f"are in {self.log.path}; the same command continues once the endpoint answers"
            )

    async def _attempt(
        self, client: AsyncOpenAI, prompt: str, draw: int, max_tokens: int
    ) -> tuple[str, dict[str, int]]:
        import openai

        endpoint = self.endpoint
        await self._wait_for_slot()
        try:
            response = await client.chat.completions.create(
                model=endpoint.model,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=max_tokens,
                temperature=max(endpoint.temperature, RETRY_TEMPERATURE) if draw else endpoint.temperature,
                extra_body=dict(endpoint.extra),
            )
        except openai.APITimeoutError:
            raise _AttemptError("time-out", detail=f"no answer within {endpoint.timeout_s:g} s") from None
        except openai.APIStatusError as error:
            raise _status_error(endpoint, error) from None
        except openai.APIConnectionError as error:
            raise _AttemptError("no connection", detail=str(error.__cause__ or error)) from None
        except (openai.APIResponseValidationError, json.JSONDecodeError, TypeError) as error:
            raise _AttemptError("broken response", detail=str(error)) from None
        # A server that is not quite compatible may answer 200 with any JSON; the client does not look inside.
        body = response.model_dump(warnings=False) if isinstance(response, openai.BaseModel) else None
        content = _at(body, "choices", 0, "message", "content")
        cut = _at(body, "choices", 0, "finish_reason") == "length"
        thoughts = _at(body, "choices", 0, "message", "reasoning_content")
        if _is_thinking(content if isinstance(content, str) else "", cut=cut, aside=bool(thoughts)):
            raise _AttemptError(CUT, detail=f"{max_tokens} tokens were not enough for its thoughts")
        reply = _without_thoughts(content) if isinstance(content, str) else ""
        if not reply:
            raise _AttemptError("empty", detail="an answer without text")
        if not self.is_readable(prompt, reply):
            raise _AttemptError("unreadable", detail=f"an answer that cannot be read: {reply[:80]!r}")
        names = {"prompt_tokens": "prompt_tokens", "reply_tokens": "completion_tokens"}
        counts = {ours: _at(body, "usage", theirs) for ours, theirs in names.items()}
        return reply, {name: count if isinstance(count, int) else 0 for name, count in counts.items()}

    async def _wait_for_slot(self) -> None:
        """Space the attempts evenly over a minute."""
        if self.endpoint.requests_per_minute:
            now = asyncio.get_running_loop().time()
            start = max(now, self.next_start)
            self.next_start = start + 60 / self.endpoint.requests_per_minute
            await asyncio.sleep(start - now)


def _open_client(endpoint: Endpoint) -> AsyncOpenAI:
    try:
        from openai import AsyncOpenAI
    except ImportError:
        raise EndpointError(
            "a teacher behind an endpoint needs the openai package: pip install 'rankgrpo[teacher]'"
        ) from None
    # Local servers want no key, but the client wants one.
    key = os.environ.get("OPENAI_API_KEY", "none")
    return AsyncOpenAI(base_url=endpoint.url, api_key=key, timeout=endpoint.timeout_s, max_retries=0)


def _status_error(endpoint: Endpoint, error: Any) -> Exception:
    status, detail = error.status_code, str(error.message)[:300]
    if status in (401, 403):
        return EndpointError(
            f"{endpoint.url} refuses the key ({status}: {detail}); set OPENAI_API_KEY in the environment"
        )
    if status == 404:
        return EndpointError(
            f"{endpoint.url} does not know the model {endpoint.model!r} or the path ({detail}); the address usually "
            "ends in /v1"
        )
    try:
        wait_s = min(float(error.response.headers.get("retry-after", 0)), LONGEST_WAIT_S)
    except ValueError:  # the header may be a date
        wait_s = 0.0
    retry = status in (408, 409, 429) or status >= 500
    return _AttemptError(str(status), detail=detail, retry=retry, wait_s=wait_s)


def _at(body: Any, *path: str | int) -> Any:
    """What a JSON body holds at a path; None where it holds nothing there."""
    for step in path:
        fits = isinstance(body, list) and step in range(len(body)) or isinstance(body, dict) and step in body
        body = body[step] if fits else None
    return body


def _is_thinking(content: str, *, cut: bool, aside: bool) -> bool:
    """Whether an answer ends before its thoughts do: they were opened and never closed, or the limit cut an answer that
    has no text beside its thoughts (`aside`) or begins with a long line, as no list does."""
    if "</think>" in content:
        return False
    if "<think>" in content:
        return True
    first_line = content.strip().partition("\n")[0]
    return cut and (aside and not content.strip() or len(first_line.split()) > LONG_LINE)


def _without_thoughts(reply: str) -> str:
    """The answer after the `<think> ... </think>` of models that reason aloud."""
    return reply.rpartition("</think>")[2].strip()
