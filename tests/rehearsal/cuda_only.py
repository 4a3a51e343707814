"""Which statements run on CUDA alone, and which of them a rehearsal has run.

A statement counts when it stands under a condition that says so (`tensor.is_cuda`, `device.type == "cuda"`, `on_gpu`,
a name or an implementation that is "cuda" or "triton", or what is left after `device.type == "cpu"` has
returned), in a function that is reached by such a name, in the host code of a Triton kernel, or in the sampler over
vLLM. So do the arms of conditional expressions. `install` marks them as modules are imported. What `triton.jit`
compiles runs on the device alone; it is listed apart, by file.
"""

from __future__ import annotations

import ast
import importlib.machinery
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = {
    "rankgrpo": ROOT / "rankgrpo",
    "rankgrpo_kernels": ROOT / "kernels",
    "rankgrpo_experiments": ROOT / "experiments",
}
WHOLE = re.compile(r"rankgrpo/sampler/vllm\w*\.py|kernels/\w+\.py")
# Parts of those files that are for CPUs: the engine's packed weights and cache there, and the runner without Triton.
FOR_CPUS = {"keep_weights_plain", "cpu_cache_bytes", "RowLists", "vllm_installed"}
YES = re.compile(r"""\.is_cuda$|==\ ["'](cuda|triton)["']$|torch\.cuda\.is_available\(\)$|\bon_gpu$""", re.X)
NO = re.compile(r"""!=\ ["']cuda["']$|type\ ==\ ["']cpu["']$""", re.X)

run: set[tuple[str, int, int]] = set()
"""(file, line, column) of what has run."""


def implies(test: ast.expr) -> bool:
    """Where the condition holds, the code is on CUDA."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        without = any(isinstance(value, ast.UnaryOp) and implies(value.operand) for value in test.values)
        return any(map(implies, test.values)) and not without
    if isinstance(test, ast.BoolOp):
        return all(map(implies, test.values))
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return denies(test.operand)
    return bool(YES.search(ast.unparse(test)))


def denies(test: ast.expr) -> bool:
    """Where the condition does not hold, the code is on CUDA."""
    if isinstance(test, ast.BoolOp):
        return (all if isinstance(test.op, ast.And) else any)(map(denies, test.values))
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return implies(test.operand)
    return bool(NO.search(ast.unparse(test)))


class _Marker:
    """Finds the statements of a file, and puts a mark before each."""

    def __init__(self, file: str):
        self.file, self.device_lines, self.inside = file, 0, ""
        self.found: dict[tuple[str, int, int], str] = {}
        """By place the function, or the class, around it."""

    def mark(self, node: ast.AST) -> ast.expr:
        place = (self.file, node.lineno, node.col_offset)
        self.found[place] = self.inside
        return ast.copy_location(ast.parse(f"__ran__({place!r})", mode="eval").body, node)

    def block(self, body: list[ast.stmt], cuda: bool) -> list[ast.stmt]:
        marked: list[ast.stmt] = []
        for number, node in enumerate(body):
            passive = isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom | ast.Pass)
            passive |= isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if cuda and not passive:
                marked.append(ast.copy_location(ast.Expr(self.mark(node)), node))
            marked.append(self.statement(node, cuda))
            if isinstance(node, ast.If) and denies(node.test) and isinstance(node.body[-1], ast.Return | ast.Raise):
                return marked + self.block(body[number + 1 :], True)
        return marked

    def statement(self, node: ast.stmt, cuda: bool) -> ast.stmt:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            if "triton.jit" in decorators:
                self.device_lines += node.end_lineno - node.lineno + 1
                return node
            around, self.inside = self.inside, f"{self.inside}.{node.name}".lstrip(".")
            for_cpus = not FOR_CPUS.isdisjoint(self.inside.split("."))
            whole = bool(WHOLE.fullmatch(self.file))
            if isinstance(node, ast.FunctionDef):
                cuda = (cuda or whole or node.name.startswith("_cuda_")) and not for_cpus
                node.body = self.block(node.body, cuda)
            elif not for_cpus:
                node.body = [self.statement(item, False) for item in node.body]
            self.inside = around
            return node
        for name, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                inner = cuda
                if isinstance(node, ast.If):
                    given = implies(node.test) if name == "body" else denies(node.test)
                    opposite = denies(node.test) if name == "body" else implies(node.test)
                    inner = (cuda or given) and not opposite
                setattr(node, name, self.block(value, inner))
            elif isinstance(value, ast.expr):
                setattr(node, name, _Arms(self, cuda).visit(value))
        for handler in getattr(node, "handlers", ()):
            handler.body = self.block(handler.body, cuda)
        for case in getattr(node, "cases", ()):
            case.body = self.block(case.body, cuda)
        return node


class _Arms(ast.NodeTransformer):
    """Marks the arm of `a if on_gpu else b` that is CUDA's."""

    def __init__(self, marker: _Marker, cuda: bool):
        self.marker, self.cuda = marker, cuda

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        for name, on_cuda in (("body", implies(node.test)), ("orelse", denies(node.test))):
            if on_cuda and not self.cuda:
                arm = getattr(node, name)
                both = ast.Tuple([self.marker.mark(arm), arm], ast.Load())
                setattr(node, name, ast.Subscript(both, ast.Constant(1), ast.Load()))
        return node


def mark(path: Path, text: str) -> tuple[ast.Module, _Marker]:
    marker = _Marker(path.relative_to(ROOT).as_posix())
    tree = ast.parse(text)
    tree.body = marker.block(tree.body, False)
    return ast.fix_missing_locations(tree), marker


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, name):  # not from __pycache__, nor into it
        path = Path(self.path)
        tree, _ = mark(path, path.read_text(encoding="utf-8"))
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module) -> None:
        module.__ran__ = run.add
        super().exec_module(module)


class _Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] not in SOURCES:
            return None
        spec = super().find_spec(name, path, target)
        if spec is not None and spec.origin and Path(spec.origin).resolve().is_relative_to(ROOT):
            spec.loader = _Loader(name, str(Path(spec.origin).resolve()))
        return spec


def install() -> None:
    """Mark every module of ours that is imported from here on."""
    sys.meta_path.insert(0, _Finder)


@cache
def everything() -> tuple[dict[tuple[str, int, int], str], dict[str, int]]:
    """What runs on CUDA alone, by place the function around it; and by file the lines that Triton compiles."""
    found: dict[tuple[str, int, int], str] = {}
    device: dict[str, int] = {}
    for folder in SOURCES.values():
        for path in sorted(folder.rglob("*.py")):
            _, marker = mark(path, path.read_text(encoding="utf-8"))
            found |= marker.found
            if marker.device_lines:
                device[marker.file] = marker.device_lines
    return found, device


def report(places: Iterable[tuple[str, int, int]]) -> list[str]:
    """A line a file: how many of its statements have run, and those that have not."""
    found, device = everything()
    done = set(places) & found.keys()
    lines = []
    for file in sorted({place[0] for place in found}):
        own = [place for place in found if place[0] == file]
        left = [place for place in own if place not in done]
        missing = f"  not: {', '.join(str(place[1]) for place in left)}" if left else ""
        lines.append(f"{len(own) - len(left):4} of {len(own):4}  {file}{missing}")
    lines.append(f"{len(done):4} of {len(found):4}  statements that run on CUDA alone, {len(done) / len(found):.1%}")
    lines.append(f"compiled for the device, not run: {', '.join(f'{n} lines of {f}' for f, n in device.items())}")
    return lines


if __name__ == "__main__":
    print("\n".join(report(run)))
