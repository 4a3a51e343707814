"""What the kernel benchmarks share: machine line, timing, memory, ceilings, the JSON record and the table.

Times are medians. On a GPU they are between device events, with the L2 cache emptied before every call; `wall_ms`
beside them is host time per call of many calls in a row, which for small inputs is what launching costs. On a CPU there
is host time only. Providers take turns, so a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PACKAGES = ("torch", "transformers", "triton", "liger-kernel", "trl")
FLUSH_BYTES = 256 * 2**20  # several times the L2 of an H200


@dataclass(frozen=True, slots=True)
class Timing:
    median_ms: float
    low_ms: float
    """20th percentile."""
    high_ms: float
    """80th percentile."""
    wall_ms: float | None
    """Host time a call, many in a row; None on a CPU, where the others are host time."""
    runs: int


def measure(
    providers: Mapping[str, Callable[[], object]], device: torch.device, *, budget_s: float = 2.0
) -> dict[str, Timing]:
    """Times of every provider in about budget_s seconds each: at least 3 runs, at most 200."""
    estimates_s = {name: _estimate(run, device) for name, run in providers.items()}
    num_runs = {name: min(200, max(3, int(budget_s / max(seconds, 1e-5)))) for name, seconds in estimates_s.items()}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    times_ms: dict[str, list[float]] = {name: [] for name in providers}
    for turn in range(max(num_runs.values())):
        for name, run in providers.items():
            if turn < num_runs[name]:
                times_ms[name].append(_device_ms(run, flush) if flush is not None else _host_ms(run))
    timings = {}
    for name, values in times_ms.items():
        fifths = quantiles(values, n=5)
        wall_ms = _wall_ms(providers[name], device, num_runs[name]) if device.type == "cuda" else None
        timings[name] = Timing(median(values), fifths[0], fifths[3], wall_ms, len(values))
    return timings


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most memory a call holds at once beyond what was held before it, results (gradients) included."""
    peaks: list[int] = []
    with PeakMemory(device, peaks.append):
        run()
    return peaks[0]


class PeakMemory:
    """Tells `hear` the most memory that the block held at once beyond what was held before it, in bytes."""

    def __init__(self, device: torch.device, hear: Callable[[int], object]):
        self.device, self.hear = device, hear

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()

    def __exit__(self, *raised) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.hear(torch.cuda.max_memory_allocated(self.device) - self.before)
            return
        self.profile.__exit__(*raised)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self.profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        # The profiler counts from its own start, so these totals are beyond what was held before.
        self.hear(max((int(e["args"]["Total Allocated"]) for e in events if e.get("name") == "[memory]"), default=0))


def copy_gb_per_s(device: torch.device) -> float:
    """Bytes read plus bytes written a second by a large copy: the ceiling of what moves through memory."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    timing = measure({"copy": lambda: target.copy_(source)}, device, budget_s=0.5)["copy"]
    return 2 * source.nbytes / timing.median_ms / 1e6


def machine_line(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        return f"{properties.name}, {memory}, CUDA {torch.version.cuda}"
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    cpu = names[0] if names else platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {platform.system()}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit these scripts lie in, with "-dirty" for uncommitted changes; None without git or a repository."""
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def record(op: str, device: torch.device, **fields: Any) -> dict[str, Any]:
    """What a result file holds: where and with which code it was measured, then the measured `fields`."""
    head = {"op": op, "machine": machine_line(device), "versions": versions(), "commit": git_commit()}
    return {**head, "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), **fields}


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def print_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """columns: key of a row -> format of its values ("" for text). A missing or None value prints as a dash."""

    def text(row: Mapping[str, Any], key: str) -> str:
        return "-" if row.get(key) is None else format(row[key], columns[key])

    cells = [list(columns), *([text(row, key) for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def make_parser(description: str | None, example: str, providers: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"], help=f"(default here: {default})")
    if providers:
        parser.add_argument(
            "--providers",
            nargs="+",
            choices=providers,
            metavar="NAME",
            help=f"of {', '.join(providers)} (default: all)",
        )
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of timing for each row (default 2)")
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    return parser


def choose_providers(asked: Sequence[str] | None, missing: Mapping[str, str], known: Sequence[str]) -> list[str]:
    """The providers asked for, else all that can run; it prints why the others cannot.

    Raises SystemExit for one that was asked for and cannot run.
    """
    if asked:
        if impossible := [name for name in asked if name in missing]:
            raise SystemExit(f"provider {impossible[0]} cannot run: {missing[impossible[0]]}")
        return list(asked)
    for name, reason in missing.items():
        print(f"left out: {name} ({reason})")
    return [name for name in known if name not in missing]


def _estimate(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call that is not the first (which compiles, allocates and loads)."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _host_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _device_ms(run: Callable[[], object], flush: torch.Tensor) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _wall_ms(run: Callable[[], object], device: torch.device, num_runs: int) -> float:
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(num_runs):
        run()
    torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start) / num_runs
