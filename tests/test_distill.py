import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_openai import LIST, FakeServer
from tiny_world import ALONE, tiny_dataset

from rankgrpo.config import with_steps
from rankgrpo.config_file import load_config
from rankgrpo.data.dialogs import named_items
from rankgrpo.data.samples import Sample, Turn, read_samples, write_samples
from rankgrpo.distill import llm, stages
from rankgrpo.distill.corpus import make_corpus
from rankgrpo.distill.lists import is_list, list_prompt, lists_of_rows, read_lists
from rankgrpo.distill.metadata import catalog_text, metadata_prompt, read_metadata
from rankgrpo.distill.reflect import judge_prompt, read_ratings
from rankgrpo.distill.settings import DistillConfig
from rankgrpo.distill.stages import distill
from rankgrpo.errors import ConfigError
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.items.match import TitleMatcher
from rankgrpo.parse import parse_list
from rankgrpo.pipeline import count_demonstrations, teach, warm_start_dataset

ROOT = Path(__file__).parents[1]
CATALOG = Catalog([Item("Heat", 1995, genres=("Crime",), text="Thieves."), Item("Ronin", 1998), Item("Up", 2009)])
SAMPLE = Sample("s", (Turn("user", "Like Heat (1995)? {candidates}"),), ("Heat",), (("Ronin", 1998),))


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch):
    monkeypatch.setattr(llm, "LONGEST_WAIT_S", 0.02)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """48 training, 8 validation and 8 test conversations of the demo, as files."""
    folder = tmp_path_factory.mktemp("data") / "world"
    dataset = tiny_dataset()
    dataset.catalog.to_jsonl(folder / "catalog.jsonl")
    for split in ("train", "validation", "test"):
        write_samples(folder / f"{split}.jsonl", dataset.split(split))
    return folder


def settings(world, out, **changes):
    return DistillConfig(data=str(world), out=out, **{"num_folds": 2, "num_items": 5, "num_judged": 10} | changes)


def with_server(world, out, server, **changes):
    model = {"teacher": server.url, "model": "m", "max_attempts": 3, "num_listed": 4}
    return settings(world, out, **model | changes)


def completions(out, split="train"):
    samples, problems = read_samples(out / f"demonstrations-{split}.jsonl", catalog=tiny_dataset().catalog)
    assert not problems
    return {sample.id: sample.completion for sample in samples}


def table(out):
    by_split = json.loads((out / "scores.json").read_text())
    return {split: [summary["name"] for summary in summaries] for split, summaries in by_split.items()}


# -------------------------------------------------------------------------------------------------- questions, answers


def test_the_teachers_prompt_is_the_papers():
    prompt = list_prompt(SAMPLE, 20)
    assert "you need to reply with 20 recommendations" in prompt and prompt.endswith(
        "USER: Like Heat (1995)? {candidates}\n"
    )
    assert "reply with 7 recommendations" in list_prompt(SAMPLE, 7)


def test_lists_are_matched_and_the_rest_are_new_items():
    replies = ["1. Heat, (1995)\nBlade Runner (1982)\nsomething\nUP (2009)\nheat (1995)", None, "Blade runner (1982)"]
    lists = read_lists(replies, CATALOG, TitleMatcher(CATALOG).match_line, 20)
    assert lists.lists == [[0, 3, 2], None, [3]]
    assert lists.items[3] == Item("Blade Runner", 1982) and len(lists.items) == 4
    assert lists.text(0, 2) == "Heat (1995)\nBlade Runner (1982)"
    rows = [
        {"items": [["Heat", 1995], ["Blade Runner", 1982], ["Up", 2009]]},
        {"items": None},
        {"items": [["Blade Runner", 1982]]},
    ]
    assert lists_of_rows(rows, CATALOG) == lists
    assert read_lists(replies[:1], CATALOG, TitleMatcher(CATALOG).match_line, 1).lists == [[0]]


@pytest.mark.parametrize(
    ("reply", "readable"),
    [
        (LIST, True),
        ("Sure!\nHeat (1995)", True),
        ("Sure!\nHere:\nHeat (1995)", True),
        ("Sure!\nWhy not\nHeat (1995)", False),
        ("As an AI", False),
        ("", False),
    ],
)
def test_what_is_a_list(reply, readable):
    assert is_list(reply) is readable


def test_ratings_are_read_strictly():
    reply = (
        "Heat (1995)####2\n- Ronin (1998) #### -1\nRonin (1998)####2\nUp (2009)####3\nUp (2009)####1.5\nUp (2009)###1\n"
        "Up####1\nAlien (1979)####1\nUp (2009)####good\n"
    )
    assert read_ratings(reply, [0, 1, 2], CATALOG) == {0: 2, 1: -1}
    assert read_ratings(reply, [1], CATALOG) == {1: -1}  # no candidate, no rating
    assert read_ratings("Up (2009)####+2\nHeat (1995)####0", [0, 2], CATALOG) == {2: 2, 0: 0}


def test_the_judge_sees_the_conversation_and_every_candidate():
    prompt = judge_prompt(SAMPLE, CATALOG.items)
    assert "USER: Like Heat (1995)? {candidates}\n" in prompt  # what people say is no template
    assert prompt.endswith("Here are the candidates:\nHeat (1995)\nRonin (1998)\nUp (2009)")
    assert "movie_name (release_year)####rating" in prompt


def test_metadata_is_read_or_refused():
    heat, ronin, _ = CATALOG.items
    assert "Thieves." in metadata_prompt(heat) and "known" not in metadata_prompt(ronin)
    reply = "**Heat (1995)**\n**Keywords:** heist, LA\n\nPlots: A thief.\nA detective."
    assert read_metadata(heat, reply) == "Heat (1995)\nKeywords: heist, LA\nPlots: A thief. A detective."
    for bad in ("Plots: only", "Keywords: only", "Keywords:\nPlots: x", "Keywords: x\nPlots:"):
        assert read_metadata(heat, bad) is None, bad
    assert (
        catalog_text(heat) == "Heat (1995)\nKeywords: Crime\nPlots: Thieves." and catalog_text(ronin) == "Ronin (1998)"
    )


# ------------------------------------------------------------------------------------------------------------- offline


def test_without_stages_the_demonstrations_are_those_of_a_run_without_distill(world, tmp_path):
    out = distill(settings(world, tmp_path / "a", remap=False, reflect=False, adjust=False, short_requests=2))
    words = ["data.num_ranks=5", "teacher.num_folds=2", "teacher.short_requests=2"]
    expected = teach(load_config(None, words, data__path=str(world)), tiny_dataset(), tmp_path / "b", ALONE)
    for split, samples in expected.items():
        assert read_samples(out / f"demonstrations-{split}.jsonl")[0] == samples
    assert table(out) == {"validation": ["teacher"], "train": ["teacher"]}


def test_all_stages_offline(world, tmp_path, capsys):
    out = distill(settings(world, tmp_path / "a", short_requests=2))
    printed = capsys.readouterr().out
    assert table(out) == {"validation": ["teacher", "remap", "adjust"], "train": ["teacher", "remap", "adjust"]}
    assert "NDCG@5" in printed and "validation split, 8 conversations" in printed and "reflect: off" in printed
    made, dataset = completions(out), tiny_dataset()
    assert len(made) == 3 * 48 and {f"{sample.id}+1" for sample in dataset.train} <= made.keys()
    samples = {sample.id: sample for sample in read_samples(out / "demonstrations-train.jsonl")[0]}
    for name, text in made.items():
        listed = [dataset.catalog.lookup(item.title, item.year) for item in parse_list(text)]
        assert len(set(listed)) == 5 and None not in listed
        assert not set(listed) & set(named_items(samples[name], dataset.catalog))
    again = distill(settings(world, tmp_path / "b", short_requests=2))
    for name in sorted(path.name for path in out.iterdir()):
        assert (again / name).read_bytes() == (out / name).read_bytes(), name


def test_a_stage_is_made_again_only_when_what_it_is_made_from_changes(world, tmp_path):
    def times():
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    def changed(**changes):
        before = times()
        distill(settings(world, tmp_path, **changes))
        made = {name for name, moment in times().items() if before.get(name) != moment}
        return made - {
            ".lock",
            "keys.json",
            "scores.json",
            "demonstrations-train.jsonl",
            "demonstrations-validation.jsonl",
        }

    first = changed()
    assert first == {
        "teacher.jsonl",
        "metadata.jsonl",
        "embeddings.safetensors",
        "remap.jsonl",
        "adjust.safetensors",
        "adjust.jsonl",
    }
    assert changed() == set()
    assert changed(lambda_b=3.0) == {"adjust.safetensors", "adjust.jsonl"}
    assert changed(lambda_b=3.0, context_weight=0.5) == {"remap.jsonl", "adjust.safetensors", "adjust.jsonl"}
    assert changed(lambda_b=3.0, context_weight=0.5, seed=1) == first


def test_the_ground_truth_of_a_dialog_does_not_reach_its_own_demonstrations(world, tmp_path):
    dataset = tiny_dataset()
    config = settings(world, tmp_path / "a", lambda_w=0.01, lambda_b=0.01)  # as eager to learn as can be
    corpus = make_corpus(config, dataset, None)
    fold = corpus.fold_of[0]
    mates = [sample for sample, other in zip(dataset.train, corpus.fold_of, strict=False) if other == fold]
    # Everybody of one fold comes to want the same rare item; nobody of that fold may be told so.
    rare = dataset.catalog.items[-1]
    changed = tmp_path / "changed"
    dataset.catalog.to_jsonl(changed / "catalog.jsonl")
    names = {sample.id for sample in mates}
    wanted = [replace(s, groundtruth=((rare.title, rare.year),)) if s.id in names else s for s in dataset.train]
    write_samples(changed / "train.jsonl", wanted)
    for split in ("validation", "test"):
        write_samples(changed / f"{split}.jsonl", dataset.split(split))
    remap_alone = {"remap": False, "num_candidates": 0}
    before = completions(distill(replace(config, **remap_alone)))
    after = completions(distill(replace(config, data=str(changed), out=tmp_path / "b", **remap_alone)))
    name = f"{rare.title} ({rare.year})"
    assert not any(name in after[sample.id] and name not in before[sample.id] for sample in mates)
    assert any(name in text for key, text in after.items() if key not in names)


# ------------------------------------------------------------------------------------------------------- with a server


@pytest.mark.slow
def test_all_stages_with_a_model(world, tmp_path, capsys):
    troubles = [429, 500, "empty", "nonsense"]

    def behave(prompt, nth):
        return troubles[len(prompt) % 4] if nth == 0 and len(prompt) % 5 == 0 else "good"

    with FakeServer(behave) as server:
        config = with_server(world, tmp_path / "out", server, num_train=16)
        distill(replace(config, estimate=True, price_in=1e6))
        assert not server.calls and "calls, about" in capsys.readouterr().out
        out = distill(config)
        printed = capsys.readouterr().out
        assert table(out)["validation"] == ["teacher", "remap", "reflect", "adjust"]
        assert "on the way" in printed and "LEFT OPEN" not in printed
        num_calls = server.calls.total()
        texts = [json.loads(line)["text"] for line in (out / "metadata.jsonl").read_text().splitlines()]
        assert any("A Film Nobody Made (2031)\nKeywords: fake" in text for text in texts)
        made = completions(out)
        assert distill(config) and server.calls.total() == num_calls and completions(out) == made
        distill(replace(config, gamma=0.1, lambda_w=1.0))
        assert server.calls.total() == num_calls  # what is learned from the answers changes, the answers stay
        raw = distill(replace(config, remap=False, reflect=False, adjust=False))
        assert set(completions(raw).values()) == {
            "Heat (1995)\nThe Matrix (1999)\nA Film Nobody Made (2031)\nRonin (1998)"
        }


def test_samples_without_a_list_are_left_out_and_asked_again(world, tmp_path, capsys):
    bad = [tiny_dataset().train[0].conversation[-1].content]

    def behave(prompt, nth):
        return "nonsense" if "recommendations" in prompt and bad and bad[0] in prompt else "good"

    with FakeServer(behave) as server:
        config = with_server(world, tmp_path, server, metadata="catalog", reflect=False, max_attempts=1)
        missing = 48 - len(completions(distill(config)))
        printed = capsys.readouterr().out
        assert missing >= 1 and "samples have no teacher list and are left out" in printed and "LEFT OPEN" in printed
        bad.clear()
        assert len(completions(distill(config))) == 48


def test_ratings_that_cannot_be_read_leave_scores_alone(world, tmp_path, capsys):
    with FakeServer(lambda prompt, nth: "nonsense" if "####rating" in prompt else "good") as server:
        config = with_server(world, tmp_path, server, metadata="catalog", adjust=False, max_attempts=1, num_train=8)
        out = distill(config)
        printed = capsys.readouterr().out
        assert "16 LEFT OPEN" in printed and "reflect: 0 of 160 candidates rated" in printed
        judged = completions(out)
        assert completions(distill(replace(config, reflect=False, out=tmp_path / "b"))) == judged


@pytest.mark.slow
def test_killed_in_the_middle_it_repeats_no_finished_call(world, tmp_path):
    def behave(prompt, nth):
        time.sleep(0.05)
        return "good"

    with FakeServer(behave) as server:
        words = ["--data", world, "--out", tmp_path, "--teacher", server.url, "--model", "m", "--num-items", "5"]
        words += ["--metadata", "catalog", "--num-folds", "2", "--concurrency", "4", "--num-judged", "10"]
        command = [sys.executable, "-m", "rankgrpo", "distill", *map(str, words)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        for name in ("calls-teacher.jsonl", "calls-judge.jsonl"):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            path, deadline = tmp_path / name, time.monotonic() + 120
            while not path.exists() or path.read_bytes().count(b"\n") < 10:
                assert process.poll() is None, process.communicate()[0].decode()
                assert time.monotonic() < deadline, "the moment to kill never came"
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            with path.open("ab") as file:
                file.write(b'{"key": "cut in the mid')  # as a kill can leave it
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "known" in done.stdout
        # What was under way when the process died is asked again: at most four calls each time.
        assert sum(count - 1 for count in server.calls.values()) <= 8
        assert max(server.calls.values()) <= 2
        assert len(completions(tmp_path)) == 48


# -------------------------------------------------------------------------------------------------- encoders, settings


def test_an_embeddings_server(world, tmp_path):
    with FakeServer() as server:
        out = distill(settings(world, tmp_path, encoder=server.url, encoder_model="e"))
    assert table(out)["validation"] == ["teacher", "remap", "adjust"]
    rows = stages.encode(DistillConfig(), ["one film", "one other film"], ["film"], num_catalog=2)
    assert [row.shape[0] for row in rows] == [2, 1]


def test_a_transformers_encoder_means_over_its_tokens(tmp_path):
    from transformers import AutoModel

    from rankgrpo.distill.embed import encode_with_transformer
    from rankgrpo.model.presets import make_init
    from rankgrpo.model.tiny import TinyConfig

    folder = make_init("tiny", tiny_dataset(), tmp_path / "m", seed=0, tiny=TinyConfig(32, 1, 32, 2, 1, 1024))
    texts = ["Heat", "a much longer text about thieves in Los Angeles", ""]
    rows = encode_with_transformer(str(folder), texts, torch.device("cpu"))
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    for text, row in zip(texts[:2], rows, strict=False):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(row, hidden / hidden.norm(), rtol=1e-4, atol=1e-5)


def test_an_encoder_that_is_not_there_says_what_to_do(world, tmp_path):
    with pytest.raises(ValueError, match="no-such-encoder.*cannot be loaded.*--encoder http"):
        distill(settings(world, tmp_path, encoder="./no-such-encoder"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "gpt-4o"}, "neither `ease` nor an address"),
        ({"teacher": "http://x/v1"}, "needs the name of a model"),
        ({"judge": "http://x/v1"}, "--judge http://x/v1 needs the name"),
        ({"metadata": "teacher"}, "needs a model as teacher"),
        ({"extra": "{"}, "--extra is not JSON"),
        ({"extra": "[]"}, "must be a JSON object"),
        ({"num_folds": 1}, "--num-folds must be 0, or 2 and more"),
        ({"lambda_w": 0.0}, "--lambda-w must be positive"),
        ({"gamma": -1.0}, "--gamma must not be negative"),
        ({"num_candidates": -4}, "--num-candidates must not be negative, got -4"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**changes)


def test_the_papers_settings_are_the_defaults_of_a_model():
    model = DistillConfig(teacher="http://x/v1", model="m")
    assert (model.weights, model.penalties, model.logit_scale, model.candidates) == ((1.0, 1.0), (0.01, 0.01), 1.0, 0)
    assert (model.gamma, model.num_judged, model.listed, model.asks_metadata) == (0.5, 100, 20, True)


# ------------------------------------------------------------------------------------------------------ the warm start


def test_a_run_trains_on_given_demonstrations(world, tmp_path):
    out = distill(settings(world, tmp_path / "made", short_requests=1))
    words = ["sft.batch_size=8", "sft.num_epochs=1", f"teacher.demonstrations={out}"]
    config = load_config(None, words, data__path=str(world))
    run = tmp_path / "run"
    assert count_demonstrations(config, tiny_dataset(), run) == 96
    assert with_steps(config, 48, 96).sft.num_steps == 12
    taught = teach(config, tiny_dataset(), run, ALONE)
    assert {sample.id: sample.completion for sample in taught["train"]} == completions(out)
    (out / "demonstrations-train.jsonl").unlink()
    assert count_demonstrations(config, tiny_dataset(), run) == 96  # the run has its own copy
    with pytest.raises(ConfigError, match="no .*demonstrations-train.jsonl; `rankgrpo distill"):
        count_demonstrations(config, tiny_dataset(), tmp_path / "other")


def test_ease_teaches_a_share_of_the_dialogs(tmp_path):
    dataset = tiny_dataset()
    config = load_config(None, ["teacher.data_frac=0.5", "teacher.short_requests=1", "sft.batch_size=8"])
    taught = warm_start_dataset(config, dataset)
    ids = [sample.id for sample in taught.train]
    assert len(dataset.train) == 48 and len(ids) == 24 and taught.validation == dataset.validation
    assert count_demonstrations(config, taught, tmp_path) == 48
    assert with_steps(config, 48, 48) == with_steps(config, 48)
    demonstrations = teach(config, taught, tmp_path, ALONE)["train"]
    assert [sample.id for sample in demonstrations] == [*ids, *(f"{name}+0" for name in ids)]
