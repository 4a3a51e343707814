#!/usr/bin/env bash
# implicit 0.7.3: its precision@k can be 1 where most of what is recommended is wrong, and its recommend() hands out the items
# that it was told to filter.
#
# implicit.evaluation documents "P@K". It divides the hits of all users together by the sum of min(K, withheld items of the
# user): lists of three that hit one user's only item and one of another's two have 2 / (1 + 2), not the mean of 1/3 and 1/3.
# With one item withheld a user (leave-one-out) the figure is the hit rate, K times the precision. So it does not fall with
# K, and cannot be set beside precision of any other library.
# recommend(..., filter_already_liked_items=True) puts the liked items last instead of leaving them out. They come back
# where N is more than what is left, which a small catalog or a busy user brings about. ALS marks them with a score of
# -3.4e38; from the nearest neighbours they have 0. Where a user's items have no neighbours but each other, the nearest
# neighbours hand out the filtered items and nothing else.
#
# What rankgrpo does: docs/metrics.md defines its measures and what a short list earns; its baselines leave out what a
# conversation has named and shorten the list (rankgrpo/baselines/ranking.py).
#
# Seen: the lines at the end of this file. Exits 1 when they change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check implicit==0.7.3 scipy==1.17.1 numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import numpy as np
from implicit.cpu.als import AlternatingLeastSquares
from implicit.evaluation import ranking_metrics_at_k
from implicit.nearest_neighbours import CosineRecommender
from scipy.sparse import csr_matrix

train = csr_matrix(np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 1, 1]], np.float32))
test = csr_matrix(np.array([[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]], np.float32))
users = np.arange(4)
models = {
    "ALS": AlternatingLeastSquares(factors=4, random_state=0, iterations=5, num_threads=1),
    "cosine": CosineRecommender(K=5, num_threads=1),
}
for name, model in models.items():
    model.fit(train, show_progress=False)
    listed, _ = model.recommend(users, train, N=3, filter_already_liked_items=True)
    hits = [len(set(items) & set(test[user].indices)) for user, items in zip(users, listed)]
    theirs = ranking_metrics_at_k(model, train, test, K=3, show_progress=False, num_threads=1)["precision"]
    print(f"{name}: hits in three {hits}, precision@3 is {np.mean(hits) / 3:.3f}, implicit's {theirs:.3f}")
    items, scores = model.recommend(0, train[0], N=6, filter_already_liked_items=True)
    liked = [(int(item), f"{score:.3g}") for item, score in zip(items, scores) if item in train[0].indices]
    print(f"{name}: of the liked items 0, 1, 2, filtered, come back", *(f"{item} ({score})" for item, score in sorted(liked)))
apart = csr_matrix(np.array([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]], np.float32))
model = CosineRecommender(K=2, num_threads=1)
model.fit(apart, show_progress=False)
items, _ = model.recommend(0, apart[0], N=3, filter_already_liked_items=True)
print("cosine: who likes 0 and 1, which are near no other, is recommended", *sorted(items.tolist()))
PY
OPENBLAS_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore "$folder/show.py" 2>/dev/null | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
ALS: hits in three [1, 2, 1, 1], precision@3 is 0.417, implicit's 1.000
ALS: of the liked items 0, 1, 2, filtered, come back 0 (-3.4e+38) 1 (-3.4e+38) 2 (-3.4e+38)
cosine: hits in three [1, 2, 1, 1], precision@3 is 0.417, implicit's 1.000
cosine: of the liked items 0, 1, 2, filtered, come back 0 (0) 1 (0) 2 (0)
cosine: who likes 0 and 1, which are near no other, is recommended 0 1
SEEN
