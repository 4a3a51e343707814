"""Whole runs with the real engine on lists that are not of films: tokens added to a model, candidates to rank."""

import pytest
from test_any_list import OWN, SHORT, passages_to_rank
from test_new_tokens import SIDS, write_semantic_ids

from rankgrpo.config_file import load_config
from rankgrpo.evaluation.recommend import recommend_from
from rankgrpo.pipeline import run_pipeline
from rankgrpo.runtime.tracker import read_metrics

# One head: vLLM's CPU attention knows head sizes from 32 on.
ENGINE = ["rl.sampler=vllm", "model.heads=1", "rl.vllm_memory=0.1"]


def rows_of(folder, *words):
    run_pipeline(load_config(None, [*OWN, *SHORT, *ENGINE, *words]), folder)
    return read_metrics(folder / "rl" / "metrics.jsonl")[0]


def check(rows):
    assert [row["step"] for row in rows][-1] == 2
    for row in rows[1:]:
        assert row["mismatch/abs_logp"] < 1e-4 and row["mismatch/outside_clip_frac"] == 0
    assert rows[-1]["eval/in_catalog_frac"] == 1 and rows[-1]["eval/duplicate_frac"] == 0


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_semantic_ids(tmp_path, capsys, adapter):
    words = write_semantic_ids(tmp_path / "sids")
    check(rows_of(tmp_path / "run", *words, f"adapter.kind={adapter}"))
    capsys.readouterr()
    recommend_from(str(tmp_path / "run"), None, f"I have {SIDS[3]}.", None)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 5 and all(line[4:6] == "+ " and line[6:] in SIDS for line in shown)


def test_passages_to_rank(tmp_path):
    words = passages_to_rank(tmp_path / "passages")
    check(rows_of(tmp_path / "run", f"data.path={tmp_path / 'passages'}", *words))
