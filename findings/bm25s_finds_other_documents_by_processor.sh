#!/usr/bin/env bash
# bm25s 0.3.16 with numpy 2.4.6: which documents are the k best depends on the processor. Scores are the same to the bit,
# the documents are not, wherever some score is shared at the k-th place.
#
# `retrieve` takes the k best with np.argpartition, which for float32 is another algorithm with AVX-512, with AVX2 and
# without either (numpy chooses when it is imported). Which of several equal scores it keeps is left open by its
# documentation and differs between the three. `sorted=True`, the default, orders what was kept; it does not choose again.
# Equal scores are common where documents are short and few words differ: titles of products, songs, questions. Here,
# 4,000 titles of six words from twenty, more than half of the queries get other sets of twenty on another processor; on real
# purchase histories it is enough that a benchmark of "the next item is among BM25's twenty" has another number of rows
# (709, 81 and 673 histories on an AMD machine, 707, 81 and 674 on an Intel one with AVX-512).
# Seeds, pinned versions and PYTHONHASHSEED do not help, and a file of hard negatives or candidates made twice differs.
#
# What rankgrpo does: experiments/domains.py takes the scores of bm25s and sorts them stably, by the catalog's order where
# they are equal, so that the data set is the same everywhere (a test holds its counts).
#
# The same machine shows it with the dispatched code of numpy turned off by NPY_DISABLE_CPU_FEATURES. Needs a processor with
# AVX-512, on which this was seen, or AVX2. Seen: the last lines of this file. Exits 1 when they change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check bm25s==0.3.16 numpy==2.4.6
cat > "$folder/find.py" <<'PY'
import random
import sys

import bm25s
import numpy as np

rng = random.Random(0)
words = "black blue ink paper pen pack 12 printer label white folder letter size box 3 100 binder clip desk tape".split()
titles = [" ".join(rng.choice(words) for _ in range(6)) for _ in range(4000)]
searcher = bm25s.BM25()
searcher.index(bm25s.tokenize(titles, show_progress=False), show_progress=False)
queries = bm25s.tokenize([" ".join(title.split()[:2]) for title in titles[:300]], show_progress=False)
found, scores = searcher.retrieve(queries, k=20, show_progress=False)
stable = np.array([np.argsort(-searcher.get_scores([words[i % 20]]), kind="stable")[:20] for i in range(20)])
np.savez(sys.argv[1], found=found, scores=scores, stable=stable)
PY
python=$folder/venv/bin/python
"$python" "$folder/find.py" "$folder/as-it-is.npz"
NPY_DISABLE_CPU_FEATURES="X86_V3 X86_V4 AVX512_ICL AVX512_SPR" "$python" "$folder/find.py" "$folder/baseline.npz" 2>/dev/null
cat > "$folder/compare.py" <<'PY'
import sys

import numpy as np

one, other = (np.load(path) for path in sys.argv[1:])
differ = sum(set(a) != set(b) for a, b in zip(one["found"], other["found"]))
print("scores of the twenty best equal:", np.array_equal(one["scores"], other["scores"]))
print("more than half of 300 queries find other titles:", differ > 150)
print("scores sorted stably give one order:", np.array_equal(one["stable"], other["stable"]))
PY
"$python" "$folder/compare.py" "$folder/as-it-is.npz" "$folder/baseline.npz" | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
scores of the twenty best equal: True
more than half of 300 queries find other titles: True
scores sorted stably give one order: True
SEEN
