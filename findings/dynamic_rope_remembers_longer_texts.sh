#!/usr/bin/env bash
# transformers 5.19.0 and 5.24.0: with rope_type "dynamic" the log-probs of a text depend on what the model read before.
#
# Dynamic NTK scaling widens the rotary base with the length of the text, once that is beyond max_position_embeddings. The
# module that computes it keeps the base of the longest text it has seen, and goes back only when a text comes that fits
# max_position_embeddings. So a text of 40 tokens, with a limit of 32, has other log-probs after one of 80 tokens than
# before it, by several nats with random weights, and its own again after one of 10. No call is at fault and none says so.
# In a batch every row has the base of the longest, and under a cache earlier keys keep the base they were made with.
# Whoever compares old and new log-probs of a policy compares two models, by the order in which texts were scored; a
# teacher's perplexities depend on the shuffle. "longrope", which also switches by length, and "yarn" do not remember.
#
# What rankgrpo does: a run that can pass max_position_embeddings of such a model is refused when the model is opened
# (model.verify); one that cannot computes as with the plain rope.
#
# Seen with transformers 5.19.0 and 5.24.0 and torch 2.13.0, as the largest gap of a log-prob to the first reading: the
# lines at the end of this file. Exits 1 when they change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 "transformers==${TRANSFORMERS:-5.24.0}"
cat > "$folder/show.py" <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROPES = {
    "yarn": {"original_max_position_embeddings": 32},
    "longrope": {"original_max_position_embeddings": 32, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    "dynamic": {},
}


@torch.no_grad()
def gaps(kind):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            rope_parameters={"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **ROPES[kind]},
        )
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=0.2)
    text, longer, short = (torch.randint(100, (1, size)) for size in (40, 80, 10))

    def read(ids):
        return model(input_ids=ids, use_cache=False).logits.log_softmax(-1)

    first = read(text)
    again = read(text)
    read(longer)
    after_longer = read(text)
    read(short)
    return [(seen - first).abs().max().item() for seen in (again, after_longer, read(text))]


for kind in ROPES:
    print("{}: at once {:.2f}, after a longer text {:.2f}, after a short one {:.2f}".format(kind, *gaps(kind)))
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/show.py" 2>/dev/null | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
yarn: at once 0.00, after a longer text 0.00, after a short one 0.00
longrope: at once 0.00, after a longer text 0.00, after a short one 0.00
dynamic: at once 0.00, after a longer text 5.44, after a short one 0.00
SEEN
