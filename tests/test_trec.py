import math
from collections import defaultdict

import pytest

from rankgrpo.data.samples import Sample, Turn
from rankgrpo.errors import ConfigError, DataError
from rankgrpo.evaluation.compare import evaluate_models
from rankgrpo.evaluation.evaluate import score_completions
from rankgrpo.evaluation.trec import write_trec
from rankgrpo.items.catalog import Catalog, Item

CATALOG = Catalog(Item(f"Film {letter}", 1990 + place) for place, letter in enumerate("ABCDEFGH"))
K = 6


def sample(name, *truth, weights=()):
    return Sample(name, (Turn("user", "?"),), (), tuple(truth), weights=weights)


A, B, C, D = (("Film A", 1990), ("Film B", 1991), ("Film C", 1992), ("Film D", 1993))
UNKNOWN = ("Nowhere", 1999)
SAMPLES = [
    sample("a hit/twice", A, B),
    sample("short", C),
    sample("nothing", D),
    sample("unlisted", A, UNKNOWN),
    sample("all six and one line more", A, B),
]
TEXTS = [
    "Film A (1990)\nFilm A (1990)\nFilm H (1997)\nFilm B (1991)",
    "Film B (1991)\nFilm C (1992)",
    "",
    "what is this\nNowhere (1999)\nNowhere (1999)\nFilm A (1990)",
    "\n".join(f"Film {letter} ({1990 + place})" for place, letter in list(enumerate("ABCDEFGH"))[7:0:-1]),
]


def written(folder, samples, texts):
    evaluation = score_completions(samples, texts, CATALOG, num_ranks=K, cutoffs=(3,))
    write_trec(folder, evaluation, samples, CATALOG, name="model", num_ranks=K)
    return evaluation


def read(folder):
    """{query: {document: gain}}, {query: {document: score}}, as the TREC tools read them."""
    qrels, run = defaultdict(dict), defaultdict(dict)
    for line in (folder / "qrels").read_text().splitlines():
        query, _, document, gain = line.split(" ")
        qrels[query][document] = int(gain)
    for line in (folder / "model.run").read_text().splitlines():
        query, q0, document, rank, score, name = line.split(" ")
        assert (q0, name) == ("Q0", "model") and document not in run[query]
        assert int(score) == K + 1 - int(rank) > 0
        run[query][document] = float(score)
    return dict(qrels), dict(run)


def test_the_files(tmp_path):
    written(tmp_path, SAMPLES[:2], TEXTS[:2])
    assert (tmp_path / "qrels").read_text().splitlines() == [
        "a%20hit%2Ftwice 0 item0 1",
        "a%20hit%2Ftwice 0 item1 1",
        "short 0 item2 1",
    ]
    assert (tmp_path / "model.run").read_text().splitlines() == [
        "a%20hit%2Ftwice Q0 item0 1 6 model",
        "a%20hit%2Ftwice Q0 rank2 2 5 model",
        "a%20hit%2Ftwice Q0 item7 3 4 model",
        "a%20hit%2Ftwice Q0 item1 4 3 model",
        "short Q0 item1 1 6 model",
        "short Q0 item2 2 5 model",
    ]


GRADED = [sample("graded", A, B, C, weights=(3.0, 1.0, 2.0)), sample("plain", D)]
GRADED_TEXTS = ["Film B (1991)\nFilm C (1992)\nFilm B (1991)", "Film A (1990)\nFilm D (1993)"]


@pytest.mark.parametrize(("samples", "texts"), [(SAMPLES, TEXTS), (GRADED, GRADED_TEXTS)])
def test_the_definition_gives_our_scores_from_the_files(samples, texts, tmp_path):
    evaluation = written(tmp_path, samples, texts)
    qrels, run = read(tmp_path)
    assert list(qrels) == list(run) and len(run) == len(samples)
    for place, query in enumerate(run):
        order = sorted(run[query], key=run[query].get, reverse=True)
        best = sorted(qrels[query].values(), reverse=True)
        for k in (3, K):
            dcg = sum(qrels[query].get(document, 0) / math.log2(j + 2) for j, document in enumerate(order[:k]))
            ideal = sum(gain / math.log2(j + 2) for j, gain in enumerate(best[:k]))
            assert evaluation.metrics[f"ndcg@{k}"][place].item() == pytest.approx(dcg / ideal, abs=1e-12)
            found = sum(document in qrels[query] for document in order[:k]) / len(best)
            assert evaluation.metrics[f"recall@{k}"][place].item() == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize(("samples", "texts"), [(SAMPLES, TEXTS), (GRADED, GRADED_TEXTS)])
def test_pytrec_eval_gives_our_scores(samples, texts, tmp_path):
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pip install pytrec-eval-terrier")
    evaluation = written(tmp_path, samples, texts)
    qrels, run = read(tmp_path)
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {f"ndcg_cut.3,{K}", f"recall.3,{K}"}).evaluate(run)
    for place, query in enumerate(run):
        for k in (3, K):
            assert theirs[query][f"ndcg_cut_{k}"] == pytest.approx(evaluation.metrics[f"ndcg@{k}"][place].item())
            assert theirs[query][f"recall_{k}"] == pytest.approx(evaluation.metrics[f"recall@{k}"][place].item())


def test_gains_that_qrels_cannot_hold(tmp_path):
    with pytest.raises(DataError, match="'graded': Film A has the gain 0.5, but qrels hold whole numbers"):
        written(tmp_path, [sample("graded", A, weights=(0.5,))], ["Film A (1990)"])


def test_the_command_writes_them(tmp_path):
    options = {"data": "demo", "split": "test", "num_samples": 4, "out": tmp_path, "trec": tmp_path}
    with pytest.raises(ConfigError, match="add --set eval.draws=1"):
        evaluate_models(["popularity"], **options, overrides=["eval.temperature=1", "eval.draws=2"])
    with pytest.raises(ValueError, match="num_samples must be at least 0 .all., got -4"):
        evaluate_models(["popularity"], **options | {"num_samples": -4})
    evaluate_models(["popularity"], **options)
    lines = (tmp_path / "popularity.run").read_text().splitlines()
    assert len(lines) == 4 * 20 and len({line.split(" ")[0] for line in lines}) == 4
    assert (tmp_path / "qrels").is_file()
