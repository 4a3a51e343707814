import pytest
from tiny_world import tiny_dataset

from rankgrpo.data import load
from rankgrpo.data.conversation import read_conversation
from rankgrpo.data.samples import DataError, Turn
from rankgrpo.evaluation.recommend import format_list, recommend, recommend_from
from rankgrpo.items.catalog import Catalog, Item
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
        recommend(None, None, None, None, conversation=text, batch=None)


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
