"""What vLLM does with exports of the families: held by tests/vllm_engine/test_exports.py, told by docs/models.md."""

TRIED_WITH = "vLLM 0.32.0 on a CPU in float32"
# vLLM's attention on CPUs takes heads of 32 channels or more.
SIZES = {
    "hidden_size": 128,
    "n_embd": 128,
    "d_model": 128,
    "word_embed_proj_dim": 128,
    "head_dim": 32,
    "global_head_dim": 32,
}
BOUND = 5e-5
# Read, with log-probs within BOUND of the policy's, and again after an update was sent to the engine.
ALIKE = (
    "cohere", "exaone4", "gemma2", "gemma3_swa16", "glm4", "gpt2", "granite", "llama", "ministral3",
    "mistral_swa16", "olmo2", "phi3", "qwen3", "smollm3", "starcoder2",
)  # fmt: skip
FAST = ("gemma2", "gpt2", "olmo2")
"""Also in `make test-vllm`; olmo2 is one of those for which vLLM runs transformers' own class."""
# Read, with log-probs within BOUND, by an engine that cannot be sent an update; how the refusal goes.
READ_ONLY = {
    "falcon_h1": "decay of this model's Mamba layers",
    "gpt_oss_swa16": "packs routed experts",
    "mixtral": "packs routed experts",
    "qwen3_moe": "packs routed experts",
}
# Computed by vLLM otherwise than by transformers, and why.
UNLIKE = {
    "apertus": "two numbers of its activation are kept in bfloat16",
    "cohere2": "its windows are a token longer",
}
# Not started by vLLM, and why.
NOT_STARTED = {"qwen2_swa16": "Sliding window for some but all layers is not supported"}
