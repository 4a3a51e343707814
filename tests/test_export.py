"""`rankgrpo export`: the folder opens as a model, its catalog and settings hold lists as the run does, and its card."""

import json
from dataclasses import replace

import pytest
from tiny_world import taught_dataset, tiny_config, tiny_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankgrpo.config_file import load_config, to_toml
from rankgrpo.data.prompt import TEMPLATE_DATE, encode_prompts
from rankgrpo.data.samples import Candidate, Sample, Turn, read_samples, write_samples
from rankgrpo.errors import ConfigError, DataError, ModelError
from rankgrpo.items.catalog import read_catalog
from rankgrpo.model.constraint import open_constraint
from rankgrpo.model.presets import make_init
from rankgrpo.model.tiny import TinyConfig
from rankgrpo.report.export import EXAMPLE, check_name, export_run, upload
from rankgrpo.sampler.vllm_serve import read_constraint
from rankgrpo.sampler.vllm_trie import SEEN


def write_run(folder, *words):
    """The files of a finished run that an export reads, with an untrained model."""
    config = tiny_config("rl.constrain=catalog", "rl.num_steps=6", *words)
    size = config.model
    tiny = TinyConfig.of(size)
    make_init("tiny", taught_dataset(), folder / "rl" / "best", seed=0, tiny=tiny)
    (folder / "config.toml").write_text(to_toml(config))
    meta = {"command": "rankgrpo run --data demo", "commit": "abc123", "machine": "a box", "versions": {"torch": "9.9"}}
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "eval" / "test").mkdir(parents=True)
    for name, mean in (("sft", 0.0521), ("rank-grpo", 0.0612)):
        metrics = {"ndcg@20": {"mean": mean, "low": mean - 0.005, "high": mean + 0.005}}
        summary = {"name": name, "split": "test", "num_samples": 8, "metrics": metrics, "hit_rate_by_rank": [0.1]}
        (folder / "eval" / "test" / f"{name}.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "films")


@pytest.fixture(scope="module")
def out(run):
    return export_run(run, run.parent / "served")


def test_the_folder_opens_as_it_is(run, out):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.hidden_size == 32 and tokenizer.chat_template
    assert (out / "model.safetensors").read_bytes() == (run / "rl" / "best" / "model.safetensors").read_bytes()
    assert load_config(out / "config.toml", saved=True) == load_config(run / "config.toml", saved=True)


def test_lists_are_held_as_in_the_run(run, out):
    held = read_constraint(out)
    tokenizer = AutoTokenizer.from_pretrained(run / "rl" / "best")
    own = open_constraint(tiny_dataset().catalog, tokenizer, num_ranks=5, forbid="repeats")
    assert (held.num_ranks, held.forbid, held.max_tokens) == (5, "repeats", own.max_tokens)
    assert held.trie.token.tolist() == own.trie.token.tolist()
    catalog, problems = read_catalog(out / "catalog.jsonl")
    assert catalog.lines == tiny_dataset().catalog.lines and not problems


def test_the_request_asks_what_the_model_was_trained_on(out):
    request, settings = (json.loads((out / name).read_text()) for name in ("request.json", "lists.json"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template(
        request["messages"], add_generation_prompt=True, return_dict=False, **request["chat_template_kwargs"]
    )
    sample = Sample("x", (Turn("user", EXAMPLE),), (), ())
    assert [ids] == encode_prompts(tokenizer, [sample], 10_000, 5)
    assert request["messages"][0]["content"] == settings["prompt"].replace("{context}", f"USER: {EXAMPLE}\n")
    assert request["vllm_xargs"] == {SEEN: []} and request["max_tokens"] == read_constraint(out).max_tokens
    assert request["chat_template_kwargs"] == {"date_string": TEMPLATE_DATE, "enable_thinking": False} and request[
        "model"
    ] == str(out)


def own_data(folder, **more):
    """A data set of the films of `tiny_dataset` whose samples have these fields; returns its candidates."""
    dataset = tiny_dataset()
    items = [dataset.catalog.items[index] for index in (3, 14, 15, 92, 65, 35)]
    candidates = tuple(Candidate(item.title, item.year) for item in items)
    folder.mkdir()
    dataset.catalog.to_jsonl(folder / "catalog.jsonl")
    for split in ("train", "validation", "test"):
        first = dataset.split(split)[0]
        seen, truth = (items[0].title,), ((items[1].title, items[1].year),)
        more = {"candidates": candidates} | more
        write_samples(folder / f"{split}.jsonl", [replace(first, seen_titles=seen, groundtruth=truth, **more)])
    return candidates


@pytest.mark.parametrize("forbid", ["repeats", "repeats+seen"])
def test_a_run_of_candidates_asks_for_an_order_of_them(tmp_path, forbid):
    candidates = own_data(tmp_path / "data")
    words = [f"data.path={tmp_path / 'data'}", f"rl.forbid={forbid}"]
    out = export_run(write_run(tmp_path / "run", *words), tmp_path / "served")
    request, settings = (json.loads((out / name).read_text()) for name in ("request.json", "lists.json"))
    (asked,), _ = read_samples(tmp_path / "data" / "validation.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template(
        request["messages"], add_generation_prompt=True, return_dict=False, **request["chat_template_kwargs"]
    )
    assert [ids] == encode_prompts(tokenizer, [asked], 10_000, 5)
    text = "".join(f"{candidate}\n" for candidate in candidates)
    assert f"Here are the candidates:\n{text}Here is" in request["messages"][0]["content"]
    assert "Here are the candidates:\n{candidates}Here is" in settings["prompt"]
    assert "`{candidates}` is a line for every candidate" in (out / "README.md").read_text()
    held, closed = read_constraint(out), request["vllm_xargs"][SEEN]
    catalog, _ = read_catalog(out / "catalog.jsonl")
    left = {(item.title, item.year) for index, item in enumerate(catalog.items) if index not in closed}
    seen = candidates[:1] if forbid == "repeats+seen" else ()
    assert left == {(one.title, one.year) for one in candidates if one not in seen}
    held.start(closed)  # enough are left for a list


def test_a_prompt_with_fields_is_exported_with_an_example_of_them(tmp_path):
    own_data(tmp_path / "data", candidates=(), fields=(("mood", "sad"),))
    words = [f"data.path={tmp_path / 'data'}", "data.prompt=List {num_ranks} for somebody {mood}. {context}"]
    run = write_run(tmp_path / "run", *words)
    out = export_run(run, tmp_path / "served")
    request, settings = (json.loads((out / name).read_text()) for name in ("request.json", "lists.json"))
    assert request["messages"][0]["content"].startswith("List 5 for somebody sad. USER: ")
    assert settings["prompt"] == "List 5 for somebody {mood}. {context}" and request["vllm_xargs"] == {SEEN: []}
    assert "`{mood}` is that field of a sample, `{context}` is a line `USER: ...`" in (out / "README.md").read_text()
    (tmp_path / "data" / "validation.jsonl").write_text("")
    with pytest.raises(DataError, match="validation.jsonl: no sample, of which the example of an export is made"):
        export_run(run, tmp_path / "again")
    write_samples(tmp_path / "data" / "validation.jsonl", tiny_dataset().validation[:1])
    with pytest.raises(ConfigError, match="data.prompt: {mood} is no placeholder for sample"):
        export_run(run, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_free_run_asks_for_free_lists(tmp_path):
    out = export_run(write_run(tmp_path / "run", "eval.constrain=none", "rl.max_new_tokens=33"), tmp_path / "served")
    request = json.loads((out / "request.json").read_text())
    assert "vllm_xargs" not in request and request["max_tokens"] == 33
    assert "Lists are decoded freely." in (out / "README.md").read_text()


def test_the_card(out):
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: other\n") and "\n# films\n" in card
    assert "| NDCG@20 | **.0612** [.0562, .0662] | .0521 [.0471, .0571] |" in card
    for text in ("rankgrpo run --data demo", "Commit abc123, a box, seed 3407; torch 9.9.", "- `rl.lr = 0.001`",
                 "6 steps of 4 conversations with 3 lists each", "Lists are held to these items"):  # fmt: skip
        assert text in card, text
    base = tiny_config("model.name=qwen2.5-0.5b", "model.hidden=256", "model.layers=4", "model.ffn=768",
                       "model.heads=4", "model.kv_heads=2", "model.vocab=8192")  # fmt: skip
    from rankgrpo.report.export import model_card

    card = model_card(out.parent / "nothing", base, "sft", 9, "{context}")
    assert "license: apache-2.0\n" in card and "base_model: Qwen/Qwen2.5-0.5B-Instruct\n" in card
    assert "has not been evaluated" in card and "the warm start" in card


def test_what_cannot_be_exported(run, out, tmp_path):
    with pytest.raises(ConfigError, match="served: it exists"):
        export_run(run, out)
    with pytest.raises(ModelError, match="sft/final: no model; this run has best"):
        export_run(run, tmp_path / "x", which="sft")
    with pytest.raises(ModelError, match="no model; `rankgrpo run"):
        export_run(tmp_path / "nothing", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match="lists.json: no such file; serve a folder that `rankgrpo export"):
        read_constraint(run)


def test_nothing_is_sent_without_a_name_and_all_of_it_with_one(out, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, *args, **options):
            calls.append(("create", args, options))

        def upload_folder(self, **options):
            calls.append(("upload", options))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert upload(out, "me/films") == "https://huggingface.co/me/films"
    assert calls == [
        ("create", ("me/films",), {"private": True, "exist_ok": True}),
        ("upload", {"repo_id": "me/films", "folder_path": str(out)}),
    ]
    monkeypatch.setattr(Hub, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("no\nroute")))
    with pytest.raises(ModelError, match="--push me/films: no route. The export is in .*served; `hf auth login`"):
        upload(out, "me/films")
    for name in ("films", "a/b/c", "/x", "me/"):
        with pytest.raises(ConfigError, match="expected owner/model"):
            check_name(name)
