#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.19.0: LoRA that names the Linear layers of a shared expert puts its adapters on the routed
# experts instead, and target_modules="all-linear" leaves Linear layers without any.
#
# transformers 5 holds the routed experts of a layer in two parameters. So that adapters trained before can be read, peft
# takes gate_proj, up_proj and down_proj for the names that the routed experts had, and goes by how a target ends. In
# GLM-4.5 (glm4_moe), dots.llm1 and Ernie 4.5 the shared expert and the MLP of the dense first layer really have Linear
# layers of these names.
#   all-linear   attention and routed experts have adapters, dense MLP and shared expert have none
#   full names   of the shared expert of layer 1 alone give adapters of the routed experts of all layers, and none of what was
#                named
#   Qwen2-MoE    which has the same layers, gets what was named
# Training goes on, with most of its trained weights on the experts that were not asked for: rank 4 becomes 4 an expert, 128
# experts a layer in GLM-4.5-Air. All peft says is a warning that a pattern for rank or alpha of gate_up_proj matched nothing.
#
# What rankgrpo does: rankgrpo/model/adapter.py hides the model's type from peft and names every layer in full, so that a
# shared expert has its adapters; docs/models.md says which layers have them. tests/test_adapter.py tries these three.
#
# Seen: the lines at the end of this file. Exits 1 when they change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 "transformers==${TRANSFORMERS:-5.19.0}" peft==0.21.2
cat > "$folder/show.py" <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
    "n_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_layer_start_index": 1, "mlp_only_layers": [0], "pad_token_id": 0,
}  # fmt: skip


def make(kind):
    torch.manual_seed(0)
    known = AutoConfig.for_model(kind).to_dict()
    config = AutoConfig.for_model(kind, **{key: value for key, value in SMALL.items() if key in known})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


for kind in ("qwen2_moe", "glm4_moe", "dots1", "ernie4_5_moe"):
    shared = "shared_expert" if kind == "qwen2_moe" else "shared_experts"
    named = [f"model.layers.1.mlp.{shared}.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
    for name, targets in (("all-linear", "all-linear"), ("full names", named)):
        model = make(kind)
        linear = [key for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
        adapted(torch.arange(3, 12)[None])  # runs
        stem = "base_model.model."
        got = {key.removeprefix(stem).split(".lora_A")[0] for key, _ in adapted.named_modules() if key.endswith(".lora_A")}
        wanted = set(linear) - {"lm_head"} if targets == "all-linear" else set(named)
        routed = sorted(key.split(".")[2] for key in got if key.endswith("mlp.experts"))
        print(
            f"{kind}, {name}: {len(wanted)} Linear layers meant, {len(wanted - got)} of them without adapter;",
            f"routed experts adapted in layers: {' '.join(routed) or 'none'}",
        )
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/show.py" 2>/dev/null | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
qwen2_moe, all-linear: 23 Linear layers meant, 0 of them without adapter; routed experts adapted in layers: none
qwen2_moe, full names: 3 Linear layers meant, 0 of them without adapter; routed experts adapted in layers: none
glm4_moe, all-linear: 21 Linear layers meant, 9 of them without adapter; routed experts adapted in layers: 1 2
glm4_moe, full names: 3 Linear layers meant, 3 of them without adapter; routed experts adapted in layers: 1 2
dots1, all-linear: 21 Linear layers meant, 9 of them without adapter; routed experts adapted in layers: 1 2
dots1, full names: 3 Linear layers meant, 3 of them without adapter; routed experts adapted in layers: 1 2
ernie4_5_moe, all-linear: 21 Linear layers meant, 9 of them without adapter; routed experts adapted in layers: 1 2
ernie4_5_moe, full names: 3 Linear layers meant, 3 of them without adapter; routed experts adapted in layers: 1 2
SEEN
