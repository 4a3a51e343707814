"""The hf sampler over a copy of the weights, in a process of its own, so that lists are sampled while a policy trains.

The two processes share the memory that holds the copy and exchange one JSON message each way at a time. The memory and
the socket have no name in the file system, and the process ends with the one that started it however that ends, so
nothing is left behind. It is for CPUs: on a GPU both would compete for the same multiprocessors.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankgrpo
from rankgrpo.config import ModelConfig
from rankgrpo.errors import SamplingError, UserError
from rankgrpo.files.malloc import keep_freed_memory
from rankgrpo.model.constraint import constraint_of_lines
from rankgrpo.model.policy import Paths, Policy, open_policy, with_paths
from rankgrpo.sampler.base import Rollout, fingerprint
from rankgrpo.sampler.choose import hf_sampler
from rankgrpo.sampler.hf import HFSampler

LINE = 64
"""Bytes of a cache line."""
# The kernel ends this process when the thread that started it ends (PR_SET_PDEATHSIG, SIGKILL). That is asked for
# before anything slow is imported, and a parent that was faster is noticed.
BOOT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9)\n"
    "if os.getppid() != int(sys.argv[3]): sys.exit()\n"
    "from rankgrpo.sampler.process import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)

Request = Mapping[str, Any]
"""Arguments of `Sampler.sample` by name."""


@dataclass(frozen=True)
class Opening:
    """What the process opens its sampler by; every value is one that JSON has."""

    source: str
    """Model folder or hub id that the policy was opened from: its weights are replaced before any list is sampled."""
    model: dict[str, Any]
    """ModelConfig."""
    packing: str
    decoding: str
    attention: str
    """`Paths` of the policy."""
    autocast: bool
    half: bool
    """Whether the copy is in bfloat16, as a split policy that computes in it is sampled from."""
    fresh: bool
    """Whether the policy is sampled from tensors that are made for it, as are those of a split one or of one with
    adapters, and not from those that were read from `source`."""
    rows: int
    threads: int
    lines: list[str] | None
    """The catalog's, where lists are held to it."""
    num_ranks: int
    forbid: str

    @classmethod
    def of(
        cls, policy: Policy, source: str | Path, model: ModelConfig, lines: list[str] | None, *, rows: int, threads: int
    ) -> Opening:
        """A sampler that gives what `hf_sampler(policy, rows)` does. lines: of the catalog that `policy` is held to."""
        paths, constraint, split = policy.paths, policy.constraint, policy.sharding is not None
        return cls(
            source=str(source),
            model=asdict(model),
            packing=paths.packing,
            decoding=paths.decoding,
            attention=paths.attention,
            autocast=policy.bfloat16 and not split,
            half=policy.bfloat16 and split,
            fresh=policy.skeleton is not None,
            rows=rows,
            threads=threads,
            lines=None if constraint is None else lines,
            num_ranks=0 if constraint is None else constraint.num_ranks,
            forbid="none" if constraint is None else constraint.forbid,
        )


class ProcessSampler:
    """A CopySampler in another process, which starts at once and is waited for when it is first needed.

    Errors that it meets are raised here: a UserError as SamplingError with its message, any other with its traceback,
    and a process that has died as SamplingError.
    """

    owns_weights = True
    holds_weights = True

    def __init__(self, opening: Opening):
        self.dtype = torch.bfloat16 if opening.half else torch.float32
        self.eos_ids: list[int] = []
        """Known once the process is there."""
        self.seconds = 0.0
        """How long the last request took it."""
        self.tensors: dict[str, Tensor] = {}
        self.waited_for = False
        self.connection, theirs = Pipe()
        self.memory = os.memfd_create("rankgrpo-weights")
        package = str(Path(rankgrpo.__file__).parents[1])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "OMP_NUM_THREADS": str(opening.threads),
        }
        descriptors = (theirs.fileno(), self.memory)
        command = [sys.executable, "-P", "-c", BOOT, *map(str, descriptors), str(os.getpid())]
        # A session of its own: Ctrl-C reaches the trainer alone, which ends this process then.
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=descriptors, env=environment, start_new_session=True
        )
        theirs.close()
        self._send({"do": "open", **asdict(opening)})

    def begin(self, requests: Sequence[Request]) -> None:
        """Have these requests answered one after the other; `finish` must be called before anything else is asked."""
        self.wake()
        self._send({"do": "sample", "requests": list(requests)})

    def finish(self) -> list[list[list[Rollout]]]:
        """Wait for what `begin` asked for: by request and prompt the lists."""
        answer = self._receive()
        self.seconds = answer["seconds"]
        return [[rollouts_from_json(group) for group in groups] for groups in answer["sampled"]]

    def sample(self, prompts: list[list[int]], **terms: Any) -> list[list[Rollout]]:
        """As `Sampler.sample`, without on_progress."""
        self.begin([{"prompts": prompts, **terms}])
        return self.finish()[0]

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the weights; nobody reads them meanwhile, because no request is being answered."""
        for name, tensor in named:
            self.tensors[name].copy_(tensor)

    def fingerprints(self) -> dict[str, int | None]:
        self._send({"do": "fingerprints"})
        return self._receive()["fingerprints"]

    def stored_name(self, name: str) -> str:
        return name

    def wake(self) -> None:
        """Wait until the process has opened its model."""
        if self.waited_for:
            return
        opened = self._receive()
        self.eos_ids = opened["eos_ids"]
        self.tensors = map_tensors(self.memory, opened["layout"], self.dtype)
        self.waited_for = True

    def sleep(self) -> None:
        """Nothing to give back: no memory is the trainer's."""

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.connection.close()
        self.process.kill()
        self.process.wait()
        self.tensors = {}
        os.close(self.memory)

    def _send(self, message: Mapping[str, Any]) -> None:
        try:
            self.connection.send_bytes(json.dumps(message, default=int).encode())  # catalog indices may be numpy's
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._died() from error

    def _receive(self) -> dict[str, Any]:
        try:
            answer = json.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError) as error:
            raise self._died() from error
        if "refused" in answer:
            raise SamplingError(answer["refused"])
        if "failed" in answer:
            raise RuntimeError(f"in the process that samples:\n{answer['failed']}")
        return answer

    def _died(self) -> SamplingError:
        status = self.process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        hint = "; the usual cause is memory that ran out (dmesg says so)" if status == -signal.SIGKILL else ""
        return SamplingError(
            f"the process that samples for rl.overlap {how}{hint}. The last checkpoint is intact, and the same command "
            f"continues from it; rl.overlap=false, in a new run folder, samples without a second copy of the weights"
        )


def map_tensors(memory: int, layout: Iterable[tuple[str, list[int], int]], dtype: torch.dtype) -> dict[str, Tensor]:
    """By name the tensors that lie in a file of memory; layout has the name, the shape and the first byte of each."""
    shared = mmap.mmap(memory, os.fstat(memory).st_size)
    return {
        name: torch.frombuffer(shared, dtype=dtype, count=math.prod(shape), offset=start).view(shape)
        for name, shape, start in layout
    }


def rollouts_to_json(rollouts: Iterable[Rollout]) -> list[list[Any]]:
    """[ids, log-probs, text, finished] of every list; JSON keeps each bit of a Python float."""
    return [[one.token_ids, one.logp, one.text, one.finished] for one in rollouts]


def rollouts_from_json(rows: Iterable[Sequence[Any]]) -> list[Rollout]:
    return [Rollout(*row) for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# The other process


def main(socket: int, memory: int) -> None:
    """Answer requests until the trainer closes the socket or ends."""
    torch.set_flush_denormal(True)  # as the trainer's own process does, before any worker thread is made
    keep_freed_memory()
    served = _Served(memory)
    with Connection(socket) as connection:
        while True:
            try:
                request = json.loads(connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                return
            connection.send_bytes(json.dumps(served.answer(request)).encode())


class _Served:
    """A sampler whose weights lie in shared memory, and what it answers."""

    def __init__(self, memory: int):
        self.memory = memory
        self.sampler: HFSampler | None = None
        self.tensors: dict[str, Tensor] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """An error is an answer too: the trainer raises it."""
        answers = {"open": self.open, "sample": self.sample, "fingerprints": self.fingerprints}
        try:
            return answers[request.pop("do")](**request)
        except UserError as error:
            return {"refused": str(error)}
        except Exception:
            return {"failed": traceback.format_exc()}

    def open(self, **words: Any) -> dict[str, Any]:
        opening = Opening(**words)
        torch.set_num_threads(opening.threads)
        policy = open_policy(opening.source, ModelConfig(**opening.model), torch.device("cpu"), trainable=False)
        paths = Paths(opening.packing, opening.decoding, opening.attention, policy.paths.logit_map)
        constraint = None
        if opening.lines is not None:
            constraint = constraint_of_lines(
                opening.lines, policy.tokenizer, num_ranks=opening.num_ranks, forbid=opening.forbid
            )
        policy = with_paths(replace(policy, constraint=constraint, bfloat16=opening.autocast), paths)
        dtype = torch.bfloat16 if opening.half else torch.float32
        layout = self._share(policy.model, dtype, fresh=opening.fresh)
        self.sampler = hf_sampler(policy, opening.rows)
        return {"layout": layout, "eos_ids": self.sampler.eos_ids}

    def _share(self, model: nn.Module, dtype: torch.dtype, *, fresh: bool) -> list[tuple[str, list[int], int]]:
        """Move the parameters into the shared memory, which is made as large as they need; tied ones go once.

        The last bit of a matrix product depends on where in a cache line its operands begin, and a model that was read
        from a file begins where the file has it. So every tensor keeps its place in the line.
        """
        parameters, layout, end = dict(model.named_parameters()), [], 0
        for name, parameter in parameters.items():
            start = -(-end // LINE) * LINE + (0 if fresh else parameter.data_ptr() % LINE)
            layout.append((name, list(parameter.shape), start))
            end = start + parameter.numel() * dtype.itemsize
        os.ftruncate(self.memory, end)
        self.tensors = map_tensors(self.memory, layout, dtype)
        for name, parameter in parameters.items():
            parameter.data = self.tensors[name]
        return layout

    def sample(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        assert self.sampler is not None
        began = time.perf_counter()
        sampled = [[rollouts_to_json(group) for group in self.sampler.sample(**request)] for request in requests]
        return {"sampled": sampled, "seconds": time.perf_counter() - began}

    def fingerprints(self) -> dict[str, Any]:
        return {"fingerprints": {name: int(fingerprint(tensor)) for name, tensor in self.tensors.items()}}
