import json

import pytest
from tiny_world import tiny_dataset

from rankgrpo.config_file import load_config, to_toml
from rankgrpo.data import load
from rankgrpo.data.conversation import read_conversation
from rankgrpo.data.samples import DataError, Turn
from rankgrpo.errors import ConfigError
from rankgrpo.evaluation.recommend import format_list, recommend, recommend_from
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.items.format import ItemFormat
from rankgrpo.model.presets import make_init
from rankgrpo.model.tiny import TinyConfig


def test_plain_text_is_one_user_turn():
    assert read_conversation("Something like Heat (1995)?\n") == (Turn("user", "Something like Heat (1995)?"),)
    assert read_conversation("one line\nand another") == (Turn("user", "one line and another"),)


def test_speakers_open_turns():
    text = "User: I loved Alien (1979)\nASSISTANT: More space?\nyou: Yes:\nand scary"
    expected = (Turn("user", "I loved Alien (1979)"), Turn("assistant", "More space?"), Turn("user", "Yes: and scary"))
    assert read_conversation(text) == expected


def test_a_colon_alone_is_no_speaker():
    assert read_conversation("My wish: Heat (1995)") == (Turn("user", "My wish: Heat (1995)"),)


@pytest.mark.parametrize("text", ["", "  \n ", "User:"])
def test_no_conversation(text):
    assert read_conversation(text) == ()
    with pytest.raises(DataError, match="no conversation: pass it as an argument, on standard input"):
        recommend(None, None, None, None, conversation=text, batch=None, trained_on=None)


def test_the_cue_of_the_next_speaker_is_no_turn():
    assert read_conversation("User: Heat (1995)?\nAssistant:") == (Turn("user", "Heat (1995)?"),)


def test_marks():
    catalog = Catalog([Item("Heat", 1995)])
    assert format_list("Heat (1995)\n\nNowhere (1999)\nwhat?", catalog).splitlines() == [
        "  1 + Heat (1995)",
        "  2 ? Nowhere (1999)",
        "  3 ! what?",
    ]
    assert format_list("", catalog) == "(an empty list)"


def test_the_demos_catalog_costs_no_conversations(tmp_path, monkeypatch, capsys):
    size = TinyConfig(hidden=32, layers=1, ffn=64, heads=2, kv_heads=1, vocab=1024)
    model = make_init("tiny", tiny_dataset(), tmp_path / "model", seed=0, tiny=size)

    def make_nothing(*_, **__):
        raise AssertionError("the conversations were made")

    monkeypatch.setattr(load, "make_demo", make_nothing)
    recommend_from(model, "demo", "Something like Alien (1979)?", None)
    assert capsys.readouterr().out.strip()


# ----------------------------------------------------------------------------------------------------------------------
# Only prompts that the model was trained under

LABELS = ["[1]", "[2]", "[3]"]


def row(name, **more):
    turns = [{"role": "user", "content": "which is about the sea?"}]
    return {"id": name, "conversation": turns, "seen_titles": [], "groundtruth": [], **more}


def write(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def ask(data, batch, *words):
    """Ask a run trained on `data`; what cannot be asked is refused before there is a policy."""
    config = load_config(None, ["data.item={label}", "data.num_ranks=2", "rl.constrain=catalog", *words])
    catalog = load.load_catalog(data, ItemFormat("{label}"))
    text = "hello" if batch is None else None
    recommend(None, None, catalog, config, conversation=text, batch=batch, trained_on=str(data))


@pytest.fixture
def passages(tmp_path):
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", row("a", candidates=LABELS), row("b", candidates=LABELS))
    return tmp_path


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (None, [], "of this model show candidates, which a conversation alone does not bring; give --batch FILE.jsonl"),
        ([{}], [], "batch.jsonl:3: sample 'q0' lacks candidates, which the prompts of this model show"),
        ([{"candidates": LABELS}, {}], [], "batch.jsonl:4: sample 'q1' lacks candidates"),
        ([{"candidates": LABELS[:1]}], [], "batch.jsonl:3: data.num_ranks = 2: sample 'q0' has 1 candidates, fewer"),
        ([{"candidates": ["[7]", "[1]"]}], [], "batch.jsonl:3: sample 'q0': candidate '[7]' is not in the catalog"),
        (
            [{"candidates": LABELS, "seen_titles": LABELS[1:]}],
            ["rl.forbid=repeats+seen"],
            "sample 'q0' has 3 candidates, 2 of them seen (rl.forbid = repeats+seen), fewer than a list asks for",
        ),
    ],
)
def test_a_model_of_candidates_is_asked_with_candidates(passages, rows, words, message):
    batch = None
    if rows is not None:
        batch = write(passages / "batch.jsonl", *(row(f"q{n}", **more) for n, more in enumerate(rows)))
        batch.write_text("\n\n" + batch.read_text())  # so that a line is not a place
    with pytest.raises((ConfigError, DataError)) as caught:
        ask(passages, batch, *words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (None, "the prompts of this model show the field 'mood', which a conversation alone does not bring"),
        ({"genre": "sad"}, "batch.jsonl:1: sample 'q' lacks the field 'mood', which"),
        ({"mood": "sad", "candidates": LABELS}, "batch.jsonl:1: sample 'q' has candidates, which the prompts of"),
    ],
)
def test_a_prompt_with_fields_is_filled_or_refused(passages, more, message):
    write(passages / "train.jsonl", row("a", candidates=LABELS), row("b"))  # then candidates are no must
    write(passages / "catalog.jsonl", *({"label": label} for label in LABELS))
    batch = None if more is None else write(passages / "batch.jsonl", row("q", **more))
    with pytest.raises(DataError) as caught:
        ask(passages, batch, "data.prompt=Somebody {mood} asks. {context}")
    assert message in str(caught.value)


def test_candidates_are_needed_where_every_training_sample_has_them(passages):
    assert load.needs_candidates(passages)
    assert not load.needs_candidates("demo") and not load.needs_candidates(passages / "nowhere")
    write(passages / "train.jsonl", row("a", candidates=LABELS), row("b", candidates=None))
    assert not load.needs_candidates(passages)


def test_a_model_of_a_run_is_asked_as_its_run_was(tmp_path):
    size = TinyConfig(hidden=32, layers=1, ffn=64, heads=2, kv_heads=1, vocab=1024)
    model = make_init("tiny", tiny_dataset(), tmp_path / "sft" / "final", seed=0, tiny=size)
    (tmp_path / "config.toml").write_text(to_toml(load_config(None, ["data.prompt=Somebody {mood} asks. {context}"])))
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(DataError, match="the prompts of this model show the field 'mood'"):
        recommend_from(model, None, "Something like Alien (1979)?", None)
