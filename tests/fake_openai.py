"""A stand-in for an OpenAI-compatible server, on loopback: answers lists, metadata and ratings, or misbehaves."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LIST = "Heat (1995)\n2. The Matrix, (1999)\nA Film Nobody Made (2031)\nRonin (1998)"


class FakeServer:
    """`with FakeServer(behave) as server: ...`

    behave(prompt, nth) says what the nth call (from 0) with this prompt gets: "good", "empty", "nonsense", "slow" (more
    than a second late), a status such as 429, a text to answer, or JSON or HTML as the whole body of the response.
    """

    def __init__(self, behave: Callable[[str, int], str | int] = lambda prompt, nth: "good") -> None:
        self.calls: Counter[str] = Counter()
        self.temperatures: dict[str, list[float]] = {}
        self.limits: dict[str, list[int]] = {}
        self.in_flight = self.most_in_flight = 0
        lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/v1/embeddings":
                    rows = [{"index": n, "embedding": [float(len(text)), 1.0]} for n, text in enumerate(body["input"])]
                    return self.answer(200, json.dumps({"object": "list", "data": rows[::-1], "model": body["model"]}))
                prompt = body["messages"][0]["content"]
                with lock:
                    nth = fake.calls[prompt]
                    fake.calls[prompt] += 1
                    fake.limits.setdefault(prompt, []).append(body["max_tokens"])
                    fake.temperatures.setdefault(prompt, []).append(body["temperature"])
                    fake.in_flight += 1
                    fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
                try:
                    self.behave(behave(prompt, nth), prompt)
                finally:
                    with lock:
                        fake.in_flight -= 1

            def behave(self, kind: str | int, prompt: str) -> None:
                if isinstance(kind, int):
                    return self.answer(kind, '{"error": {"message": "no"}}', {"Retry-After": "0"})
                if kind == "slow":
                    time.sleep(1.5)
                texts = {"good": good_answer(prompt), "slow": good_answer(prompt), "empty": "", "nonsense": "As an AI"}
                raw = str(kind) if str(kind).startswith(("{", "[", '"', "<html")) else None
                self.answer(200, completion(texts.get(str(kind), str(kind))) if raw is None else raw)

            def answer(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
                data = text.encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client gave up waiting, which is what "slow" is for

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(text: str) -> str:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return json.dumps(
        {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    )


def good_answer(prompt: str) -> str:
    """What a good model would answer: every candidate rated, a film described, or a list."""
    if "####rating" in prompt:
        candidates = prompt.partition("Here are the candidates:\n")[2].splitlines()
        return "\n".join(f"{name}####{len(name) % 5 - 2}" for name in candidates)
    if prompt.startswith("Describe a movie"):
        name = re.search(r"The movie is (.*)\.$", prompt)[1]
        return f"{name}\nKeywords: fake, {name[:4]}\nPlots: Things happen to {name}."
    return LIST
