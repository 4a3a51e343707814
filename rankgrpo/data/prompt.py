"""From a sample to the token ids of its prompt: a template, the paper's by default, inside the model's chat template.

Placeholders of a template: `{context}` (a line `USER: ...` or `SYSTEM: ...` a turn), `{num_ranks}`, `{seen}` (titles
already mentioned, with commas between), `{candidates}` (a line each), `{noun}`, `{nouns}`, `{form}` (how an item is
written) and any field of the samples' own.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from tqdm import tqdm

from rankgrpo.config import DataConfig
from rankgrpo.data.samples import Sample, Turn
from rankgrpo.errors import ConfigError
from rankgrpo.files.template import PLACEHOLDER, placeholders, prompt_text
from rankgrpo.items.format import FILM_TEMPLATE, ItemFormat
from rankgrpo.thoughts import MARKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Appendix D.1 of the paper, word for word for 20 ranks and movies: models trained elsewhere with it stay comparable.
PROMPT = (
    "Pretend you are a {noun} recommender system.\n"
    "I will give you a conversation between a user and you (a recommender system). Based on the conversation, you need "
    "to reply with {num_ranks} recommendations. List the standardized English title of each {noun} in each line in the "
    'form of "{noun} name" (release_year) with NO extra words or sentences.\n'
    "Here is the conversation: {context}"
)
ITEM_PROMPT = (
    "Pretend you are a {noun} recommender system.\n"
    "I will give you a conversation between a user and you (a recommender system). Based on the conversation, you need "
    "to reply with {num_ranks} recommendations. List each {noun} in a line of its own in the form of {form} with NO "
    "extra words or sentences.\n"
    "Here is the conversation: {context}"
)
CANDIDATES_PROMPT = (
    "Pretend you are a {noun} recommender system.\n"
    "I will give you candidate {nouns}, and a conversation between a user and you (a recommender system). Based on the "
    "conversation, you need to reply with the {num_ranks} best candidates, the best first, each in a line of its own "
    "in the form of {form} with NO extra words or sentences.\n"
    "Here are the candidates:\n{candidates}Here is the conversation: {context}"
)
SPEAKERS = {"user": "USER", "assistant": "SYSTEM"}
OWN_PLACEHOLDERS = ("context", "num_ranks", "seen", "candidates", "noun", "nouns", "form")

# Llama 3's chat template writes today's date into the prompt unless told one; a prompt must not change overnight.
TEMPLATE_DATE = "26 Jul 2024"
TEMPLATE_DAY = datetime(2024, 7, 26)  # for templates that ask the clock themselves, as gpt-oss's does
CLOCK = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")
OPEN_THOUGHT = re.compile(rf"({'|'.join(map(re.escape, MARKS))})\s*$")
THINKING_KEYS = ("enable_thinking", "thinking")
"""Keys by which templates are told that the model thinks first."""
HARMONY_HEADER, HARMONY_ANSWER = "<|start|>assistant", "<|channel|>final<|message|>"
"""How gpt-oss's prompt ends, which leaves the channel to the model, and the channel of its answers."""

LENGTHS_FILE = "lengths.json"  # of a run folder: how long its prompts and lists are, and what is cut
ENCODED_AT_ONCE = 512  # prompts a call of the tokenizer, which spreads them over the cores


@dataclass(frozen=True)
class PromptFormat:
    """How a sample is put to a model. Made from the settings by `open_prompt`."""

    item_format: ItemFormat = field(default_factory=ItemFormat)
    template: str = ""
    """Empty: the paper's, or where items are no films or a sample has candidates, words that say the same of these."""
    noun: str = ""
    """What an item is; empty: movie for films, else item."""
    nouns: str = ""
    """Several of them; empty: the noun with an s."""
    system: str = ""
    """System prompt; empty: none."""
    chat_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the tokenizer's chat template."""
    source: str = "data.prompt"
    """What the template is called in messages."""

    def template_of(self, sample: Sample) -> str:
        """The template that a sample's prompt is made from, nouns and form filled in."""
        by_default = PROMPT if self.item_format.is_film else ITEM_PROMPT
        template = self.template or (CANDIDATES_PROMPT if sample.candidates else by_default)
        return _fill(template, self._words)

    @cached_property
    def _words(self) -> dict[str, str]:
        noun = self.noun or ("movie" if self.item_format.is_film else "item")
        form = PLACEHOLDER.sub(lambda match: match[1], self.item_format.template)
        return {"noun": noun, "nouns": self.nouns or f"{noun}s", "form": form}

    def words(self, template: str) -> str:
        """A text with `{noun}`, `{nouns}` and `{form}` filled in."""
        return _fill(template, self._words)

    def text(self, sample: Sample, num_ranks: int) -> str:
        """The user message."""
        values = {
            **dict(sample.fields),
            "context": format_context(sample.conversation),
            "num_ranks": str(num_ranks),
            "seen": ", ".join(sample.seen_titles),
            "candidates": "".join(f"{candidate}\n" for candidate in sample.candidates),
        }
        return _fill(self.template_of(sample), values)

    def messages(self, sample: Sample, num_ranks: int) -> list[dict[str, str]]:
        """The chat: the system prompt, if there is one, and the user message."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.text(sample, num_ranks)}]

    def fixed_lines(self, num_ranks: int, samples: Iterable[Sample] = ()) -> list[str]:
        """The lines and pieces of lines that are the same in the prompts of these samples, each once."""
        templates = dict.fromkeys([self.template_of(s) for s in samples] or [self.template_of(_NOBODY)])
        filled = (_fill(template, {"num_ranks": str(num_ranks)}) for template in templates)
        return list(dict.fromkeys(p for text in filled for p in PLACEHOLDER.sub("\n", text).split("\n") if p))

    def missing_fields(self, sample: Sample) -> list[str]:
        """The fields of samples that the template names and this sample does not have."""
        fields = dict(sample.fields)
        return [name for name in self._fields if name not in fields]

    @cached_property
    def _fields(self) -> tuple[str, ...]:
        return tuple(name for name in placeholders(self.template) if name not in OWN_PLACEHOLDERS)

    @cached_property
    def shows_candidates(self) -> bool:
        """Whether the prompt of a sample with candidates shows them."""
        return not self.template or "candidates" in placeholders(self.template)

    def check(self, samples: Iterable[Sample]) -> None:
        """Raise ConfigError for a template without the conversation, for a placeholder that is none, or that a sample
        has no field for, and for candidates that the template does not show."""
        if not self.template:
            return
        if "context" not in placeholders(self.template):
            raise ConfigError(f"{self.source}: the template needs {{context}}, where the conversation goes")
        for sample in samples:
            if missing := self.missing_fields(sample):
                known = ", ".join(f"{{{name}}}" for name in (*OWN_PLACEHOLDERS, *dict(sample.fields)))
                raise ConfigError(
                    f"{self.source}: {{{missing[0]}}} is no placeholder for sample {sample.id!r}; there are {known}, "
                    "and further fields of the samples where every sample has them"
                )
            if sample.candidates and not self.shows_candidates:
                raise ConfigError(
                    f"{self.source}: sample {sample.id!r} has candidates; the template needs {{candidates}}"
                )


_NOBODY = Sample("", (), (), ())
DEFAULT_PROMPT = PromptFormat()


def open_prompt(data: DataConfig) -> PromptFormat:
    """The prompt of the settings. Raises ConfigError for a file that is not there or holds no text."""
    return PromptFormat(
        ItemFormat(data.item),
        template := prompt_text(data.prompt),
        data.item_noun,
        data.item_nouns,
        data.system_prompt,
        json.loads(data.chat_template_kwargs),
        "data.prompt" if template == data.prompt else f"data.prompt = {data.prompt}",
    )


def prompt_of_nouns(item: str = FILM_TEMPLATE, noun: str = "", nouns: str = "") -> PromptFormat:
    """The default prompt for items of a format and a name."""
    return PromptFormat(ItemFormat(item), noun=noun, nouns=nouns)


def format_context(conversation: Sequence[Turn]) -> str:
    """A line `USER: ...` or `SYSTEM: ...` a turn, each ending with a newline."""
    return "".join(f"{SPEAKERS[turn.role]}: {turn.content}\n" for turn in conversation)


def format_prompt(conversation: Sequence[Turn], num_ranks: int) -> str:
    """The paper's user message: the instruction to list so many movies, then the turns as `format_context` has them."""
    return DEFAULT_PROMPT.text(replace(_NOBODY, conversation=tuple(conversation)), num_ranks)


def _fill(template: str, values: Mapping[str, str]) -> str:
    """The template with these placeholders filled in, all at once: a turn may hold braces of its own."""
    return PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    max_tokens: int,
    num_ranks: int,
    *,
    quiet: bool = False,
    prompt: PromptFormat = DEFAULT_PROMPT,
) -> list[list[int]]:
    """Token ids of every sample's prompt in the tokenizer's chat template, generation prompt included.

    A prompt of more than `max_tokens` loses its oldest turns one by one; when the last turn alone is still too long, it
    loses the beginning of its text. The instruction is never cut: ValueError when it does not fit the budget.
    """
    prompts = []
    with tqdm(
        total=len(samples), desc="tokenise prompts", unit="prompt", disable=quiet or len(samples) < 2000, leave=False
    ) as bar:
        for start in range(0, len(samples), ENCODED_AT_ONCE):
            some = samples[start : start + ENCODED_AT_ONCE]
            for sample, ids in zip(some, _encode(tokenizer, some, num_ranks, prompt), strict=True):
                fits = len(ids) <= max_tokens
                prompts.append(ids if fits else _shorten(tokenizer, sample, max_tokens, num_ranks, prompt))
            bar.update(len(some))
    return prompts


def _encode(
    tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], num_ranks: int, prompt: PromptFormat
) -> list[list[int]]:
    """Special tokens are those that the template writes: none is added to them, and so no second BOS."""
    if not samples:
        return []
    # In the template's text, for transformers 5.24 makes a string of a function that is passed to a template.
    template = CLOCK.sub(lambda call: repr(TEMPLATE_DAY.strftime(call[2])), tokenizer.get_chat_template())
    pinned = {"chat_template": template, "date_string": TEMPLATE_DATE, "enable_thinking": False}
    pinned["strftime_now"] = TEMPLATE_DAY.strftime  # for a format that is no literal; there 5.24 ends in an error
    chats = [prompt.messages(sample, num_ranks) for sample in samples]
    try:
        texts = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=False, **pinned | dict(prompt.chat_kwargs)
        )
    except TemplateError as error:
        system = "it may take no system message: leave data.system_prompt empty; or " if prompt.system else ""
        raise ConfigError(
            f"data.prompt: the model's chat template refuses the prompt ({error}); {system}see "
            "data.chat_template_kwargs for what the template is given"
        ) from None
    if prompt.system and prompt.system.strip() not in texts[0]:
        raise ConfigError(
            "data.system_prompt: the model's chat template leaves the system message out; put the text into "
            "data.prompt, before {context}"
        )
    closing = _closing(texts[0], prompt)
    return tokenizer([text + closing for text in texts], add_special_tokens=False)["input_ids"]


def _closing(text: str, prompt: PromptFormat) -> str:
    """What is put behind a prompt that leaves a thought, or the choice to think, open: a list is the answer.

    Raises ConfigError where the settings ask for a thought in the prompt.
    """
    if text.endswith(HARMONY_HEADER):
        return HARMONY_ANSWER
    if (begins := OPEN_THOUGHT.search(text)) is None:
        return ""
    if asked := thinking_asked(prompt.chat_kwargs):
        raise ConfigError(
            f"data.chat_template_kwargs: with {asked} the prompt ends inside a thought ({begins[1]}), where a list "
            f"would be no answer; set data.chat_template_kwargs='{{\"{asked}\": false}}'"
        )
    return ("" if begins[0].endswith("\n") else "\n") + f"\n{MARKS[begins[1]]}\n\n"


def thinking_asked(chat_kwargs: Mapping[str, Any]) -> str | None:
    """The key by which the chat template is told that the model thinks first, if it is."""
    return next((key for key in THINKING_KEYS if chat_kwargs.get(key)), None)


def _shorten(
    tokenizer: PreTrainedTokenizerBase, sample: Sample, max_tokens: int, num_ranks: int, prompt: PromptFormat
) -> list[int]:
    def encode(turns: Sequence[Turn]) -> list[int]:
        (ids,) = _encode(tokenizer, [replace(sample, conversation=tuple(turns))], num_ranks, prompt)
        return ids

    conversation = sample.conversation
    if conversation:
        *_, last = conversation
        shorter = [conversation[drop:] for drop in range(1, len(conversation))]
        shorter += [[Turn(last.role, last.content[cut:])] for cut in range(1, len(last.content) + 1)]
        # Length falls with every step but for a token or two where pieces merge; a place that bisect returns inside
        # the range was itself tried and fits.
        place = bisect.bisect_left(range(len(shorter)), True, key=lambda i: len(encode(shorter[i])) <= max_tokens)
        if place < len(shorter):
            return encode(shorter[place])
    raise ValueError(
        f"the instruction and the chat template alone take {len(encode(()))} tokens, max_tokens is {max_tokens}; raise "
        "the prompt's token budget"
    )
