#!/usr/bin/env bash
# ranx 0.3.21, ir-measures 0.4.3 and pytrec-eval-terrier 0.5.11 score a ranked list that names a document twice as if its
# first place were not there, and say nothing.
#
# All three take a mapping from document to score, so whoever makes it of a list, best first, keeps the last of the places.
#   repeat  a list of twenty lines names the one right document in the first and in the last: NDCG@20 is .2314 with all
#           three, 1 / log2(20), for nineteen documents are left and the right one is their last. Read by rank it is 1.
#   ties    two documents share the highest score, the right one first: ranx keeps the order in which they are given, the
#           other two put the greater document id first (.6309 = 1 / log2(3))
# Language models repeat lines, so this decides which of two models looks better.
#
# What rankgrpo does: docs/metrics.md says what counts. `rankgrpo evaluate --export trec` writes a document of its own for a
# repeat and scores that fall by rank, so that all three give its own scores.
#
# Seen: the lines at the end of this file. Exits 1 when they change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  ranx==0.3.21 ir-measures==0.4.3 pytrec-eval-terrier==0.5.11 "pandas<3" numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import ir_measures
import pytrec_eval
import ranx
from ir_measures import nDCG

QRELS = {"q": {"right": 1}}


def scores(run, qrels=QRELS):
    theirs = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), "ndcg@20")
    measured = ir_measures.calc_aggregate([nDCG @ 20], qrels, run)[nDCG @ 20]
    trec = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.20"}).evaluate(run)
    return " ".join(f"{value:.4f}" for value in (theirs, measured, trec["q"]["ndcg_cut_20"]))


documents = ["right", *(f"other{rank}" for rank in range(2, 20)), "right"]
print("repeat", scores({"q": {document: 20.0 - rank for rank, document in enumerate(documents)}}))
print("ties", scores({"q": {"right": 9.0, "wrong": 9.0, "other": 5.0}}))
PY
"$folder/venv/bin/python" -W ignore "$folder/show.py" 2>/dev/null | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
repeat 0.2314 0.2314 0.2314
ties 1.0000 0.6309 0.6309
SEEN
