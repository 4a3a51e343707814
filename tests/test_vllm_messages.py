"""What users meet before vLLM runs, without vLLM."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from model_families import make_config, make_model, make_tokenizer
from transformers import Gemma3Config, GPT2Config, Qwen2Config, Qwen2Model

import rankgrpo.sampler.vllm as vllm_module
from rankgrpo.cli import main
from rankgrpo.config_file import load_config
from rankgrpo.errors import SamplingError
from rankgrpo.pipeline import check_run
from rankgrpo.sampler.choose import choose_sampler
from rankgrpo.sampler.vllm import GIB, EngineConfig, cache_bytes_a_list, explain_start, import_vllm, vllm_installed
from rankgrpo.sampler.vllm_classes import plain_options, shared_classes
from rankgrpo.sampler.vllm_trie import PINNED

# Qwen2.5-0.5B: 24 layers, 2 key-value heads of 64.
MODEL = Qwen2Config(
    hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, architectures=["Qwen2X"]
)
ENGINE = EngineConfig(max_tokens=3072, dtype=torch.bfloat16)


def pretend(monkeypatch, version: str | None) -> types.ModuleType | None:
    """A package vllm of this version, or one that cannot be imported."""
    monkeypatch.setattr(vllm_module, "vllm_installed", lambda: True)
    package = None
    if version is not None:
        package = types.ModuleType("vllm")
        package.__version__ = version
    monkeypatch.setitem(sys.modules, "vllm", package)
    return package


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "kept")  # so that what import_vllm sets is undone


def test_not_installed(monkeypatch):
    monkeypatch.setattr(vllm_module, "vllm_installed", lambda: False)
    with pytest.raises(SamplingError, match=r"not installed: pip install 'rankgrpo\[vllm\]'.*or set rl.sampler=hf"):
        import_vllm()


def test_a_run_that_asks_for_it_fails_before_it_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_module, "vllm_installed", lambda: False)
    command = ["rankgrpo", "run", "--check", "--run-dir", str(tmp_path / "run"), "--set", "rl.sampler=vllm"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="rl.sampler = vllm, and vLLM is not installed"):
        main()


def check_of(name, folder, monkeypatch):
    """`run --check` of a small model of a family, with vLLM, on a machine without a GPU."""
    monkeypatch.setattr("rankgrpo.pipeline.device_here", lambda: torch.device("cpu"))
    make_model(name).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    words = ["data.num_train=48", f"model.name={folder / 'model'}", "rl.sampler=vllm"]
    check_run(load_config(None, words), folder / "run")
    assert not (folder / "run").exists()


def test_a_check_asks_vllm_about_the_model(monkeypatch, tmp_path):
    refusal = "Model architectures ['LlamaForCausalLM'] are not supported for now. Supported architectures: ..."
    asked = []

    class Args:
        def __init__(self, *, model, **options):
            asked.append(json.loads((Path(model) / "config.json").read_text())["architectures"])

        def create_model_config(self):
            if refuses:
                raise ValueError(refusal)

    package = pretend(monkeypatch, "0.33.0")
    package.EngineArgs = Args
    refuses = False
    check_of("llama", tmp_path, monkeypatch)
    refuses = True
    with pytest.raises(SamplingError, match="does not know the model architecture LlamaForCausalLM; set rl.sampler"):
        check_of("llama", tmp_path, monkeypatch)
    assert asked == [["LlamaForCausalLM"]] * 2


def test_a_check_refuses_routed_experts_on_a_cpu(monkeypatch, tmp_path):
    pretend(monkeypatch, "0.33.0")
    with pytest.raises(SamplingError, match=r"packs routed experts \(model.layers.mlp.experts\).*set rl.sampler=hf"):
        check_of("gpt_oss_swa16", tmp_path, monkeypatch)


def test_an_engine_is_held_to_the_plainer_of_its_ways():
    options = {name: plain_options(make_config(name), on_gpu=True) for name in ("llama", "gpt_oss_swa16", "mixtral")}
    assert options == {"llama": {}} | dict.fromkeys(("gpt_oss_swa16", "mixtral"), {"moe_backend": "triton"})
    whole = {name: plain_options(make_config(name), on_gpu=False) for name in ("llama", "gemma2", "mixtral")}
    assert whole == dict.fromkeys(whole, {"enable_chunked_prefill": False})
    assert not any(plain_options(make_config(name), on_gpu=False) for name in ("lfm2", "bamba", "qwen3_5", "falcon_h1"))


def test_a_class_that_vllm_rewrites_serves_it_and_the_trainer(monkeypatch):
    """As vLLM's decorator does: models that it builds run its call, the trainer's, older and newer, their own."""
    package = pretend(monkeypatch, "0.33.0")
    package.config = types.ModuleType("vllm.config")
    package.config.get_current_vllm_config_or_none = lambda: building
    monkeypatch.setitem(sys.modules, "vllm.config", package.config)
    kind = type("Decoder", (Qwen2Model,), {})
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2)
    older, init = kind(config), kind.__init__
    ids = torch.tensor([[1, 2]])

    def engine_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.do_not_compile = building

    building = "vLLM"
    with shared_classes(torch.nn.ModuleList([older])):
        kind.__init__, kind.__call__ = engine_init, lambda self, *_, **__: self.do_not_compile
        engines = kind(config)
    building = None
    for trainers in (older, kind(config)):
        assert trainers(ids).last_hidden_state.shape == (1, 2, 8)
    assert engines(ids) == "vLLM"
    building = "vLLM again"
    assert kind(config)(ids) == "vLLM again"


def test_a_folder_named_vllm_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "vllm").mkdir()
    before = vllm_installed()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert vllm_installed() == before


@pytest.mark.parametrize("version", ["0.24.2", "0.34.0", "1.0.0"])
def test_versions_that_nobody_tried(monkeypatch, version):
    pretend(monkeypatch, version)
    message = rf"vLLM {version} is not one .*\(0.25 to 0.33\): pip install vllm=={PINNED}"
    with pytest.raises(SamplingError, match=message):
        import_vllm()


@pytest.mark.parametrize("version", ["0.25.0", "0.32.0+cpu", "0.33.0rc1"])
def test_versions_that_are_known(monkeypatch, version):
    pretend(monkeypatch, version)
    assert import_vllm().__version__ == version


def test_a_broken_installation_names_both_versions_of_torch(monkeypatch):
    pretend(monkeypatch, None)
    monkeypatch.setattr(vllm_module.importlib.metadata, "requires", lambda name: ["numpy", "torch==2.12.0"])
    monkeypatch.setattr(vllm_module.importlib.metadata, "version", lambda name: "0.31.0")
    with pytest.raises(SamplingError, match=r"cannot be imported.*vllm 0.31.0 needs torch==2.12.0, installed is torch"):
        import_vllm()


def test_cache_of_a_list_by_hand():
    # keys and values x 24 layers x 2 heads x 64 x 2 bytes = 12,288 bytes a token
    assert cache_bytes_a_list(MODEL, ENGINE) == 12_288 * 3072
    # the text model of a multimodal one; GPT-2 has as many key heads as heads, 12 of 64 in 12 layers
    assert cache_bytes_a_list(Gemma3Config(text_config={"num_hidden_layers": 2}), ENGINE) == 2 * 2 * 4 * 256 * 2 * 3072
    assert cache_bytes_a_list(GPT2Config(), ENGINE) == 2 * 12 * 12 * 64 * 2 * 3072


def test_messages_say_what_to_change(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * GIB, 80 * GIB))
    crowded = explain_start("Free memory on device cuda:0 (20/80 GiB) is less", "0.32.0", MODEL, ENGINE, True)
    assert "rl.vllm_memory = 0.4 of the GPU's 80.0 GiB, and 20.0 GiB are free" in crowded
    assert "set rl.vllm_memory=0.23" in crowded
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (GIB, GIB))
    small = explain_start("No available memory for the cache blocks.", "0.32.0", MODEL, ENGINE, True)
    assert "(0.04 GiB): set rl.vllm_memory=0.52, or make lists or prompts shorter" in small
    unknown = explain_start("Model architectures ['Qwen2X'] are not supported for now.", "0.32.0", MODEL, ENGINE, True)
    assert unknown == "vLLM 0.32.0 does not know the model architecture Qwen2X; set rl.sampler=hf"
    checked = "1 validation error for VllmConfig\n  Value error, heads must be divisible [type=value_error]\n"
    message = explain_start(checked, "0.33.0", MODEL, ENGINE, True)
    assert message == "vLLM 0.33.0 did not start: heads must be divisible [type=value_error]"
    assert explain_start("", "0.33.0", MODEL, ENGINE, True) == "vLLM 0.33.0 did not start: no reason given"
    assert explain_start("one\ntwo", "0.33.0", MODEL, ENGINE, False) == "vLLM 0.33.0 did not start: one"


def test_auto_is_vllm_on_a_gpu_that_has_it(monkeypatch):
    import rankgrpo.sampler.choose as choose

    monkeypatch.setattr(choose, "vllm_installed", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert choose_sampler("auto", torch.device("cuda")) == "vllm"
    assert choose_sampler("auto", torch.device("cpu")) == "hf"
    assert choose_sampler("vllm", torch.device("cpu")) == "vllm"
    assert choose_sampler("hf", torch.device("cuda")) == "hf"
    monkeypatch.setattr(choose, "vllm_installed", lambda: False)
    assert choose_sampler("auto", torch.device("cuda")) == "hf"
