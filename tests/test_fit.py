"""Settings that fit a model: by size, by the run it comes from, by measured lengths; and what is refused."""

import json
import re
import sys
from dataclasses import replace

import pytest
from tiny_world import WORDS
from transformers import AutoConfig

from rankgrpo import cli
from rankgrpo.config import Config
from rankgrpo.config_file import load_config, to_toml
from rankgrpo.data.demo import write_demo
from rankgrpo.data.load import load_dataset
from rankgrpo.data.prompt import encode_prompts
from rankgrpo.errors import ConfigError
from rankgrpo.evaluation.compare import list_sources
from rankgrpo.items.format import ItemFormat
from rankgrpo.model import fit
from rankgrpo.model.fit import (
    Lengths,
    check_lengths,
    check_run_lengths,
    choose_lengths,
    count_model,
    measure,
    model_settings,
    quantile,
    run_of,
)
from rankgrpo.model.tiny import train_tokenizer
from rankgrpo.pipeline import run_pipeline, teach
from rankgrpo.runtime.distributed import start_parallel

SMOLLM2 = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "model_type": "llama",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "films"
    write_demo(folder, num_train=300, num_validation=20, num_test=20, seed=0)
    return folder


def make_folder(path, data, **changes):
    """A model folder as far as settings need it: sizes, a tokenizer, and a file of weights that nobody reads."""
    dataset = load_dataset(str(data), item_format=ItemFormat())
    train_tokenizer(dataset, 2048).save_pretrained(path)
    AutoConfig.for_model(**(SMOLLM2 | changes)).save_pretrained(path)
    (path / "model.safetensors").touch()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data):
    return make_folder(tmp_path_factory.mktemp("smollm2"), data)


def demonstrations_of(config, run_dir):
    """Tokens of every list of the warm start, and of every training conversation, under the folder's tokenizer."""
    dataset = load_dataset(config.data.path, item_format=ItemFormat(config.data.item))
    taught = teach(config, dataset, run_dir, start_parallel())["train"]
    return dataset, taught


def test_quantile_is_the_value_that_a_share_does_not_exceed():
    values = list(range(1, 201))
    assert quantile(values, 0.99) == 198 and quantile(values, 0.5) == 100 and quantile([7], 0.99) == 7


def test_the_size_is_counted_from_the_configuration(folder):
    assert count_model(str(folder)) == 134_515_008  # SmolLM2-135M's, tied head once


def run_words(name, folder, data, run_dir):
    start = {"train": "--from-model", "run": "--model", "sft": "--model"}[name]
    return [name, start, str(folder), "--data", str(data), "--run-dir", str(run_dir)]


@pytest.mark.parametrize("name", ["train", "run", "sft"])
def test_no_demonstration_is_cut_under_the_settings_of_a_command(name, folder, data, tmp_path, monkeypatch, capsys):
    """`train --from-model FOLDER`, `run --model FOLDER` and `sft --model FOLDER`, up to where they would train."""
    asked = {}
    monkeypatch.setattr("rankgrpo.pipeline.run_pipeline", lambda config, run_dir, **_: asked.update(config=config))
    monkeypatch.setattr(sys, "argv", ["rankgrpo", *run_words(name, folder, data, tmp_path / "run")])
    cli.main()
    config, lines = asked["config"], capsys.readouterr().out.splitlines()
    assert config.model.name == str(folder)
    assert (config.sft.lr, config.rl.lr, config.rl.kl_coef) == (2e-4, 1e-5, 1e-3)  # experiments/smollm2-135m.toml
    dataset, taught = demonstrations_of(config, tmp_path / "taught")
    tokenizer = train_tokenizer(dataset, 2048)
    lists = tokenizer([sample.completion for sample in taught], add_special_tokens=False)["input_ids"]
    assert max(map(len, lists)) + 1 <= config.rl.max_new_tokens < 2 * max(map(len, lists))
    prompts = encode_prompts(tokenizer, dataset.train, 10**6, config.data.num_ranks, quiet=True)
    cut = sum(len(ids) > config.data.max_prompt_tokens for ids in prompts)
    assert cut <= 3  # 1 % of 300
    assert len(lines) == 3 and all(line.startswith("> ") for line in lines)
    assert "134.5M parameters, so the settings of the preset smollm2-135m" in lines[0]
    assert re.search(r"99 % of 300 training conversations have at most \d+ tokens", lines[1])
    assert f"; {cut} longer ones" in lines[1] if cut else "none is longer" in lines[1]
    assert re.search(r"99 % of 512 lists of items from the ground truth have at most \d+ tokens, the longest", lines[2])


def test_evaluate_scores_another_model_under_its_own_settings(folder, data, tmp_path, capsys):
    run = tmp_path / "run"
    make_folder(run / "sft" / "final", data)
    preset = fit.read_settings(fit.preset_file("tiny"))
    config = load_config(None, ["rl.max_new_tokens=80"], chosen=preset, data__path=str(data), data__num_ranks=7)
    (run / "config.toml").write_text(to_toml(config))
    (run / "meta.json").write_text("{}")
    own, other, ease = list_sources([str(run), str(folder), "ease"], None)
    assert (own.config.rl.max_new_tokens, own.config.rl.constrain) == (80, "catalog")
    assert (other.config.rl.constrain, other.config.eval.temperature) == ("none", 0.0)
    assert other.config.data.num_ranks == ease.config.data.num_ranks == 7
    assert other.config.data.path == str(data)
    dataset, taught = demonstrations_of(other.config, tmp_path / "taught")
    longest = max(map(len, train_tokenizer(dataset, 2048)([s.completion for s in taught])["input_ids"]))
    assert longest + 1 <= other.config.rl.max_new_tokens
    assert "134.5M parameters" in capsys.readouterr().out
    # A model out of a run folder is scored as that run was.
    (of_run,) = list_sources([str(run / "sft" / "final")], str(data), ["data.num_ranks=7"])
    assert of_run.config.rl.max_new_tokens == 80 and of_run.config.rl.constrain == "catalog"
    of_run, ease = list_sources([str(run / "sft" / "final"), "ease"], None)
    assert of_run.config.data == ease.config.data == config.data  # and on the run's data set


def test_what_the_user_sets_wins(folder, data):
    config, _ = model_settings(
        str(folder), None, ["rl.max_new_tokens=999", "sft.lr=1e-5"], method="grpo", data__path=str(data)
    )
    assert (config.rl.max_new_tokens, config.sft.lr, config.rl.unit) == (999, 1e-5, "token")


def test_a_run_that_has_begun_keeps_what_was_chosen_for_it(folder, data, tmp_path, monkeypatch):
    config, _ = model_settings(str(folder), run_dir=tmp_path, data__path=str(data))
    (tmp_path / "config.toml").write_text(to_toml(config))
    monkeypatch.setattr(fit, "HEADROOM", 3.0)
    again, lines = model_settings(str(folder), run_dir=tmp_path, data__path=str(data))
    assert again == config and lines == [f"settings as chosen in {tmp_path / 'config.toml'}"]
    new, _ = model_settings(str(folder), run_dir=tmp_path / "new", data__path=str(data))
    assert new.rl.max_new_tokens > config.rl.max_new_tokens


@pytest.mark.parametrize(
    ("changes", "near", "sft_lr"),
    [
        ({"hidden_size": 72, "num_hidden_layers": 2}, "tiny", 1.5e-3),
        ({"hidden_size": 1152, "num_attention_heads": 18, "num_key_value_heads": 6}, "qwen2.5-0.5b", 5e-5),
    ],
)
def test_the_nearest_preset_gives_the_learning_rates(changes, near, sft_lr, data, tmp_path):
    config, lines = model_settings(str(make_folder(tmp_path, data, **changes)), data__path=str(data))
    assert f"preset {near}," in lines[0] and config.sft.lr == sft_lr


def test_a_model_of_a_run_keeps_the_format_of_its_lists(data, tmp_path):
    run = tmp_path / "mine"
    (run / "sft" / "final").mkdir(parents=True)
    (run / "meta.json").write_text("{}")
    saved = load_config(None, ["data.num_ranks=5", "model.hidden=32", "rl.max_new_tokens=41", "rl.lr=0.5"])
    (run / "config.toml").write_text(to_toml(saved))
    start = run / "sft" / "final"
    assert run_of(str(start)) == run and run_of(str(tmp_path)) is None
    config, lines = model_settings(None, from_model=str(start))
    assert (config.model.name, config.model.hidden) == ("tiny", 32)
    assert (config.data.num_ranks, config.rl.max_new_tokens, config.rl.constrain) == (5, 41, "none")
    assert config.rl.lr == 1e-4  # the preset's: what a run computes is its own matter
    assert len(lines) == 1 and str(run) in lines[0]
    assert model_settings("tiny", from_model=str(start))[0].data.num_ranks == 20


def test_a_preset_has_its_file(data):
    assert model_settings(None)[0] == load_config(fit.preset_file("tiny"))
    assert model_settings(None)[1] == []


def test_budgets_that_cannot_work_are_refused():
    lengths = Lengths([100, 300], [140] * 98 + [176] * 2, "demonstrations")
    config = Config(data=replace(Config().data, max_prompt_tokens=256), rl=replace(Config().rl, max_new_tokens=176))
    check_lengths(config, lengths, 4096)

    def with_budget(tokens, **rl):
        return replace(config, rl=replace(config.rl, max_new_tokens=tokens, **rl))

    with pytest.raises(
        ConfigError, match="rl.max_new_tokens = 175: 2 of 100 demonstrations .* up to 176 .* set rl.max_new_tokens=224"
    ):
        check_lengths(with_budget(175), lengths, 4096)
    check_lengths(with_budget(80, constrain="catalog"), lengths, 4096)  # held lists are never cut
    drawn = replace(lengths, what="lists of items from the ground truth")
    check_lengths(with_budget(140), drawn, 4096)
    with pytest.raises(ConfigError, match="2 of 100|100 of 100"):
        check_lengths(with_budget(139), drawn, 4096)
    with pytest.raises(
        ConfigError, match="conversation of 256 tokens and a list of 176 .* set data.max_prompt_tokens=224"
    ):
        check_lengths(config, lengths, 400)


def test_lengths_are_chosen_within_the_context():
    lengths = Lengths([100] * 99 + [300], [140] * 98 + [176] * 2, "demonstrations")
    # 1.25 * 176 = 220 -> 224; the 99th of 100 prompts has 100 -> 128.
    assert choose_lengths(lengths, 4096) == {"data.max_prompt_tokens": 128, "rl.max_new_tokens": 224}
    assert choose_lengths(lengths, 330) == {"data.max_prompt_tokens": 106, "rl.max_new_tokens": 224}
    with pytest.raises(ConfigError, match="context is 300 tokens"):
        choose_lengths(lengths, 300)


def test_a_run_counts_what_is_cut(data, folder, tmp_path):
    dataset = load_dataset(str(data), item_format=ItemFormat())
    tokenizer = train_tokenizer(dataset, 2048)
    lengths = sorted(map(len, encode_prompts(tokenizer, dataset.train, 10**6, 5, quiet=True)))
    assert measure(tokenizer, dataset, load_config(None, ["data.num_ranks=5"])).prompts == lengths
    limit = lengths[-10]
    config = load_config(None, [f"data.max_prompt_tokens={limit}", "data.num_ranks=5", "rl.max_new_tokens=500"])
    cut = sum(length > limit for length in lengths)
    (line,) = check_run_lengths(config, dataset, str(folder), None, tmp_path)
    assert 0 < cut <= 9 and f"; {cut} longer ones lose their oldest turns" in line
    assert json.loads((tmp_path / "lengths.json").read_text())["prompts_cut"] == cut
    assert check_run_lengths(config, dataset, str(folder), None, tmp_path) == []


def test_a_run_whose_lists_would_be_cut_is_refused_before_it_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*WORDS, "rl.max_new_tokens=6"]
    with pytest.raises(ConfigError, match=r"rl.max_new_tokens = 6: \d+ of \d+ demonstrations are longer"):
        run_pipeline(load_config(None, words), tmp_path / "run")
    assert not (tmp_path / "run" / "sft").exists()


def test_a_file_says_which_model_its_settings_are_for(folder, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text("[model]\nhidden = 32\nlayers = 2\nheads = 2\nkv_heads = 1\n[rl]\nlr = 3e-5\n")
    config, lines = model_settings(None, file, ["seed=4"], from_model=str(folder))
    assert (config.model.name, config.model.hidden, config.rl.lr, config.seed, lines) == ("tiny", 32, 3e-5, 4, [])


def test_the_command_line_prints_the_choice(folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rankgrpo.pipeline.check_run", lambda *_: None)  # it would open the model, which is a shell
    monkeypatch.setattr(sys, "argv", ["rankgrpo", *run_words("run", folder, data, tmp_path / "run"), "--check"])
    cli.main()
    printed = capsys.readouterr().out
    assert printed.count("\n") == 3 and "preset smollm2-135m" in printed
