"""README, docs/ and the other pages: what they say can be run is run, and what they name exists.

docs/contributing.md ("Commands in these pages") says what the words behind an opening fence mean.
"""

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_world import WORDS

from rankgrpo.cli import app
from rankgrpo.config import Config
from rankgrpo.config_file import flatten, load_config
from rankgrpo.data.demo import write_demo
from rankgrpo.parse import parse_list

ROOT = Path(__file__).parents[1]
DOCS = sorted(ROOT.glob("docs/*.md")) + sorted(ROOT.glob("docs/integrations/*.md"))
PAGES = ["README.md", *(path.relative_to(ROOT).as_posix() for path in DOCS), "kernels/README.md",
         "experiments/README.md", "experiments/vllm/README.md"]  # fmt: skip
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
NOT_RUN = {"gpu", "server", "hours", "download"}
FIRST = "rankgrpo run --model tiny --data demo"
"""Makes the run that the other commands ask for."""


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    info: str
    text: str

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def kind(self) -> str:
        return self.info.partition(" ")[2]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file_name(self) -> str | None:
        return self.kind if re.fullmatch(r"\w+\.\w+", self.kind) else None


def read_blocks(page: str) -> Iterator[Block]:
    info, start, lines = None, 0, []
    for number, line in enumerate(TEXTS[page].splitlines(), 1):
        fence = re.match(r"\s*```(.*)$", line)
        if fence is None:
            lines.append(line)
        elif info is None:
            info, start, lines = fence[1].strip(), number, []
        else:
            yield Block(page, start, info, "\n".join(lines))
            info = None
    assert info is None, f"{page}:{start}: a fence that is not closed"


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


def blocks(language: str, *kinds: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and block.kind in kinds]


def commands(block: Block) -> list[str]:
    """The block's commands, continued lines joined, without comments."""
    joined = re.sub(r"\\\n\s*", "", block.text)
    lines = [re.sub(r"(^|\s+)#.*$", "", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line]


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.S | re.M)


def test_every_block_has_a_known_kind():
    known = {"bash": {"", "ci"} | NOT_RUN, "python": {""}, "json": {""}, "toml": {""}, "text": {"", "tree"}}
    known["math"] = {""}
    for block in BLOCKS:
        if block.file_name is None:
            assert block.kind in known.get(block.language, ()), f"{block}: unknown kind of block {block.info!r}"


# ----------------------------------------------------------------------------------------------------------------------
# Commands that run


def run_words(*words: str) -> str:
    """Run the command line in this process, in the working folder; what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            app.cli(prog="rankgrpo", args=list(words))
        except SystemExit as end:
            assert not end.code, f"rankgrpo {shlex.join(words)}: {end.code}"
    return out.getvalue()


SMALL_DATA = "books"
"""A data set that a page makes of its own lines, smaller than the tests' size."""


def at_test_size(words: list[str]) -> list[str]:
    """The same command on a model and data of a second; keys that it sets itself stay."""
    if "--check" in words or "--help" in words:
        return words
    if words[0] in ("run", "sft", "train", "experiments"):
        if "--set" not in words:
            words = [*words, "--set"]
        own = {word.partition("=")[0] for word in words[words.index("--set") + 1 :]}
        own |= {"data.num_train"} if SMALL_DATA in words else set()
        return [*words, *(word for word in WORDS if word.partition("=")[0] not in own)]
    if SMALL_DATA in words:
        return words
    small = {"data check": ["--num-train", "48"], "evaluate": ["--num-samples", "8"]}
    return [*words, *small.get(words[0], small.get(" ".join(words[:2]), []))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run: a data set, a finished run, kernels and experiments."""
    folder = tmp_path_factory.mktemp("docs")
    write_demo(folder / "path" / "to" / "dataset", num_train=48, num_validation=8, num_test=8, seed=0)
    for name in ("kernels", "experiments"):
        (folder / name).symlink_to(ROOT / name)
    with contextlib.chdir(folder):
        run_words(*at_test_size(shlex.split(FIRST)[1:]))
    return folder


@pytest.fixture(scope="module")
def done():
    """The commands that have been run: one that stands on several pages is run once."""
    return {FIRST}


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in blocks("bash", "")}))
def test_commands_run(page, folder, done, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for block in (block for block in BLOCKS if block.page == page):
        if block.file_name is not None:
            (folder / block.file_name).write_text(block.text + "\n", encoding="utf-8")
    for block in blocks("bash", ""):
        for command in commands(block) if block.page == page else ():
            words = shlex.split(command)
            if command in done:
                continue
            done.add(command)
            if words[0] == "rankgrpo":
                run_words(*at_test_size(words[1:]))
                continue
            assert words[0] == "python", f"{block}: {command!r} is neither rankgrpo nor python"
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, env=environment)


def test_the_first_command_stands_on_a_page():
    assert any(FIRST in commands(block) for block in blocks("bash", ""))


# ----------------------------------------------------------------------------------------------------------------------
# Commands that .ci/run runs, and those that nothing here can run


def ci_commands() -> set[str]:
    text = (ROOT / ".ci/run").read_text().replace("\\\n", " ")
    lines = [line.strip().removeprefix(".venv/bin/") for line in text.splitlines()]
    found = {line for line in lines if line and not line.startswith("#")}
    recipes = dict(re.findall(r"^([\w-]+):[^\n]*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M))
    words = [word for line in found if line.startswith("make ") for word in shlex.split(line)[1:]]
    targets = [word for word in words if not word.startswith("-") and "=" not in word]
    for target in targets:
        targets += re.findall(r"\$\(MAKE\) ([\w-]+)", recipes.get(target, ""))
    return found | {f"make {target}" for target in targets}


@pytest.mark.parametrize("block", blocks("bash", "ci"), ids=str)
def test_ci_runs_what_the_pages_say_it_runs(block):
    for command in commands(block):
        assert command in ci_commands(), f"{block}: {command!r} is not in .ci/run"


@cache
def options_of(*command: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z0-9-]*", re.sub(r"\x1b\[[0-9;]*m", "", run_words(*command, "--help"))))


@pytest.mark.parametrize("block", blocks("bash", *NOT_RUN), ids=str)
def test_commands_that_are_not_run_exist(block):
    makefile = (ROOT / "Makefile").read_text()
    for command in commands(block):
        if program := re.search(r"(?:^|\s)rankgrpo ((?:data )?[a-z]+)(.*)", command):
            options = options_of(*program[1].split())
            for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", program[2]):
                assert option in options, f"{block}: `rankgrpo {program[1]}` has no {option}"
        elif command.startswith("make "):
            _, target, *variables = shlex.split(command)
            assert re.search(rf"^{re.escape(target)}:", makefile, re.M), f"{block}: no make target {target}"
            for variable in variables:
                name = variable.partition("=")[0]
                assert re.search(rf"^{name} *\?=|,{name},|\$\({name}\)", makefile, re.M), f"{block}: no variable {name}"
        elif command.split()[0].endswith("python"):
            assert (ROOT / command.split()[1]).is_file(), f"{block}: {command!r} runs no file"
        else:
            assert command.split()[0] in ("export", "vllm", "curl"), f"{block}: {command!r} is not known"


# ----------------------------------------------------------------------------------------------------------------------
# Python, JSON, TOML


@pytest.fixture(scope="module")
def method_names(folder):
    """What stands in blocks of Python without being made there: sampled lists of a tiny tokenizer."""
    from transformers import AutoTokenizer

    from rankgrpo.parse import RankSegmenter

    P, G, K = 2, 3, 4
    tokenizer = AutoTokenizer.from_pretrained(folder / "runs" / "tiny-demo" / "rl" / "final")
    texts = ["\n".join(f"Film {n} (19{50 + n})" for n in range(1 + i)) for i in range(P * G)]  # short, full, overlong
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    T = max(map(len, rows))
    token_ids_BT = torch.tensor([row + [tokenizer.pad_token_id] * (T - len(row)) for row in rows])
    mask_BT = torch.arange(T) < torch.tensor([[len(row)] for row in rows])
    logp_BT = torch.full((P * G, T), -0.5, requires_grad=True)
    reward_PGK = torch.eye(K).repeat(2, 1)[: P * G].view(P, G, K)
    return {
        "P": P, "G": G, "K": K, "segmenter": RankSegmenter(tokenizer), "token_ids_BT": token_ids_BT,
        "mask_BT": mask_BT, "eos_BT": (token_ids_BT == tokenizer.eos_token_id) & mask_BT, "logp_BT": logp_BT,
        "old_logp_BT": logp_BT.detach() - 0.01, "reward_PGK": reward_PGK,
    }  # fmt: skip


@pytest.mark.parametrize("block", blocks("python", ""), ids=str)
def test_python_runs(block, method_names):
    exec(compile(block.text, str(block), "exec"), dict(method_names))


def test_the_loss_of_the_readme_is_five_lines_that_move_the_policy(method_names):
    (block,) = [block for block in blocks("python", "") if block.page == "README.md"]
    lines = [line for line in block.text.splitlines() if line and not line.startswith(("from ", "import "))]
    assert len(lines) == 5
    method_names["logp_BT"].grad = None
    exec(block.text, dict(method_names))
    grad_BT = method_names["logp_BT"].grad
    assert (grad_BT != 0).any() and not (grad_BT[~method_names["mask_BT"]] != 0).any()


@pytest.mark.parametrize("page", ["trl", "verl", "openrlhf", "areal"])
def test_the_reward_of_an_integration_pays_an_item_once(page):
    text = TEXTS[f"docs/integrations/{page}.md"]
    names = {"parse_list": parse_list, "K": 4}
    exec("def hits" + text.partition("\ndef hits")[2].partition("\n\n")[0].partition("```")[0], names)
    answer, wanted = "Heat (1995)\nRonin (1998)\nHeat (1995)", ["Heat", "Up"]
    given = {"trl": ([answer], [wanted]), "verl": ("", answer, wanted), "openrlhf": ([answer], ["Heat|Up"])}
    made = names["hits"](*given.get(page, (answer, wanted)))
    assert (made[0] if page in ("trl", "openrlhf") else made) == [1, 0, 0, 0]


@pytest.mark.parametrize("block", [*blocks("json", ""), *blocks("toml", "")], ids=str)
def test_json_and_toml_can_be_read(block, tmp_path):
    if block.language == "json":
        assert json.loads(block.text)
        return
    assert tomllib.loads(block.text)
    (tmp_path / "settings.toml").write_text(block.text)
    load_config(tmp_path / "settings.toml")


# ----------------------------------------------------------------------------------------------------------------------
# What the pages name


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, part = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target} leads nowhere"
        if part:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert part in map(anchor, headings), f"{page}: {target}: no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_functions_exist(page):
    for path in re.findall(r"`((?:rankgrpo|kernels|tests|experiments|docs)/[\w./-]*)`", prose(page)):
        assert (ROOT / path).exists(), f"{page}: there is no {path}"
    for name in re.findall(r"`(rankgrpo(?:\.\w+)+)`", prose(page)):
        resolve(name)


def resolve(name: str) -> object:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            file = (ROOT / "/".join(parts[:end])).with_suffix(".py")
            if not error.name.startswith("rankgrpo") and file.is_file():  # the host of an integration is not here
                source = file.read_text()
                assert all(re.search(rf"^ *(class|def) {part}\b", source, re.M) for part in parts[end:]), (
                    f"there is no {name}"
                )
                return source
            continue
        for part in parts[end:]:
            assert hasattr(found, part), f"there is no {name}"
            found = getattr(found, part)
        return found
    raise AssertionError(f"there is no {name}")


def test_every_equation_has_functions_that_exist():
    rows = re.findall(r"^\| (\d[^|]*) \|[^|]*\| ([^|]*) \|$", TEXTS["docs/algorithm.md"], re.M)
    rows += re.findall(r"^\| (\d[^|]*) \|[^|]*\| ([^|]*) \|$", TEXTS["docs/stage1.md"], re.M)
    assert {number for cell, _ in rows for number in re.findall(r"\d+", cell)} >= {"3", "5", *map(str, range(6, 14))}
    for _, cell in rows:
        assert callable(resolve(re.search(r"`(rankgrpo[\w.]+)`", cell)[1]))


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist(page):
    keys = flatten(Config())
    sections = "|".join({key.partition(".")[0] for key in keys if "." in key})
    for key in re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z][a-z0-9_]*)(?![\w(])", TEXTS[page]):
        assert key in keys or key.endswith((".md", ".py", ".toml", ".jsonl")), f"{page}: there is no setting {key}"


def test_the_readme_is_short_and_its_tree_is_the_tree():
    assert len(TEXTS["README.md"].splitlines()) <= 130
    (block,) = blocks("text", "tree")
    package = [re.split(r"\s{3,}", line.strip())[0] for line in block.text.splitlines() if line.startswith("  ")]
    names = " ".join(package).split()
    folders = {path.parent.name for path in ROOT.glob("rankgrpo/*/__init__.py")}
    assert {name.rstrip("/") for name in names if name.endswith("/")} == folders
    for name in names:
        assert (ROOT / "rankgrpo" / name).is_dir() or (ROOT / "rankgrpo" / f"{name}.py").is_file(), name


def test_the_figures_of_the_readme_are_those_of_the_experiments():
    figures = re.findall(r"[+-]?[.\d]+(?: %)? \[[^\]]*\d(?: %)?\]", TEXTS["README.md"])
    assert len(figures) >= 6
    made = TEXTS["experiments/README.md"]
    for figure in figures:
        assert figure.replace(" %", "%") in made, f"README: {figure} is not in experiments/README.md"


def test_every_shape_letter_of_the_table_is_that_of_its_file():
    """The table of local letters names files whose legends have the letter."""
    table = TEXTS["docs/contributing.md"].partition("with several meanings")[2].partition("New code")[0]
    letter = ""
    for first, _, where in re.findall(r"^\| (\w?) ?\| ([^|]*) \| ([^|]*) \|$", table, re.M):
        letter = first or letter
        for path in re.findall(r"`([^`]+)`", where):
            files = [ROOT / path] if path.endswith(".py") else sorted((ROOT / path).rglob("*.py"))
            legends = [
                legend
                for file in files
                for legend in re.findall(r"^# Shape letters:(.*(?:\n#.*)*)", file.read_text(encoding="utf-8"), re.M)
            ]
            assert any(re.search(rf"\b{letter}\b", legend) for legend in legends), f"{path} has no letter {letter}"
