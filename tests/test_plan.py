from dataclasses import replace

import pytest
import torch
from model_families import FAST, LAYERS, VARIANTS, make_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from rankgrpo.config import AdapterConfig, Config, ModelConfig, ParallelConfig, RlConfig
from rankgrpo.config_file import load_config, presets_dir
from rankgrpo.errors import ConfigError
from rankgrpo.model.adapter import target_names
from rankgrpo.model.attention import use_shared_prefix
from rankgrpo.model.forward import pack_logprobs
from rankgrpo.model.packing import Group, build_pack
from rankgrpo.model.presets import count_parameters
from rankgrpo.sizing.architecture import PRESETS, Architecture, find_architecture
from rankgrpo.sizing.cli import parse_rates, with_longest_list
from rankgrpo.sizing.overlap import overlap_bytes, overlap_lines
from rankgrpo.sizing.plan import (
    Machine,
    Rates,
    activation_bytes,
    advice,
    engine_bytes,
    group_forward_flops,
    make_plan,
    micro_batch_tokens,
    render,
    state_bytes,
    step_seconds,
)

PAPER = {"qwen2.5-0.5b": 80, "llama3.2-1b": 80, "llama3.2-3b": 141}  # GB of each of its four GPUs
SMALL = Architecture(64, 3, 4, 2, 16, 160, 512, qkv_bias=True)


def preset(name, *overrides):
    return load_config(presets_dir() / f"{name}.toml", list(overrides), model__name=name)


def huggingface(arch, kind="qwen2", tied=True):
    """A model of these sizes, random."""
    sizes = {
        "vocab_size": arch.vocab,
        "hidden_size": arch.hidden,
        "intermediate_size": arch.ffn,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "tie_word_embeddings": tied,
    }
    config, model = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    return model(config(**sizes))


# ----------------------------------------------------------------------------------------------------------------------
# Parameters


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("smollm2-135m", 134_515_008),
        ("qwen2.5-0.5b", 494_032_768),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
    ],
)
def test_parameters_are_those_of_the_model(name, published):
    arch = PRESETS[name]
    with torch.device("meta"):
        model = huggingface(arch, "qwen2" if arch.qkv_bias else "llama")
    assert model.num_parameters() == arch.num_parameters == published
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert sum(p.numel() for p in blocks[0].parameters()) == arch.block_parameters
    assert sum(p.numel() for p in blocks[0].parameters() if p.ndim == 2) == arch.block_matrix_parameters


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_is_read_as_transformers_reads_it(tmp_path, kind, tied):
    with torch.device("meta"):
        model = huggingface(replace(SMALL, head_dim=32 if kind != "qwen2" else 16), kind, tied)
    model.config.save_pretrained(tmp_path)
    assert find_architecture(str(tmp_path), ModelConfig()).num_parameters == model.num_parameters()


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.families) for n in VARIANTS])
def test_any_family_is_counted(tmp_path, name):
    model = make_model(name)
    model.config.save_pretrained(tmp_path)
    arch = find_architecture(str(tmp_path), ModelConfig())
    if name == "comp_qwen3_5":  # transformers opens its text model alone
        model.model.visual = torch.nn.Identity()
    assert arch.num_parameters == count_parameters(model)
    assert arch.layers == LAYERS and 0 < arch.block_matrix_parameters <= arch.block_parameters
    lora = AdapterConfig("lora", rank=3, alpha=6.0)
    if name.startswith("gpt2"):
        with pytest.raises(ConfigError, match="has no Linear layer that an adapter could stand beside"):
            arch.adapter_parameters(lora)
        return
    linear = [model.get_submodule(layer) for layer in target_names(model, lora)]
    assert arch.adapter_parameters(lora) == sum(3 * sum(layer.weight.shape) for layer in linear)


def test_of_experts_a_tokens_share_is_computed_with(tmp_path):
    model = make_model("glm4_moe")
    model.config.save_pretrained(tmp_path)
    arch = find_architecture(str(tmp_path), ModelConfig())
    routed = sum(p.numel() for n, p in model.model.layers.named_parameters() if ".experts." in n)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    assert routed > 0 and arch.block_matrix_parameters == (matrices - routed // 2) // LAYERS  # two of four experts
    assert "weights counted; activations" in render(make_plan("m", arch, preset("qwen2.5-0.5b"), Machine(1, 80)))


def test_tiny_takes_its_sizes_from_the_settings():
    sizes = ModelConfig(hidden=64, layers=3, ffn=160, heads=4, kv_heads=2, vocab=2048)
    assert find_architecture("tiny", sizes) == replace(SMALL, vocab=2048)


def test_adapters_of_layers_that_there_are_not():
    with pytest.raises(ConfigError, match="'c_attn' is none of q_proj, k_proj"):
        SMALL.adapter_parameters(AdapterConfig("lora", targets="q_proj,c_attn"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no preset .* and no folder with a config.json"),
        ("{", "config.json: not valid JSON"),
        ("[]", "holds list, no configuration of a model"),
        ('{"model_type": "no-such"}', "transformers builds no language model from it"),
        ('{"model_type": "vit"}', "transformers builds no language model from it .*vit is no model"),
        ('{"model_type": "llama", "hidden_size": "64"}', "hidden_size, num_hidden_layers, .* must be there"),
    ],
)
def test_models_that_cannot_be_counted(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        find_architecture(str(tmp_path), ModelConfig())


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def saved_bytes(model, autocast):
    """Bytes that a packed forward keeps for backward, weights excluded but for their bfloat16 copies."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (9, 40), generator=generator).tolist()
    pack = build_pack([Group(ids[0] * 3, ids[1:])], torch.device("cpu"))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        pack_logprobs(model, pack).sum()
    return sum(size for _, size in kept.values()), 3 * 40 + 8 * 40


@pytest.mark.parametrize("autocast", [False, True])
def test_activations_are_those_that_a_model_keeps(autocast):
    torch.manual_seed(0)
    model = huggingface(SMALL)
    use_shared_prefix(model)
    measured, tokens = saved_bytes(model, autocast)
    counted = activation_bytes(SMALL, tokens, stream=4, compute=2 if autocast else 4, checkpointing=False)
    copies = 2 * SMALL.num_parameters if autocast else 0
    assert 0.8 < (counted + copies) / measured < 1.25, (counted, copies, measured)


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block():
    model = huggingface(SMALL)
    use_shared_prefix(model)
    inputs = []
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].nbytes))
    _, tokens = saved_bytes(model, False)
    options = {"stream": 4, "compute": 4}
    whole = activation_bytes(SMALL, tokens, **options, checkpointing=False)
    deeper = replace(SMALL, layers=SMALL.layers + 1)
    a_block = activation_bytes(deeper, tokens, **options, checkpointing=False) - whole
    checkpointed = activation_bytes(SMALL, tokens, **options, checkpointing=True)
    assert checkpointed == whole - SMALL.layers * a_block + a_block + sum(inputs)


def test_state_by_hand():
    arch = replace(SMALL, layers=1)
    num = 512 * 64 + 64 * (64 + 32 + 32 + 64) + 64 + 32 + 32 + 3 * 64 * 160 + 2 * 64 + 64
    assert arch.num_parameters == num
    config = Config(rl=RlConfig(kl_coef=1e-3))
    assert state_bytes(arch, config, 1) == {
        "parameters": 4 * num,
        "gradients": 4 * num,
        "optimizer": 8 * num,
        "reference": 4 * num,
    }
    assert sum(state_bytes(arch, config, 4).values()) == 5 * num
    assert sum(state_bytes(arch, replace(config, rl=RlConfig(kl_coef=0.0)), 1).values()) == 16 * num
    whole = replace(config, parallel=ParallelConfig(shard="none"))
    assert sum(state_bytes(arch, whole, 4).values()) == 20 * num
    assert sum(state_bytes(arch, replace(config, parallel=ParallelConfig("full", True)), 4).values()) == 0
    adapted = replace(config, adapter=AdapterConfig("lora", rank=2, targets="q_proj"))
    extra = 2 * (64 + 64)
    expected = {"parameters": 4 * (num + extra), "gradients": 4 * extra, "optimizer": 8 * extra, "reference": 0}
    assert state_bytes(arch, adapted, 1) == expected


def test_adapters_leave_no_gradient_of_the_weights():
    """LoRA of 16 on every layer of the 3B model: one GPU of 80 GB, where training all of it takes four."""
    arch, machine = PRESETS["llama3.2-3b"], Machine(1, 80)
    overrides = ("rl.sampler_rows=96", "rl.vllm_memory=0.35")
    whole = make_plan("x", arch, preset("llama3.2-3b", *overrides), machine)
    lora = make_plan("x", arch, preset("llama3.2-3b", *overrides, "adapter.kind=lora"), machine)
    assert lora.fits and not whole.fits
    assert whole.update["head"] - lora.update["head"] == 4 * arch.vocab * arch.hidden
    split = [make_plan("x", arch, plan.config, Machine(4, 80)).update["working weights"] for plan in (whole, lora)]
    rest = arch.num_parameters - arch.layers * arch.block_parameters
    assert split[0] - split[1] == 2 * (arch.block_parameters + rest) + 4 * rest


def test_keys_and_values_by_hand():
    config = preset("qwen2.5-0.5b")
    # 4 GPUs: 12 prompts of 2048 and 96 lists of 1024 tokens; 24 layers, keys and values of 2 heads of 64, two bytes.
    assert (
        engine_bytes(PRESETS["qwen2.5-0.5b"], config, 4)["keys and values"]
        == (12 * 2048 + 96 * 1024) * 24 * 2 * 128 * 2
    )
    # 1 GPU: no more than sampler_rows = 256 lists at once, of 32 prompts.
    assert (
        engine_bytes(PRESETS["qwen2.5-0.5b"], config, 1)["keys and values"]
        == (32 * 2048 + 256 * 1024) * 24 * 2 * 128 * 2
    )


def test_the_largest_forward_pass_holds_a_whole_group():
    assert micro_batch_tokens(preset("qwen2.5-0.5b")) == 16384
    assert micro_batch_tokens(preset("qwen2.5-0.5b", "rl.token_budget=4096")) == 2048 + 8 * 1024


# ----------------------------------------------------------------------------------------------------------------------
# Time


@pytest.mark.parametrize(("prompt", "tera"), [(300, 2.10), (500, 2.28), (700, 2.47), (1024, 2.78), (2048, 3.81)])
def test_operations_of_a_group(prompt, tera):
    """Eight lists of 230 tokens under Qwen2.5-0.5B, counted by hand elsewhere."""
    assert group_forward_flops(PRESETS["qwen2.5-0.5b"], prompt, 230, 8) / 1e12 == pytest.approx(tera, abs=0.01)


def test_seconds_scale_with_what_causes_them():
    arch, config, rates = PRESETS["qwen2.5-0.5b"], preset("qwen2.5-0.5b"), Rates()
    base = step_seconds(arch, config, 4, rates)
    forward = 12 * group_forward_flops(arch, 700, 230, 8) / (989e12 * 0.25)
    assert base["reference"] == pytest.approx(forward)
    assert base["update"] == pytest.approx(4 * forward)  # with checkpointing the forward is computed twice
    assert step_seconds(arch, config, 2, rates)["update"] == pytest.approx(2 * base["update"])
    twice = preset("qwen2.5-0.5b", "rl.updates_per_batch=2", "rl.kl_coef=0", "model.gradient_checkpointing=false")
    lora = step_seconds(arch, preset("qwen2.5-0.5b", "adapter.kind=lora"), 4, rates)
    assert lora["update"] == pytest.approx(3 * forward)
    changed = step_seconds(arch, twice, 4, rates)
    assert changed["update"] == pytest.approx(6 * forward) and changed["reference"] == 0
    assert changed["sample"] == pytest.approx(base["sample"])
    slow = step_seconds(arch, config, 4, replace(rates, bandwidth_gbs=1e-3))["sample"]
    assert slow > 1e4 * base["sample"]


def test_rates_are_parsed():
    assert parse_rates(["train_mfu=0.5", "list_tokens=100"]) == replace(Rates(), train_mfu=0.5, list_tokens=100.0)
    for word, message in (
        ("speed=1", "expected NAME=NUMBER with a name of prompt_tokens"),
        ("train_mfu=x", "expected a number after ="),
        ("train_mfu=0", "train_mfu must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_rates([word])


# ----------------------------------------------------------------------------------------------------------------------
# Presets and verdict


@pytest.mark.parametrize("name", PAPER)
def test_presets_carry_the_settings_of_the_paper(name):
    config = preset(name)
    rl, sft = config.rl, config.sft
    assert rl.prompts_per_step * rl.group_size == 384 and rl.group_size == 8
    assert (rl.clip_low, rl.clip_high, rl.kl_coef, rl.updates_per_batch) == (0.06, 0.08, 1e-3, 1)
    assert (config.data.max_prompt_tokens, rl.max_new_tokens, config.data.num_ranks) == (2048, 1024, 20)
    assert (rl.unit, rl.returns, rl.reduction, rl.temperature) == ("rank", "exp_inf", "rank", 1.0)
    assert (rl.overflow_penalty, rl.early_eos_penalty, rl.num_epochs, rl.betas) == (-0.1, -0.1, 2.0, (0.9, 0.99))
    assert rl.lr == 1e-6
    if name == "qwen2.5-0.5b":
        assert rl.schedule == "constant"
    else:
        assert (rl.schedule, rl.second_phase_at, rl.second_phase_lr) == ("two-phase", 0.5, 1e-7)
    assert (sft.num_steps, sft.lr, sft.schedule, sft.warmup_frac) == (1500, 5e-5, "cosine", 0.05)
    assert config.model.autocast == "bfloat16" and config.model.gradient_checkpointing


@pytest.mark.parametrize(("name", "memory"), PAPER.items())
def test_presets_fit_on_the_hardware_of_the_paper(name, memory):
    plan = make_plan(name, PRESETS[name], preset(name), Machine(4, memory))
    assert plan.fits and advice(plan) == []
    assert render(plan).endswith("It fits.") and "assumed, not measured" in render(plan)


def test_what_does_not_fit_says_what_would():
    name = "llama3.2-3b"
    plan = make_plan(name, PRESETS[name], preset(name), Machine(1, 80))
    assert not plan.fits and "It does not fit" in render(plan)
    lines = advice(plan)
    assert any(line.startswith("rl.kl_coef=0") for line in lines)
    assert "4 GPUs, parameters split over them" in lines
    assert make_plan(name, PRESETS[name], preset(name), Machine(4, 80)).fits
    assert not make_plan(name, PRESETS[name], preset(name), Machine(2, 80)).fits

    plain = preset(name, "model.gradient_checkpointing=false", "rl.token_budget=65536")
    lines = advice(make_plan(name, PRESETS[name], plain, Machine(4, 80)))
    assert lines[:2] == ["model.gradient_checkpointing=true", "rl.token_budget=10240"]

    hungry = preset("qwen2.5-0.5b", "rl.vllm_memory=0.05")
    lines = advice(make_plan("qwen2.5-0.5b", PRESETS["qwen2.5-0.5b"], hungry, Machine(4, 80)))
    assert len(lines) == 1 and lines[0].startswith("rl.vllm_memory=0.07: vLLM needs 5.")
    (share,) = [word.split("=")[1] for word in lines[0].split(":")[:1]]
    assert make_plan(
        "x", PRESETS["qwen2.5-0.5b"], preset("qwen2.5-0.5b", f"rl.vllm_memory={share}"), Machine(4, 80)
    ).fits

    greedy = preset("llama3.2-1b", "rl.vllm_memory=0.95")
    (line,) = advice(make_plan("x", PRESETS["llama3.2-1b"], greedy, Machine(4, 80)))
    assert "leave too little for the training state" in line
    share = line.partition(":")[0].partition("=")[2]
    assert make_plan("x", PRESETS["llama3.2-1b"], preset("llama3.2-1b", f"rl.vllm_memory={share}"), Machine(4, 80)).fits


def test_impossible_machines():
    with pytest.raises(ValueError, match="gpus must be at least 1"):
        Machine(0, 80)
    with pytest.raises(ValueError, match="prompts_per_step 48 must be a multiple of the number of GPUs 5"):
        make_plan("x", PRESETS["qwen2.5-0.5b"], preset("qwen2.5-0.5b"), Machine(5, 80))


def test_lists_held_to_the_catalog_are_counted_at_the_longest_there_can_be():
    held = with_longest_list(preset("qwen2.5-0.5b", "rl.constrain=catalog"), 700)
    plan, free = (
        make_plan("m", PRESETS["qwen2.5-0.5b"], config, Machine(1, 24))
        for config in (held, preset("qwen2.5-0.5b", "rl.max_new_tokens=700"))
    )
    assert (plan.update, plan.engine, plan.seconds) == (free.update, free.engine, free.seconds)
    assert render(plan) == render(free) and "+ 700 tokens" in render(plan)
    with pytest.raises(ConfigError, match="rl.constrain = catalog: .* give --longest-list, which `rankgrpo data check"):
        with_longest_list(held, None)
    with pytest.raises(ConfigError, match="--longest-list is of lists held to the catalog"):
        with_longest_list(preset("qwen2.5-0.5b"), 700)
    assert with_longest_list(preset("qwen2.5-0.5b"), None) == preset("qwen2.5-0.5b")


def test_the_copy_that_samples_ahead_is_counted():
    config = preset("qwen2.5-0.5b")
    arch = PRESETS["qwen2.5-0.5b"]
    assert overlap_lines(arch, config, 1e9) == []
    ahead = preset("qwen2.5-0.5b", "rl.overlap=true", "model.autocast=none")
    assert overlap_bytes(arch, ahead, 7.0) | {"libraries": 0} == {
        "weights": 4 * arch.num_parameters, "keys and values": 7.0, "libraries": 0,
    }  # fmt: skip
    split = preset("qwen2.5-0.5b", "rl.overlap=true", "model.autocast=bfloat16", "parallel.shard=full")
    assert overlap_bytes(arch, split, 7.0)["weights"] == 2 * arch.num_parameters
    told = render(make_plan("m", arch, ahead, Machine(1, 80)))
    assert "GB of main memory for rl.overlap, beside every training process, " in told and "refused" in told
