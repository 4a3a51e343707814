import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_world import WORDS, tiny_config, tiny_dataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rankgrpo.config_file import load_config
from rankgrpo.data.prompt import encode_prompts
from rankgrpo.evaluation import recommend as module
from rankgrpo.evaluation.recommend import recommend_from
from rankgrpo.items.format import title_line
from rankgrpo.model.decoder import Shape, open_decoder, read_shape
from rankgrpo.model.plain_tokenizer import open_plain_tokenizer
from rankgrpo.model.presets import make_init, save_policy
from rankgrpo.model.tiny import TinyConfig, train_tokenizer

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 1100,
    "initializer_range": 0.4,
}
ROPE = {"rope_theta": 500.0, "rope_type": "default"}
# As config.json says it.
CONFIG = Qwen2Config(**SIZES, rope_parameters=ROPE, tie_word_embeddings=True).to_diff_dict()
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_parameters=ROPE, rms_norm_eps=1e-3)),
    "qwen2-untied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=10, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=ROPE)),
    "llama-biased": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(tiny_dataset(), 1024)


def export(name, tokenizer, folder):
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias") or "norm" in key:  # zeros and ones would hide one that is left out
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    save_policy(model, tokenizer, folder)
    return model


def causal(layer, query, key, value, mask, *, scaling, grouped_cache):
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


@pytest.mark.parametrize("name", MODELS)
def test_the_forward_pass_is_that_of_transformers(name, tokenizer, tmp_path):
    model = export(name, tokenizer, tmp_path)
    decoder, _ = open_decoder(tmp_path)
    decoder.attend = causal
    ids = torch.randint(0, 1000, (3, 37), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids)
        hidden = decoder(
            ids, position_ids=torch.arange(37)[None], use_cache=False, grouped_cache=None
        ).last_hidden_state
        logits = decoder.get_output_embeddings()(hidden)
    torch.testing.assert_close(logits, expected.logits, atol=2e-5, rtol=2e-5)
    assert expected.logits.std() > 0.1


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma2"},
        {"hidden_act": "gelu"},
        {"use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_parameters": None},
        {"pretraining_tp": 2},
        {"logit_scale": 0.5},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_configuration_that_asks_for_more_is_declined(change):
    assert read_shape(CONFIG) is not None
    assert read_shape(CONFIG | change) is None


def test_what_a_configuration_says():
    expected = Shape("qwen2", layers=3, heads=6, kv_heads=2, head_dim=8, eps=1e-6, rope_theta=500.0, tied=True)
    assert read_shape(CONFIG) == expected


def test_tensors_of_another_model_are_declined(tokenizer, tmp_path):
    export("qwen2", tokenizer, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.layers.0.self_attn.sinks": torch.zeros(6)}, file)
    assert open_decoder(tmp_path) is None
    tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, file)
    assert open_decoder(tmp_path) is None


@pytest.mark.parametrize("key", ["tokenizer_class", "backend", "add_bos_token", "extra_special_tokens", "eos_token"])
def test_a_tokenizer_that_needs_more_is_declined(key, tokenizer, tmp_path):
    export("qwen2", tokenizer, tmp_path)
    assert open_plain_tokenizer(tmp_path) is not None
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {key: "LlamaTokenizer"}))
    assert open_plain_tokenizer(tmp_path) is None


def test_the_tokenizer_writes_and_reads_as_that_of_transformers(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    plain, full = open_plain_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    samples = tiny_dataset().train[:20]
    assert encode_prompts(plain, samples, 200, 5) == encode_prompts(full, samples, 200, 5)
    texts = [title_line(item.title, item.year) for item in tiny_dataset().catalog.items]
    texts += ["Amélie (2001)\n Solaris\u2028(1972)", "<|im_end|> typed by a user", "  two  blanks\t", "e\u0301 !?"]
    ids = plain(texts, add_special_tokens=False)["input_ids"]
    assert ids == full(texts, add_special_tokens=False)["input_ids"]
    for row in ids:
        for skip in (True, False):
            expected = full.decode(row, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert plain.decode(row, skip_special_tokens=skip) == expected
    assert (len(plain), plain.get_vocab()) == (len(full), full.get_vocab())
    assert (plain.eos_token_id, plain.pad_token_id) == (full.eos_token_id, full.pad_token_id)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose model is its first."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    size = TinyConfig(hidden=32, layers=2, ffn=64, heads=2, kv_heads=1, vocab=1024)
    make_init("tiny", tiny_dataset(), folder / "init", seed=0, tiny=size, num_ranks=5)
    words = [word for word in WORDS if word.startswith("data.")]
    (folder / "config.toml").write_text(_toml(words))
    return folder


def _toml(words):
    from rankgrpo.config_file import to_toml

    return to_toml(load_config(None, [*words, "eval.temperature=1.0", "eval.draws=4"]))


@pytest.mark.parametrize("constrain", ["catalog", "none"])
def test_a_run_recommends_the_same_with_transformers_and_without(constrain, run, monkeypatch, capsys):
    words = [f"rl.constrain={constrain}"]
    asked = "Something like Alien (1979)?"
    opened = []
    monkeypatch.setattr(module, "plain_sampler", _noting(module.plain_sampler, opened))
    recommend_from(str(run), "demo", asked, None, words)
    plain = capsys.readouterr().out
    assert len(opened) == 1
    monkeypatch.setattr(module, "needs_no_engine", lambda config: False)
    recommend_from(str(run), "demo", asked, None, words)
    assert plain == capsys.readouterr().out and plain.strip() and len(opened) == 1


def test_a_list_held_to_the_catalog_is_greedy_unless_told_otherwise(run, capsys):
    def shown(*words):
        recommend_from(str(run), "demo", "Something like Alien (1979)?", None, words)
        return capsys.readouterr().out

    held = "rl.constrain=catalog"
    assert shown(held) == shown(held, "eval.temperature=0", "eval.draws=1") != shown(held, "eval.temperature=1")
    assert shown("rl.constrain=none") == shown("rl.constrain=none", "eval.temperature=1")


def _noting(function, calls):
    def noted(*args):
        calls.append(args)
        return function(*args)

    return noted


def test_a_folder_that_is_declined_is_opened_with_transformers(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    file = folder / "init" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": "gelu"}))
    monkeypatch.setattr(module, "plain_sampler", None)
    recommend_from(str(folder), "demo", "Something like Alien (1979)?", None, ["rl.constrain=catalog"])
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_the_samplers_need_no_engine_only_where_the_run_has_none(monkeypatch):
    assert module.needs_no_engine(tiny_config())
    assert not module.needs_no_engine(tiny_config("rl.sampler=vllm"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not module.needs_no_engine(tiny_config())
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not module.needs_no_engine(tiny_config())
