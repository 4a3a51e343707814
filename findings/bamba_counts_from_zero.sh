#!/usr/bin/env bash
# transformers 5.19.0: with a cache and without position_ids, Bamba's forward gives every token position 0, and says
# nothing.
#
# A forward that gets no position_ids makes its own. Bamba numbers the tokens of the call, as if none had been read before;
# Llama, Falcon-H1 and nearly all other decoders of transformers add the length of the cache. Whoever reads a prompt once
# and then a token a call, as loops of one's own for sampling, scoring or speculative decoding do, gets logits of another
# model from Bamba: its attention turns keys by their places in the text and the query by place 0. A loop tested with
# Llama is wrong here without an error, and with initial weights of transformers hardly differs, for attention then is
# nearly uniform.
#
# What rankgrpo does: its own decoding runs on models that it has compared with their plain forward when it opened them; a
# Bamba is sampled by transformers' generate ("own cache" in docs/models.md), which hands over positions.
#
# Seen with transformers 5.19.0 and 5.24.0 and torch 2.13.0, as the largest gap of a logit to one forward of all tokens:
#   the lines at the end of this file. Exits 1 when they change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 "transformers==${TRANSFORMERS:-5.19.0}"
cat > "$folder/show.py" <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
ONLY = {
    "llama": {},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128, "head_dim": 16},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
}


@torch.no_grad()
def gap(kind, *, positions):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **ONLY[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=1.3 / parameter.shape[-1] ** 0.5)
    ids_BT = torch.randint(3, 256, (2, 80))
    whole_BTV = model(ids_BT, use_cache=False).logits
    out = model(ids_BT[:, :40], use_cache=True)
    steps = []
    for token in range(40, 80):
        place = {"position_ids": torch.tensor([[token]])} if positions else {}
        out = model(ids_BT[:, token : token + 1], past_key_values=out.past_key_values, use_cache=True, **place)
        steps.append(out.logits)
    return (torch.cat(steps, 1) - whole_BTV[:, 40:]).abs().max().item()


for kind in ONLY:
    print(f"{kind}: {gap(kind, positions=False):.2f}, with position_ids {gap(kind, positions=True):.2f}")
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/show.py" 2>/dev/null | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
llama: 0.00, with position_ids 0.00
falcon_h1: 0.00, with position_ids 0.00
bamba: 4.13, with position_ids 0.00
SEEN
