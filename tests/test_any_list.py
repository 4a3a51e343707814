"""The whole program on lists that are not of films: books by title and author, passages to re-rank."""

import json
import random

import pytest
from tiny_world import WORDS

from rankgrpo.config_file import load_config
from rankgrpo.evaluation.recommend import recommend_from
from rankgrpo.pipeline import run_pipeline
from rankgrpo.runtime.tracker import read_metrics

TITLES = [
    "Emma",
    "1984",
    "12 Rules",
    "Dune: Messiah",
    '"Quoted"',
    "Ein (kurzes) Buch",
    "海辺のカフカ",
    "A - B",
    "It",
    "Up",
]
AUTHORS = ["Jane Austen", "G. Orwell", "村上 春樹"]
OWN = [word for word in WORDS if not word.startswith(("data.num_train", "eval.num", "rl.num_steps", "sft.num_steps"))]
SHORT = ["rl.num_steps=2", "sft.num_steps=4", "eval.num_samples=4", "teacher.short_requests=1"]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")


def books(folder):
    folder.mkdir()
    rows = [(title, author) for title in TITLES for author in AUTHORS]
    cells = ["title,author", *(f'"{title.replace(chr(34), chr(34) * 2)}",{author}' for title, author in rows)]
    (folder / "catalog.csv").write_text("\n".join(cells), encoding="utf-8")
    lines = [f"{title} by {author}" for title, author in rows]
    rng = random.Random(0)
    for split, count in (("train", 24), ("validation", 4), ("test", 4)):
        samples = []
        for n in range(count):
            liked, wanted, other = rng.sample(lines, 3)
            turns = [{"role": "user", "content": f"I liked {liked}. What next?"}]
            entry = {"id": f"{split}{n}", "conversation": turns, "seen_titles": [liked]}
            samples.append(entry | {"groundtruth": [[wanted, 3], other]})
        write(folder / f"{split}.jsonl", samples)
    return lines


def run(folder, out, *words):
    config = load_config(None, [*OWN, *SHORT, f"data.path={folder}", *words])
    run_pipeline(config, out)
    return read_metrics(out / "rl" / "metrics.jsonl")[0]


@pytest.mark.slow
@pytest.mark.parametrize("held", ["none", "catalog"])
def test_books_without_years_train_and_are_recommended(tmp_path, capsys, held):
    lines = books(tmp_path / "books")
    item = ["data.item={title} by {author}", "data.item_noun=book", "eval.cutoffs=1,3", f"rl.constrain={held}"]
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Suggest {num_ranks} books.\n{context}", encoding="utf-8")
    item.append(f"data.prompt={prompt}")
    rows = run(tmp_path / "books", tmp_path / "run", *item)
    assert {"eval/recall@1", "eval/recall@3", "eval/ndcg@5"} <= rows[-1].keys() and "eval/recall@10" not in rows[-1]
    demonstrations = (tmp_path / "run" / "demonstrations-train.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(set(json.loads(row)["completion"].split("\n")) <= set(lines) for row in demonstrations)
    prompt.unlink()  # the run holds its text
    capsys.readouterr()
    recommend_from(str(tmp_path / "run"), None, "I liked Emma by Jane Austen", None)
    shown = capsys.readouterr().out.splitlines()
    if held == "catalog":
        assert len(shown) == 5 and all(line[4:6] == "+ " and line[6:] in lines for line in shown)


def passages_to_rank(folder):
    """Questions with eight passages of their own; returns the settings of such a set."""
    rng = random.Random(0)
    folder.mkdir()
    for split, count in (("train", 16), ("validation", 4), ("test", 4)):
        samples = []
        for n in range(count):
            passages = [{"label": f"[{i}]", "text": f"Passage about {rng.choice(TITLES)}."} for i in range(1, 9)]
            turns = [{"role": "user", "content": f"question {n}"}]
            samples.append({"id": f"{split}{n}", "conversation": turns, "seen_titles": [], "candidates": passages})
            samples[-1]["groundtruth"] = [[f"[{rng.randint(1, 4)}]", 2], "[7]"]
        write(folder / f"{split}.jsonl", samples)
    return ["data.item={label}", "rl.constrain=catalog", "teacher.short_requests=0"]


@pytest.mark.slow
def test_passages_are_re_ranked(tmp_path):
    folder = tmp_path / "passages"
    rows = run(folder, tmp_path / "run", *passages_to_rank(folder))
    assert rows[-1]["eval/in_catalog_frac"] == 1 and rows[-1]["eval/duplicate_frac"] == 0
    assert rows[-1]["reward/mean"] > 0
