"""The layout of the package: wings that import downwards only, few names at the top, files and functions of a size."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rankgrpo"

# From the floor up; a module imports its own level and those before it.
LEVELS = [
    {"errors", "files"},
    {"loss", "units", "advantage", "thoughts", "parse", "reward", "metrics", "logprob"},
    {"config", "config_file"},
    {"items"},
    {"data"},
    {"baselines"},
    {"runtime"},
    {"model"},
    {"sampler"},
    {"evaluation"},
    {"rollouts"},
    {"sft", "train"},
    {"distill"},
    {"report"},
    {"sizing"},
    {"suite"},
    {"pipeline"},
    {"cli"},
    {"__main__"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))
TOO_LONG_ON_PURPOSE = {("train.py", "train"), ("sft.py", "train_sft")}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Modules of the package that a module imports when it runs, inside functions too; not for type checkers alone."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rankgrpo":
            module = node.module.removeprefix("rankgrpo").lstrip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                found.add(inner if inner in NAMES else module)
        if isinstance(node, ast.Import):
            found.update(a.name.removeprefix("rankgrpo.") for a in node.names if a.name.startswith("rankgrpo."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return frozenset(found - {""})


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    name = name_of(path)
    if not name:
        assert not imports_of(path)
        return
    level = LEVEL_OF[name.split(".")[0]]
    upwards = {other for other in imports_of(path) if LEVEL_OF[other.split(".")[0]] > level}
    assert not upwards, f"{name} imports {sorted(upwards)} from above"


HOSTS = [path for path in MODULES if "integrations" in path.parts]


@pytest.mark.parametrize("path", HOSTS, ids=name_of)
def test_what_runs_in_other_trainers_needs_the_method_alone(path):
    """Their environments have the base install; of the package's own folders only these are light."""
    light = {"errors", *LEVELS[1], "rollouts.mismatch", *map(name_of, HOSTS)}
    assert imports_of(path) <= light


def test_no_circles():
    graph = {name_of(path): imports_of(path) & NAMES for path in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_top_is_small():
    files = [path for path in PACKAGE.iterdir() if path.suffix == ".py"]
    folders = [path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()]
    assert len(files) <= 17 and len(folders) <= 13
    assert {path.stem for path in files} | {path.name for path in folders} == {*LEVEL_OF, "__init__"}


def test_every_folder_is_packaged():
    listed = (ROOT / "pyproject.toml").read_text()
    for init in PACKAGE.rglob("__init__.py"):
        dotted = ".".join(init.parent.relative_to(ROOT).parts)
        assert f'"{dotted}"' in listed, f"pyproject.toml does not package {dotted}"


SOURCES = [path for folder in ("rankgrpo", "kernels", "experiments") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_of_a_size_to_read(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (path.name, node.name) not in (
            TOO_LONG_ON_PURPOSE
        ):
            assert node.end_lineno - node.lineno < 80, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
