"""What vLLM does with exports of the families: held by tests/vllm_engine/test_exports.py, told by docs/models.md."""

# vLLM's attention on CPUs takes heads of 32 channels or more, its routed experts sizes divisible by 32.
SIZES = {
    "hidden_size": 128,
    "n_embd": 128,
    "d_model": 128,
    "word_embed_proj_dim": 128,
    "head_dim": 32,
    "global_head_dim": 32,
    "moe_intermediate_size": 64,
}
# Keys of the published config.json that transformers' configuration does not have and vLLM reads.
PUBLISHED = {"lfm2": {"conv_dim": 128, "block_dim": 128}}
BOUND = 1e-4
# Read, with log-probs within BOUND of the policy's, and again after other weights were sent to the engine.
ALIKE = [
    "gemma2", "granite", "gpt2", "lfm2", "comp_mistral3", "olmo2", "phi3", "comp_gemma3", "cohere2", "mistral_swa16",
    "smollm3", "llama", "qwen3", "gemma3_swa16", "exaone4", "glm4", "starcoder2", "falcon_h1",
    "gemma4_swa16", "qwen2_swa16", "ministral3", "apertus", "qwen3_5",
]  # fmt: skip
# Read as well; vLLM's CPU kernels pack routed experts, so that no other weights can be sent.
PACKED_EXPERTS = ["qwen3_moe", "gpt_oss_swa16", "deepseek_v3", "mixtral"]
