"""Small random models of every family that the project is tried with: configurations only, random float32 weights.

`VARIANTS` names them. Every default of transformers' configuration that costs memory is made small by the name of its
key, windows and chunks become shorter than the tests' sequences, and a variant may set more. Weights are wide, and
norms, biases and buffers are moved from their initial values, so that whatever is left out shows.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 288  # a byte-level tokenizer without merges, and rows of the head beyond it
LAYERS = 4
# By the name of the key, wherever a configuration has it.
SMALL = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "n_inner": 96,
    "ffn_dim": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "moe_latent_size": None,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_head_dim": 16,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 16,
    "index_head_dim": 16,
    "index_n_heads": 32,  # with few, scores behind a ReLU tie at 0, and the choice among them depends on the length
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "n_mamba_heads": 8,
    "mamba_head_dim": 16,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "state_size": 16,
    "mamba_dt_rank": 8,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "n_groups": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "sliding_window": 16,
    "max_position_embeddings": 2048,
    "n_positions": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
MAMBA = {"attn_layer_indices": [1, 3]}
SWA = {"layer_types": ["sliding_attention", "full_attention"] * 2}
GLOBAL = {"sliding_window": None}
M3 = ["full_attention", "minimax_m3_sparse"] * 2
BLOCKS = {"index_block_size": 16, "index_topk_blocks": 2}  # sparse from 32 tokens on
MLA = {"head_dim": 8, "num_key_value_heads": 4}
NO_DROP = {
    "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0,
    "embedding_dropout": 0.0, "dropout": 0.0,
}  # fmt: skip
QWEN_SWA = {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}
GEMMA4 = {
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_global_key_value_heads": None,
}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
        "original_max_position_embeddings": 32,
        "factor": 4.0,
    },
    "original_max_position_embeddings": 32,
    "max_position_embeddings": 128,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}  # switches at max_position_embeddings
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
COMPOSED = {"gemma3", "gemma4", "mistral3", "qwen3_5"}

# Name of the variant -> model type of its configuration, and what it sets beside SMALL.
VARIANTS: dict[str, tuple[str, dict]] = {
    "afmoe": ("afmoe", SWA),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "bamba": ("bamba", MAMBA),
    "bitnet": ("bitnet", {}),
    "bloom": ("bloom", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", SWA),
    "cohere2_moe": ("cohere2_moe", {}),
    "comp_gemma3": ("gemma3", SWA),
    "comp_gemma4": ("gemma4", GEMMA4),
    "comp_mistral3": ("mistral3", {}),
    "comp_qwen3_5": ("qwen3_5", HYBRID),
    "cwm": ("cwm", {}),
    "deepseek_v2": ("deepseek_v2", MLA),
    "deepseek_v3": ("deepseek_v3", MLA),
    "deepseek_v32": ("deepseek_v32", MLA),
    "deepseek_v4": ("deepseek_v4", {}),
    "diffllama": ("diffllama", {}),
    "doge": ("doge", {"keep_window_size": 16}),
    "dots1": ("dots1", GLOBAL),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": ("ernie4_5_moe", {}),
    "exaone4": ("exaone4", SWA),
    "exaone4_4096": ("exaone4", {**SWA, "sliding_window": 4096}),
    "exaone_moe": ("exaone_moe", {}),
    "falcon": ("falcon", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "falcon_h1": ("falcon_h1", {"lm_head_multiplier": 0.4, "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9]}),
    "falcon_h1_mult1": ("falcon_h1", {}),
    "falcon_mamba": ("falcon_mamba", {}),
    "flex_olmo": ("flex_olmo", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}),
    "gemma3_swa16": ("gemma3_text", {**SWA, "query_pre_attn_scalar": 16}),
    "gemma3_swa512": ("gemma3_text", {**SWA, "sliding_window": 512}),
    "gemma3n": ("gemma3n_text", {**SWA, "activation_sparsity_pattern": None}),
    "gemma4_512": ("gemma4_text", {**GEMMA4, "sliding_window": 512}),
    "gemma4_kvshare512": ("gemma4_text", {**GEMMA4, "sliding_window": 512, "num_kv_shared_layers": 2}),
    "gemma4_swa16": ("gemma4_text", GEMMA4),
    "gemma4_unified": ("gemma4_unified_text", {}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4_moe": ("glm4_moe", {}),
    "glm4_moe_lite": ("glm4_moe_lite", MLA),
    "glm_moe_dsa": ("glm_moe_dsa", MLA),
    "gpt2": ("gpt2", {}),
    "gpt2_attn0": ("gpt2", {"attn_pdrop": 0.0}),
    "gpt2_nodrop": ("gpt2", NO_DROP),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_oss_swa16": ("gpt_oss", SWA),
    "gpt_oss_swa512": ("gpt_oss", {**SWA, "sliding_window": 512}),
    "granite": ("granite", {"logits_scaling": 3.0, "attention_multiplier": 0.2, "embedding_multiplier": 2.0}),
    "granite_moe": ("granitemoe", {"logits_scaling": 3.0, "attention_multiplier": 0.2}),
    "granite_moe_shared": ("granitemoeshared", {}),
    "granite_moe_swa": ("granitemoe_swa", {}),
    "granite_scale1": ("granite", {"attention_multiplier": 0.25}),
    "granite_swa": ("granite_swa", {}),
    "granitemoehybrid": ("granitemoehybrid", {"layer_types": ["mamba", "attention"] * 2, "attention_multiplier": 0.2}),
    "granitemoehybrid_attn": (
        "granitemoehybrid",
        {"layer_types": ["attention"] * LAYERS, "attention_multiplier": 0.2, "logits_scaling": 3.0},
    ),
    "helium": ("helium", {}),
    "hrm_text": ("hrm_text", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {}),
    "hy_v3": ("hy_v3", {}),
    "hy_v4": ("hy_v4", {}),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 0.5, "attention_multiplier": 0.2}),
    "jais2": ("jais2", {}),
    "jamba": (
        "jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    "jetmoe": ("jetmoe", {}),
    "kimi_linear": (
        "kimi_linear",
        {**HYBRID, "num_key_value_heads": 4, "num_experts_per_token": 2, "linear_head_dim": 16},
    ),
    "laguna": ("laguna", {}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    "lfm2_moe": ("lfm2_moe", {"layer_types": ["conv", "full_attention"] * 2}),
    "llama": ("llama", {}),
    "llama4": ("llama4_text", {"attention_chunk_size": 16, "no_rope_layers": [1, 1, 1, 0], "layer_types": None}),
    "llama_bias": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama_dynamic_rope": ("llama", {"max_position_embeddings": 32, "rope_parameters": DYNAMIC}),
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 16, "expand": 2}),
    "mellum": ("mellum", {}),
    "mimo_v2_flash": ("mimo_v2_flash", {"layer_types": SWA["layer_types"]}),
    "minicpm3": ("minicpm3", MLA),
    "minimax": ("minimax", {}),
    "minimax_m2": ("minimax_m2", {}),
    "minimax_m3": ("minimax_m3_vl_text", {"index_n_heads": 2, "layer_types": M3}),
    "minimax_m3_blocks": ("minimax_m3_vl_text", {"index_n_heads": 2, "layer_types": M3, **BLOCKS}),
    "ministral": ("ministral", {}),
    "ministral3": ("ministral3", GLOBAL),
    "mistral_swa16": ("mistral", {}),
    "mistral_swa4096": ("mistral", {"sliding_window": 4096}),
    "mixtral": ("mixtral", GLOBAL),
    "modernbert_decoder": ("modernbert-decoder", {"local_attention": 16}),
    "nanochat": ("nanochat", {}),
    "nemotron": ("nemotron", {}),
    "nemotron_h": ("nemotron_h", {"hybrid_override_pattern": "M*E-", "layers_block_type": None}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", SWA),
    "olmo3_4096": ("olmo3", {**SWA, "sliding_window": 4096}),
    "olmo_hybrid": ("olmo_hybrid", HYBRID),
    "olmoe": ("olmoe", {}),
    "opt": ("opt", {"dropout": 0.0}),
    "phi": ("phi", {}),
    "phi3": ("phi3", GLOBAL),
    "phi3_longrope": ("phi3", {**GLOBAL, **LONGROPE}),
    "phi3_swa16": ("phi3", {}),
    "phimoe": ("phimoe", GLOBAL),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_swa16": ("qwen2", QWEN_SWA),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_5": ("qwen3_5_text", HYBRID),
    "qwen3_5_moe": ("qwen3_5_moe_text", HYBRID),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_next": ("qwen3_next", HYBRID),
    "recurrent_gemma": ("recurrent_gemma", {}),
    "seed_oss": ("seed_oss", {}),
    "seed_oss_drop": ("seed_oss", {"attention_dropout": 0.1}),
    "seed_oss_nodrop": ("seed_oss", NO_DROP),
    "seed_oss_resdrop": ("seed_oss", {"attention_dropout": 0.0, "residual_dropout": 0.1}),
    "smollm3": ("smollm3", {}),
    "solar_open": ("solar_open", {}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {**GLOBAL, **NO_DROP}),
    "starcoder2_drop": ("starcoder2", {**GLOBAL, "residual_dropout": 0.1, "embedding_dropout": 0.1}),
    "starcoder2_swa16": ("starcoder2", NO_DROP),
    "vaultgemma": ("vaultgemma", {"sliding_window": 4096, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}),
    "youtu": ("youtu", MLA),
    "zamba2": ("zamba2", {"layers_block_type": ["mamba", "hybrid"] * 2, "use_mamba_kernels": False}),
}
FAST = ("llama", "qwen2_swa16", "granite", "gemma2", "gpt_oss_swa16", "deepseek_v3", "lfm2", "gpt2")
"""Variants of the fast tests; `-m families` runs all."""


def make_config(name: str, sizes: dict | None = None):
    """The small configuration of a variant; `sizes` replace those of SMALL."""
    model_type, changes = VARIANTS[name]
    sizes = SMALL | (sizes or {})
    if model_type in COMPOSED:
        text_type = {"mistral3": "ministral3"}.get(model_type, f"{model_type}_text")
        text = _small(text_type, changes, sizes).to_dict()
        default = AutoConfig.for_model(model_type)
        vision = {**_vision(model_type, default).to_dict(), **VISION, "depth": 1, "num_heads": 2}
        vision["out_hidden_size"] = sizes["hidden_size"]
        tokens = {key: 270 + i for i, key in enumerate(sorted(default.to_dict())) if key.endswith("token_id")}
        return AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **tokens)
    return _small(model_type, changes, sizes)


def _vision(model_type: str, default):
    return default.vision_config or AutoConfig.for_model(f"{model_type}_vision")


def _small(model_type: str, changes: dict, sizes: dict):
    known = AutoConfig.for_model(model_type).to_dict()
    settings = {key: value for key, value in sizes.items() if key in known} | changes
    return AutoConfig.for_model(model_type, **settings)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, after the three special ones that SMALL names."""
    special = ["<pad>", "<s>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = (
        "{{ '<s>' }}{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>", chat_template=template
    )


@torch.no_grad()
def make_model(name: str, seed: int = 0, sizes: dict | None = None) -> PreTrainedModel:
    """A random float32 model of a variant, in evaluation mode, with eager attention."""
    torch.manual_seed(seed)
    config = make_config(name, sizes)
    kind = AutoModelForImageTextToText if VARIANTS[name][0] in COMPOSED else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=1.3 / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for key, buffer in model.named_buffers():
        if key.endswith("bias") and buffer.is_floating_point():  # routers add one to their scores
            buffer.add_(0.1 * torch.randn_like(buffer))
    return model
