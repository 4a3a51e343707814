"""Every family: log-probs and gradients, sampler and export against transformers' eager forward, a row at a time.

A handful runs with every `make test`, all variants with `pytest -m "families or not families" tests/test_families.py`.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from against_eager import (
    CONFIG,
    assert_as_its_own_forward,
    assert_same_gradients,
    eager_logprobs,
    example_groups,
    gradients,
    reload,
    save,
)
from model_families import FAST, VARIANTS, make_tokenizer
from tiny_world import ALONE, tiny_config
from transformers import AutoModelForCausalLM

from rankgrpo.config import AdapterConfig
from rankgrpo.errors import ConfigError, ModelError
from rankgrpo.model.policy import open_policy, with_paths
from rankgrpo.sampler import verify
from rankgrpo.sampler.verify import switches, verify_policy

NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.families) for name in VARIANTS]
# What cannot be packed; everything else is.
DENSE = {
    "bloom", "deepseek_v32", "deepseek_v4", "doge", "falcon", "falcon_mamba", "glm_moe_dsa", "hy_v4", "jamba", "llama4",
    "mamba", "minimax", "minimax_m3_blocks", "nemotron", "recurrent_gemma", "stablelm",
}  # fmt: skip
RECURRENT = {
    "bamba", "comp_qwen3_5", "falcon_h1", "falcon_h1_mult1", "granitemoehybrid", "kimi_linear", "lfm2", "lfm2_moe",
    "mamba2", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_next", "zamba2",
}  # fmt: skip
ROW_BY_ROW = {"phi3_longrope"}
OWN_CACHE = DENSE | RECURRENT | ROW_BY_ROW | {"diffllama", "hrm_text"}
# Whose own scan differs by 1e-4 between chunks of 16 and of 64 tokens.
COARSE = {"comp_qwen3_5", "qwen3_5_moe"}
REFUSED = {"llama_dynamic_rope", "phimoe"}
UNCACHED = {"nemotron_h", "phi3_longrope", "zamba2"}
NO_LINEAR = {"gpt2", "gpt2_attn0", "gpt2_nodrop"}
NOT_RECOMPUTED = {"jetmoe"}  # transformers recomputes none of its layers


@pytest.fixture(autouse=True)
def nothing_said_yet():
    verify._said.clear()


@pytest.mark.parametrize("name", NAMES)
def test_family(name, tmp_path, capsys):
    save(name, tmp_path / "model")
    policy = open_policy(tmp_path / "model", CONFIG.model, ALONE.device)
    if name in REFUSED:
        with pytest.raises(ModelError, match="nothing computes"):
            verify_policy(policy, CONFIG)
        return
    policy = verify_policy(policy, CONFIG)
    said = capsys.readouterr().out
    assert policy.paths.packing == ("padded" if name in DENSE else "alone" if name in ROW_BY_ROW else "shared")
    assert ("cannot be packed exactly" in said) == (name in DENSE | ROW_BY_ROW)
    assert ("lists are sampled" in said) == (policy.paths.decoding != "grouped") == (name in OWN_CACHE)
    assert (policy.paths.decoding == "uncached") == (name in UNCACHED)

    assert_as_its_own_forward(
        policy,
        tmp_path / "model",
        tmp_path / "export",
        atol=2e-4 if name in COARSE else 1e-4,
        as_drawn=name in ROW_BY_ROW,  # past the rope switch a text's first tokens have another log-prob
        left_out=".visual." if name == "comp_qwen3_5" else None,
    )


@pytest.mark.parametrize("name", [case for case, name in zip(NAMES, VARIANTS, strict=True) if name not in REFUSED])
def test_family_with_adapters_and_recomputed_layers(name, tmp_path):
    """Log-probs are those of the exported model's own forward, gradients those of one row at a time."""
    save(name, tmp_path / "model")
    recomputed = f"model.gradient_checkpointing={name not in NOT_RECOMPUTED}".lower()
    config = tiny_config("data.max_prompt_tokens=60", recomputed)
    kind = AdapterConfig("lora", rank=2, alpha=4.0) if name not in NO_LINEAR else AdapterConfig()
    policy = verify_policy(open_policy(tmp_path / "model", config.model, ALONE.device, adapter=kind), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in policy.model.named_parameters():
            if "lora_B" in key:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    policy.export(tmp_path / "export", ALONE)
    groups = example_groups()
    _, logp_BT = policy.logprobs(groups)
    want_BT = eager_logprobs(reload(tmp_path / "export"), groups, policy.allowed_V).detach()
    torch.testing.assert_close(logp_BT, want_BT, rtol=0, atol=2e-4 if name in COARSE else 1e-4)
    weight_BT = torch.randn(logp_BT.shape, generator=generator)
    got = gradients(policy.model, (logp_BT * weight_BT).sum())
    rows = with_paths(policy, replace(policy.paths, packing="alone", attention="eager"))
    want = gradients(rows.model, (rows.logprobs(groups)[1] * weight_BT).sum())
    assert any("lora_A" in key for key in got) == (name not in NO_LINEAR)
    assert_same_gradients(got, want)


def test_a_family_nobody_knows_is_caught(tmp_path, monkeypatch):
    """A layer that looks one token back, outside attention and without a cache: no name and no key tells."""
    save("llama", tmp_path / "model")
    policy = open_policy(tmp_path / "model", CONFIG.model, ALONE.device)
    norm = policy.model.model.norm
    monkeypatch.setattr(
        norm,
        "forward",
        lambda x, forward=norm.forward: forward(x + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, : x.shape[1]]),
    )
    with pytest.raises(ModelError, match="off by"):
        verify_policy(policy, tiny_config("data.max_prompt_tokens=60", "model.attention=shared"))
    verified = verify_policy(policy, CONFIG)
    assert verified.paths.packing == "padded" and verified.paths.decoding == "uncached"


@pytest.mark.parametrize("kind", ["bert", "cpmant"])
def test_a_model_that_reads_ahead_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, kind, (kind, {}))
    save(kind, tmp_path / "model")
    with pytest.raises(ModelError, match=r"is no causal language model: log-probs of tokens change by \d"):
        verify_policy(open_policy(tmp_path / "model", CONFIG.model, ALONE.device), CONFIG)


def test_an_encoder_that_was_made_causal_is_exact(tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "bert", ("bert", {"is_decoder": True}))
    save("bert", tmp_path / "model")
    policy = verify_policy(open_policy(tmp_path / "model", CONFIG.model, ALONE.device), CONFIG)
    assert_as_its_own_forward(policy, tmp_path / "model", tmp_path / "export")


def test_a_sampler_that_is_off_is_not_used(tmp_path, monkeypatch, capsys):
    save("llama", tmp_path / "model")
    policy = open_policy(tmp_path / "model", CONFIG.model, ALONE.device)
    monkeypatch.setattr("rankgrpo.sampler.hf.softmax", lambda score, visible, scores: (2 * score).softmax(-1))
    assert verify_policy(policy, CONFIG).paths.decoding == "padded"
    assert "lists are sampled with the model's own cache (off by" in capsys.readouterr().out


def in_bfloat16(folder, how):
    """Computing in bfloat16 under autocast, or from weights that are gathered in it, as a split model is."""
    policy = replace(open_policy(folder, CONFIG.model, ALONE.device), bfloat16=True)
    if how == "autocast":
        return policy
    policy.model.bfloat16()
    return replace(policy, sharding=SimpleNamespace(parallel=ALONE))


@pytest.mark.parametrize("how", ["autocast", "gathered"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss_swa16", "lfm2", "olmoe"])
def test_rounding_in_bfloat16_is_no_fault(name, how, tmp_path):
    save(name, tmp_path / "model")
    verified = verify_policy(in_bfloat16(tmp_path / "model", how), CONFIG, sampled=False)
    assert verified.paths.packing == "shared"


@pytest.mark.parametrize("how", ["autocast", "gathered"])
@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_log_probs_that_are_off_by_more_than_rounding_are_caught_in_bfloat16(name, how, tmp_path):
    """Logits 15 % too wide: less than one nat at any token, and many times what rounding does to most of them."""
    save(name, tmp_path / "model")
    policy = in_bfloat16(tmp_path / "model", how)
    right = policy.paths.logit_map
    policy = with_paths(policy, replace(policy.paths, logit_map=replace(right, scale=1.15 * right.scale)))
    config = tiny_config("data.max_prompt_tokens=60", "model.attention=shared")
    with pytest.raises(ModelError, match=r"off by 0\.\d+ nats"):
        verify_policy(policy, config, sampled=False)


def test_noise_that_stays_on_in_training_is_named(tmp_path):
    save("llama", tmp_path / "model")
    policy = open_policy(tmp_path / "model", CONFIG.model, ALONE.device)
    policy.model.model.norm.register_forward_hook(
        lambda module, inputs, out: out + 0.1 * torch.randn_like(out) if module.training else out
    )
    with pytest.raises(ModelError, match="in training mode its log-probs change by .* something random stays on"):
        verify_policy(policy, CONFIG)


def test_attention_dense_is_taken_at_its_word_and_counts_its_tokens(tmp_path, capsys):
    save("llama", tmp_path / "model")
    config = tiny_config("model.attention=dense")
    policy = verify_policy(open_policy(tmp_path / "model", config.model, ALONE.device), config)
    assert policy.paths.packing == "padded" and "cannot be packed" not in capsys.readouterr().out
    groups = example_groups()
    pack, _ = policy.logprobs(groups)
    assert pack.tokens_shared == pack.tokens_dense == 3 * 50 + 34 + 2 * 7 + 42 + 22 + 3
    assert policy.micro_batches(groups, 200) == [[0], [1, 2]]


def test_verify_false_looks_at_nothing(tmp_path, monkeypatch):
    save("llama", tmp_path / "model")
    config = tiny_config("model.verify=false")
    policy = open_policy(tmp_path / "model", config.model, ALONE.device)
    monkeypatch.setattr(verify, "plain_logprobs", None)
    assert verify_policy(policy, config) is policy


def test_lengths_of_a_configuration_are_found():
    from model_families import make_config

    assert 32 in switches(make_config("phi3_longrope"))
    assert make_config("qwen3").max_window_layers > 0 and switches(make_config("qwen3")) == [2048]  # its positions
    assert 16 in switches(make_config("llama4"))
    assert switches(make_config("comp_gemma3"))[0] == 16
    assert {2, 16, 32} <= set(switches(make_config("minimax_m3_blocks")))  # two blocks of sixteen tokens


def test_an_export_holds_the_buffers_of_the_file(tmp_path):
    save("deepseek_v3", tmp_path / "model")
    policy = open_policy(tmp_path / "model", CONFIG.model, ALONE.device)
    policy.export(tmp_path / "export", ALONE)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "export"))
    biases = {name: b for name, b in one.named_buffers() if name.endswith("e_score_correction_bias")}
    assert len(biases) == 3 and all(b.any() for b in biases.values())
    assert all(torch.equal(dict(other.named_buffers())[name], b) for name, b in biases.items())


def test_check_refuses_before_anything_is_written(tmp_path):
    from rankgrpo.config_file import load_config
    from rankgrpo.pipeline import check_run

    save("phimoe", tmp_path / "model")
    with pytest.raises(ModelError, match="nothing computes PhimoeForCausalLM as its own forward does"):
        check_run(load_config(None, ["data.num_train=48", f"model.name={tmp_path / 'model'}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_layers_that_cannot_be_recomputed_are_refused(tmp_path):
    save("jetmoe", tmp_path / "model")
    config = tiny_config("model.gradient_checkpointing=true")
    with pytest.raises(ConfigError, match="JetMoeForCausalLM does not.*set model.gradient_checkpointing=false"):
        open_policy(tmp_path / "model", config.model, ALONE.device)


def test_dropout_is_off_in_training_and_said(tmp_path, capsys):
    save("seed_oss_drop", tmp_path / "model")
    policy = open_policy(tmp_path / "model", CONFIG.model, ALONE.device)
    assert {"attention_dropout = 0.1", "residual_dropout = 0.1"} <= set(policy.dropout)
    verify_policy(policy, CONFIG)
    verify_policy(policy, CONFIG)
    assert capsys.readouterr().out.count("set to 0 while training: ") == 1
    groups = example_groups()
    assert torch.equal(policy.logprobs(groups)[1], policy.logprobs(groups)[1])


def test_a_tokenizer_that_loses_line_breaks_is_refused(tmp_path):
    from tokenizers import decoders

    save("llama", tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\n", "")])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="so no list can be written with it"):
        open_policy(tmp_path / "model", CONFIG.model, ALONE.device)


def test_a_head_that_differs_from_a_tied_embedding_is_exported_as_its_own(tmp_path):
    import json

    from safetensors.torch import load_file, save_file

    save("llama_bias", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    policy = open_policy(tmp_path / "model", CONFIG.model, ALONE.device)
    assert torch.equal(policy.model.lm_head.weight, weights["lm_head.weight"])
    policy.export(tmp_path / "export", ALONE)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(reload(tmp_path / "export").lm_head.weight, weights["lm_head.weight"])


def test_the_page_of_models_is_that_of_these_tests():
    from pathlib import Path

    from models_page import page

    assert (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8") == page()
