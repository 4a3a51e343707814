#!/usr/bin/env bash
# transformers 5.19.0: Zamba 2 and Nemotron-H give other logits when they generate with their cache than in one forward of
# the same tokens, and say nothing.
#
# Both keep the time step of a Mamba layer at or above `time_step_min` (.001), which Mamba's authors use to draw initial
# weights. The floor stands where many tokens are read at once and is missing where one token follows a cache, so a prompt
# is read with it and every token of the answer without it.
#   Nemotron-H has a setting of its own for such bounds, `time_step_limit`. (0, inf), its default, means no floor; its
#   layers do not read the setting.
#   Bamba, which has the same layer and reads its `time_step_limit`, agrees with itself.
# With initial weights of transformers hardly a step is that short and the gap is that of rounding, so a test of a fresh
# model sees nothing. A trained model has short steps where it holds on to its state. Who trains by reinforcement learning
# samples with the cache and scores without it: two policies under one set of weights. Pull request 48989 of
# transformers, which removes the floor from Nemotron-H, reports what it does to a published model of 30B.
#
# What rankgrpo does: it compares cache and forward when it opens a model and reads these two anew for every token ("no
# cache" in docs/models.md).
#
# Seen with transformers 5.19.0 and 5.24.0 and torch 2.13.0, as the largest gap of a logit (the largest are about 6):
#   the lines at the end of this file. Exits 1 when they change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 "transformers==${TRANSFORMERS:-5.19.0}"
cat > "$folder/show.py" <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

NO_FLOOR = (0.0, float("inf"))
SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
ONLY = {
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "zamba2": {
        "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_d_state": 16, "attention_hidden_size": 128,
        "attention_head_dim": 32, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1, "adapter_rank": 8,
    },
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "head_dim": 16,
        "hybrid_override_pattern": "M*M*", "layers_block_type": None, "time_step_limit": NO_FLOOR,
    },
}  # fmt: skip


@torch.no_grad()
def gap(kind, *, wide=True, floor=True):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **ONLY[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if wide:  # as wide as keeps the size of activations, so that steps differ between tokens
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.3 / parameter.shape[-1] ** 0.5)
    if not floor:
        for module in model.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = NO_FLOOR
    ids_BT = torch.randint(3, 256, (2, 80))
    whole_BTV = model(ids_BT, use_cache=False).logits
    out = model(ids_BT[:, :40], use_cache=True)
    steps = []
    for token in range(40, 80):
        place = {"position_ids": torch.tensor([[token]])} if kind == "bamba" else {}  # which counts from zero, left alone
        out = model(ids_BT[:, token : token + 1], past_key_values=out.past_key_values, use_cache=True, **place)
        steps.append(out.logits)
    return (torch.cat(steps, 1) - whole_BTV[:, 40:]).abs().max().item()


for kind in ONLY:
    gaps = [gap(kind), gap(kind, floor=False), gap(kind, wide=False)]
    print(f"{kind}: {gaps[0]:.2f}, without the floor {gaps[1]:.2f}, with initial weights {gaps[2]:.2f}")
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/show.py" 2>/dev/null | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
bamba: 0.00, without the floor 0.00, with initial weights 0.00
zamba2: 0.16, without the floor 0.00, with initial weights 0.00
nemotron_h: 0.03, without the floor 0.00, with initial weights 0.00
SEEN
