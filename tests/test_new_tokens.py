"""Tokens added to a model: one id each, rows that begin as the mean, are trained, saved, and off with the adapters."""

import json

import pytest
import torch
from test_any_list import OWN, SHORT, write
from tiny_world import ALONE, taught_dataset, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankgrpo.config import AdapterConfig, ModelConfig
from rankgrpo.config_file import load_config
from rankgrpo.errors import ConfigError, ModelError
from rankgrpo.evaluation.recommend import recommend_from
from rankgrpo.items.catalog import Item
from rankgrpo.items.format import ItemFormat
from rankgrpo.items.lines import make_catalog
from rankgrpo.model.adapter import adapters_off
from rankgrpo.model.new_tokens import ROWS, add_new_tokens, read_new_tokens
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import open_policy
from rankgrpo.model.presets import load_policy, make_init
from rankgrpo.model.tiny import TinyConfig
from rankgrpo.pipeline import run_pipeline
from rankgrpo.runtime.optim import make_optimizer

SIDS = [f"<a_{n // 5}><b_{n % 5}>" for n in range(20)]
SID = ItemFormat("{sid}")
CATALOG = make_catalog([Item(sid, fields=(("sid", sid), ("title", f"Thing {n}"))) for n, sid in enumerate(SIDS)], SID)
TOKENS = ["<a_0>", "<a_1>", "<a_2>", "<a_3>", "<b_0>", "<b_1>", "<b_2>", "<b_3>", "<b_4>"]
SIZE = tiny_config().model
TINY = TinyConfig.of(SIZE)


def test_tokens_are_the_parts_of_a_column_or_the_lines_of_a_file(tmp_path):
    assert read_new_tokens("sid", CATALOG) == TOKENS and read_new_tokens("", CATALOG) == []
    big = make_catalog([Item("x", fields=(("sid", "<a_12><a_2><b_1>"),))], SID)
    assert read_new_tokens("sid", big) == ["<a_2>", "<a_12>", "<b_1>"]
    (tmp_path / "tokens.txt").write_text("<b>\n\n<a>\n<b>\n")
    assert read_new_tokens(str(tmp_path / "tokens.txt"), CATALOG) == ["<b>", "<a>"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("author", "'author' is neither a file nor a column of the catalog; its columns are sid, title"),
        ("title", "the column 'title' of the catalog holds no part such as <a_12>"),
    ],
)
def test_what_names_no_tokens_is_an_error(setting, message):
    with pytest.raises(ConfigError, match=message):
        read_new_tokens(setting, CATALOG)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model from elsewhere, to which the tokens are added."""
    folder = tmp_path_factory.mktemp("models")
    make_init("tiny", taught_dataset(), folder / "plain", seed=0, tiny=TINY)
    return str(folder / "plain")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 40])
def test_new_rows_begin_as_the_mean_and_no_other_moves(start, tied, spare):
    model, tokenizer = load_policy(start)
    before = len(tokenizer)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.config.tie_word_embeddings = False
    if spare:
        model.resize_token_embeddings(before + spare)
    old = [model.get_input_embeddings().weight.detach().clone(), model.get_output_embeddings().weight.detach().clone()]
    add_new_tokens(model, tokenizer, [*TOKENS, tokenizer.convert_ids_to_tokens(300)])
    assert len(tokenizer) == before + 9 and getattr(model.config, ROWS) == [before, before + 9]
    now = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for weight, was in zip(now, old, strict=True):
        assert len(weight) == before + (spare or 9) and torch.equal(weight[:before], was[:before])
        assert torch.allclose(weight[before : before + 9], was[:before].mean(0).expand(9, -1), atol=1e-6)
    assert (now[0] is now[1]) == tied
    ids = tokenizer("\n".join(SIDS), add_special_tokens=False).input_ids
    assert len(ids) == 2 * 20 + 19 and tokenizer.decode(ids, skip_special_tokens=True) == "\n".join(SIDS)


def test_a_model_with_them_is_written_and_found_again(start, tmp_path):
    folder = make_init(start, taught_dataset(), tmp_path / "init", seed=0, new_tokens=TOKENS)
    model, tokenizer = load_policy(folder)
    assert tokenizer("<a_3><b_1>").input_ids == tokenizer.convert_tokens_to_ids(["<a_3>", "<b_1>"])
    assert getattr(model.config, ROWS) == [len(tokenizer) - 9, len(tokenizer)]
    assert make_init(start, taught_dataset(), tmp_path / "init", seed=0, new_tokens=TOKENS) == folder
    with pytest.raises(ModelError, match="made from something else .*new_tokens"):
        make_init(start, taught_dataset(), tmp_path / "init", seed=0, new_tokens=TOKENS[1:])
    assert make_init(start, taught_dataset(), tmp_path / "none", seed=0) == start


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_beside_adapters_the_new_rows_are_trained_and_no_others(start, tmp_path, weight_decay):
    folder = make_init(start, taught_dataset(), tmp_path / "init", seed=0, new_tokens=TOKENS)
    policy = open_policy(folder, ModelConfig(), ALONE.device, adapter=AdapterConfig(kind="lora", rank=2))
    first, end = getattr(policy.model.config, ROWS)
    ids = policy.tokenizer("<a_1><b_2>\n<a_3><b_0>").input_ids
    groups = [Group([5, 6], [ids])]
    with torch.no_grad():
        began = policy.logprobs(groups)[1].clone()
    optimizer = make_optimizer(policy.model, lr=0.1, betas=(0.9, 0.95), weight_decay=weight_decay)
    weight = policy.model.get_input_embeddings().weight
    before = weight.detach().clone()
    for _ in range(2):
        (-policy.logprobs(groups)[1].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(weight[:first], before[:first]) and (weight[first:end] != before[first:end]).any(1).all()
    with torch.no_grad():
        trained = policy.logprobs(groups)[1].clone()
        with adapters_off(policy.model):
            assert torch.equal(policy.logprobs(groups)[1], began)  # the reference is the model as it was
        assert torch.equal(policy.logprobs(groups)[1], trained) and trained.sum() > began.sum() + 1
    policy.export(tmp_path / "out", ALONE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.get_input_embeddings().weight, weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("<a_1>").input_ids == ids[:1]


def write_semantic_ids(folder):
    """Histories of one thing, and what came next; returns the settings of such a set."""
    folder.mkdir()
    write(folder / "catalog.jsonl", [{"sid": sid, "title": f"Thing {n}"} for n, sid in enumerate(SIDS)])
    for split, count in (("train", 24), ("validation", 4), ("test", 4)):
        rows = []
        for n in range(count):
            turns = [{"role": "user", "content": f"I have {SIDS[n % 20]}."}]
            rows.append({"id": f"{split}{n}", "conversation": turns, "seen_titles": [SIDS[n % 20]]})
            rows[-1]["groundtruth"] = [SIDS[(n + 1) % 20]]
        write(folder / f"{split}.jsonl", rows)
    return [f"data.path={folder}", "data.item={sid}", "model.new_tokens=sid", "rl.constrain=catalog"]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_semantic_ids_train_and_are_recommended(tmp_path, capsys, adapter):
    words = write_semantic_ids(tmp_path / "sids")
    run_pipeline(load_config(None, [*OWN, *SHORT, *words, f"adapter.kind={adapter}"]), tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "rl" / "final")
    assert [len(tokenizer(sid).input_ids) for sid in SIDS] == [2] * 20
    assert json.loads((tmp_path / "run" / "rl" / "final" / "config.json").read_text())[ROWS][1] == len(tokenizer)
    capsys.readouterr()
    recommend_from(str(tmp_path / "run"), None, f"I have {SIDS[3]}.", None)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 5 and all(line[4:6] == "+ " and line[6:] in SIDS for line in shown)
