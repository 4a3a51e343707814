"""Chat templates in the shape of the published ones: thoughts closed, days pinned, one BOS, no system role."""

import json
from datetime import datetime

import pytest
import transformers.utils.chat_template_utils as chat_templates
from model_families import make_model, make_tokenizer
from tiny_world import tiny_config, tiny_dataset
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from rankgrpo.data.prompt import PromptFormat, encode_prompts
from rankgrpo.data.samples import Sample, Turn
from rankgrpo.errors import ConfigError, ModelError
from rankgrpo.model.constraint import hold_to_catalog
from rankgrpo.model.plain_tokenizer import open_plain_tokenizer
from rankgrpo.model.presets import load_policy, load_tokenizer
from rankgrpo.sampler.base import eos_token_ids

SAMPLE = Sample("a", (Turn("user", "Something like Heat?"),), (), ())
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
GENERATE = "{% if add_generation_prompt %}<|im_start|>assistant\n"
CLOSED = "<think>\n\n</think>\n\n"
TEMPLATES = {
    # Name of the shape -> (template, how a prompt ends).
    "qwen2_5": (CHAT + GENERATE + "{% endif %}", "assistant\n"),
    "qwen3": (
        CHAT + GENERATE + "{% if enable_thinking is defined and enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% endif %}{% endif %}",
        "assistant\n" + CLOSED,
    ),
    "qwen3_5": (
        CHAT + GENERATE + "{% if enable_thinking is defined and enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}",
        "assistant\n" + CLOSED,
    ),
    "r1_distill": (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think>\n{% endif %}",
        "assistant: " + CLOSED,
    ),
    "think_without_break": (CHAT + GENERATE + "<think>{% endif %}", "assistant\n" + CLOSED),
    "seed_oss": (CHAT + GENERATE + "<seed:think>\n{% endif %}", "assistant\n<seed:think>\n\n</seed:think>\n\n"),
    "gpt_oss": (
        "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|start|>assistant<|channel|>final<|message|>",
    ),
    "llama3_2": (
        "{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}"
        "{{ bos_token }}Today Date: {{ date_string }}\n" + CHAT + GENERATE + "{% endif %}",
        "assistant\n",
    ),
    "smollm3": (
        "{% set today = strftime_now('%d %B %Y') %}{{ today }}\n" + CHAT + GENERATE + "{% endif %}",
        "assistant\n",
    ),
}


def tokenizer_with(template, **changes):
    """A tokenizer whose own post-processor adds a BOS, with the marks of the published ones among its tokens."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=False) for mark in ("<think>", "</think>")])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = template
    return tokenizer


def encoded(tokenizer, sample=SAMPLE, **kwargs):
    (ids,) = encode_prompts(tokenizer, [sample], 4000, 20, prompt=PromptFormat(**kwargs))
    return ids


@pytest.fixture
def on_day(monkeypatch):
    """Moves the clock that transformers gives to templates."""

    def move(day):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return day

        monkeypatch.setattr(chat_templates, "datetime", Clock)
        chat_templates._compile_jinja_template.cache_clear()

    return move


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_end_where_a_list_begins_and_are_the_same_on_every_day(name, on_day):
    template, end = TEMPLATES[name]
    tokenizer = tokenizer_with(template)
    prompts, plain = [], []
    for day in (datetime(2025, 3, 1), datetime(2031, 12, 24)):
        on_day(day)
        prompts.append(encoded(tokenizer))
        plain.append(tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False))
    assert prompts[0] == prompts[1]
    text = tokenizer.decode(prompts[0])
    assert text.endswith(end)
    # Where a template asks the clock it is another text without the pin, or nothing was tested.
    assert (plain[0] != plain[1]) == (name in ("gpt_oss", "llama3_2", "smollm3"))
    assert ("2024" in text) == (plain[0] != plain[1])
    assert prompts[0].count(tokenizer.bos_token_id) == template.count("bos_token")
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id  # which it would add by itself


def test_a_closed_thought_has_the_tokens_of_its_text():
    """Not those of the text up to the thought and of its end, which cut the line breaks elsewhere."""
    tokenizer = tokenizer_with(TEMPLATES["qwen3_5"][0])
    tokenizer.add_tokens([AddedToken("\n\n", special=False)])
    assert encoded(tokenizer)[-4:] == tokenizer(CLOSED, add_special_tokens=False)["input_ids"]
    opened = tokenizer_with(TEMPLATES["think_without_break"][0])
    opened.add_tokens([AddedToken("\n\n", special=False)])
    assert encoded(opened)[-4:] == opened(CLOSED, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("key", ["enable_thinking", "thinking"])
def test_a_prompt_that_is_asked_to_end_in_a_thought_is_refused_with_the_key(key):
    tokenizer = tokenizer_with(TEMPLATES["r1_distill"][0])
    with pytest.raises(
        ConfigError, match=rf"with {key} the prompt ends .* set data.chat_template_kwargs='{{\"{key}\": false}}'"
    ):
        encoded(tokenizer, chat_kwargs={key: True})
    # A template that leaves the thought to the model is taken at its word: its list comes after the thought.
    assert (
        tokenizer_with("")
        .decode(encoded(tokenizer_with(TEMPLATES["qwen3"][0]), chat_kwargs={key: True}))
        .endswith("assistant\n" if key == "enable_thinking" else CLOSED)
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT,
            "refuses the prompt .System role not supported.; it may take no system message: leave data.system_prompt",
        ),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves the system message out"),
    ],
)
def test_a_template_without_a_system_role_says_so(template, message):
    tokenizer = tokenizer_with(template)
    assert "Something like Heat?" in tokenizer.decode(encoded(tokenizer))
    with pytest.raises(ConfigError, match=message):
        encoded(tokenizer, system="Be brief.")


def test_lists_held_to_the_catalog_have_no_thoughts():
    config = tiny_config('data.chat_template_kwargs={"enable_thinking": true}', "rl.constrain=catalog")
    with pytest.raises(ConfigError, match="enable_thinking asks for a thought before the list"):
        hold_to_catalog(None, config, tiny_dataset().catalog)


@pytest.mark.parametrize("name", ["llama3_2", "gpt_oss", "qwen3_5"])
def test_an_export_read_without_transformers_writes_the_same_prompts(name, tmp_path):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_with("").backend_tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
    )
    tokenizer.chat_template = TEMPLATES[name][0]
    tokenizer.save_pretrained(tmp_path)
    plain = open_plain_tokenizer(tmp_path)
    assert plain is not None and encoded(plain) == encoded(tokenizer)


def test_the_ends_of_harmony_end_a_list(tmp_path):
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
        "<|message|>{{ m.content }}"
        "{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_with(template)
    ends = ["<|return|>", "<|call|>", "<|end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ends}, replace_extra_special_tokens=False)
    make_model("gpt_oss_swa16").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_policy(str(tmp_path))
    assert tokenizer.eos_token == "<|return|>"
    assert set(tokenizer.convert_tokens_to_ids(ends)) <= set(eos_token_ids(model, tokenizer))


def test_the_tokenizer_is_tried_before_the_weights_are_read(tmp_path, monkeypatch):
    from tokenizers import decoders

    from rankgrpo.model import presets

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\n", "")])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(presets, "model_class", None)  # nothing of the model is touched
    for read in (load_policy, load_tokenizer):
        with pytest.raises(ModelError, match="so no list can be written with it"):
            read(str(tmp_path))
