#!/usr/bin/env bash
# ir-measures 0.4.3: a cutoff turns the order of equally scored documents round for RR and for no other measure, so that
# RR@10 of two documents can be above RR, and above what P@1 of the same call allows.
#
# The package hands each measure to the first of its providers that offers it. pytrec_eval has RR without a cutoff and, as
# trec_eval does, puts the greater document id first where scores are equal. RR with a cutoff goes to the code of MS MARCO,
# for which ir-measures itself sorts the run, with the smaller id first. P, R, Success, AP and nDCG stay with pytrec_eval at
# every cutoff.
#   a is right   RR is 1/2, RR@10 is 1, while P@1 and Success@1 say that the first document is wrong
#   b is right   the other way round
# RR@k is never above RR under one order. Scores are equal where a model gives one grade to many (a judge of five grades, a
# quantised or saturated score), and a table with MRR@10 beside nDCG@10, as is usual, then reads two different rankings.
#
# What rankgrpo does: `rankgrpo evaluate --export trec` writes scores that fall by rank, so that no two are equal;
# docs/metrics.md names both orders.
#
# Seen: the lines at the end of this file. Exits 1 when they change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ir-measures==0.4.3 pytrec-eval-terrier==0.5.11 numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import ir_measures
from ir_measures import RR, P, Success, nDCG

MEASURES = [RR, RR @ 10, RR @ 1, P @ 1, Success @ 1, nDCG @ 10]
RUNS = {"equal scores": {"q": {"a": 1.0, "b": 1.0}}, "a above b": {"q": {"a": 2.0, "b": 1.0}}}
for name, run in RUNS.items():
    for right in "ab":
        measured = ir_measures.calc_aggregate(MEASURES, {"q": {right: 1}}, run)
        print(f"{name}, {right} is right:", ", ".join(f"{measure} {measured[measure]:.2f}" for measure in MEASURES))
PY
"$folder/venv/bin/python" "$folder/show.py" 2>/dev/null | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
equal scores, a is right: RR 0.50, RR@10 1.00, RR@1 1.00, P@1 0.00, Success@1 0.00, nDCG@10 0.63
equal scores, b is right: RR 1.00, RR@10 0.50, RR@1 0.00, P@1 1.00, Success@1 1.00, nDCG@10 1.00
a above b, a is right: RR 1.00, RR@10 1.00, RR@1 1.00, P@1 1.00, Success@1 1.00, nDCG@10 1.00
a above b, b is right: RR 0.50, RR@10 0.50, RR@1 0.00, P@1 0.00, Success@1 0.00, nDCG@10 0.63
SEEN
