"""Runs one test after the other over changed sources, each in a fork of a process that has loaded PyTorch.

JSON of [file, text, module, function] on stdin; on the last line of stdout JSON of what each raised.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import fake_gpu

fake_gpu.load()
import peft  # noqa: E402, F401
import transformers.modeling_layers  # noqa: E402, F401
import triton  # noqa: E402, F401


def run_one(module: str, function: str) -> str:
    try:
        getattr(importlib.import_module(module), function)()
    except BaseException as error:
        return "".join(traceback.format_exception_only(error)) or type(error).__name__
    return ""


def in_a_fork(*job) -> str:
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(2, 1)
        os.write(writer, run_one(*job).encode()[-4000:])
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    return text if status == 0 else f"the process ended with {status}: {text}"


def main() -> None:
    answers = []
    for file, text, *job in json.load(sys.stdin):
        path = Path(file)
        before = path.read_text()
        path.write_text(text)
        answers.append(in_a_fork(*job))
        path.write_text(before)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
