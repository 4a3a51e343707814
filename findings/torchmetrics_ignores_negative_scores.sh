#!/usr/bin/env bash
# torchmetrics 1.9.0: where scores are log-probs, precision, recall, MAP and MRR of retrieval are 0 for a perfect ranking,
# whose NDCG and hit rate are 1.
#
# The four count a right document only if its score is above 0; the other two go by the order alone. Nothing checks the
# scores, which the classes document as a float tensor, and nothing is said. A language model that ranks candidates by their
# log-probs has no score above 0, and that shows. With logits or differences of log-probs some are above 0, and the four are
# off unnoticed: right documents at or below 0 are taken for wrong ones. Adding one constant to all scores, which moves no
# document, changes them.
#
# What rankgrpo does: its measures take hits by rank and no scores (docs/metrics.md).
#
# Seen with torch 2.13.0: the lines at the end of this file. Exits 1 when they change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0
cat > "$folder/show.py" <<'PY'
import torch
from torchmetrics import retrieval

KINDS = ("NormalizedDCG", "HitRate", "Precision", "Recall", "MAP", "MRR")
logp = torch.tensor([-1.0, -2.0, -3.0, -4.0])
right = torch.tensor([1, 1, 0, 0])
query = torch.zeros(4, dtype=torch.long)
for name, scores in (("log-probs", logp), ("probabilities", logp.exp()), ("log-probs + 1.5", logp + 1.5)):
    measured = {kind: getattr(retrieval, f"Retrieval{kind}")(top_k=2)(scores, right, indexes=query).item() for kind in KINDS}
    print(f"{name}:", ", ".join(f"{kind} {value:.2f}" for kind, value in measured.items()))
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/show.py" 2>/dev/null | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
log-probs: NormalizedDCG 1.00, HitRate 1.00, Precision 0.00, Recall 0.00, MAP 0.00, MRR 0.00
probabilities: NormalizedDCG 1.00, HitRate 1.00, Precision 1.00, Recall 1.00, MAP 1.00, MRR 1.00
log-probs + 1.5: NormalizedDCG 1.00, HitRate 1.00, Precision 0.50, Recall 0.50, MAP 1.00, MRR 1.00
SEEN
