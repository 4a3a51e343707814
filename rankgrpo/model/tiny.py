"""The `tiny` preset: a Llama-architecture model of a few million parameters and a tokenizer fitted to the data set.

The tokenizer is a byte-level BPE over words, plus phrases of one token each: the catalog's frequent titles as
`Title (Year)` and the lines of the instruction. As in SuperBPE (Liu et al. 2025, arXiv 2503.13423) tokens thus span
words, but a phrase gets there whole, without the intermediate merges a BPE would spend vocabulary on. Three properties
make so small a model able to learn, and tests hold them:

* a title is the same tokens after a space in a conversation and at the start of a line of the list. Phrases see to it
  for frequent titles; for spelled ones the pre-tokenizer does, which attaches a space to the word before it and cuts
  before and after a year in parentheses;
* a line break is a token of its own: no token crosses the lines of a list;
* every text round-trips exactly, bytes that the data never showed included.

The architecture is one for which transformers takes a tokenizer from its file. For a model of type `qwen2`
AutoTokenizer puts the pre-tokenizer of Qwen2 in place of the file's own (5.19), and with it all three are lost.

It makes no model that knows a language: without training its lists are noise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankgrpo.data.prompt import SPEAKERS, PromptFormat, format_context
from rankgrpo.data.samples import Dataset
from rankgrpo.items.format import title_line
from rankgrpo.model.new_tokens import added, mark_rows

if TYPE_CHECKING:
    from rankgrpo.config import ModelConfig

PAD_TOKEN, START_TOKEN, END_TOKEN = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MIN_VOCAB = 1024  # half of it must hold 256 bytes, 3 special tokens and some words
MIN_TITLE_COUNT = 2  # a title met once cannot teach an embedding of its own; its words can
MAX_POSITIONS = 4096

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_SPACE = r"[^\S\r\n]"
_LETTER = r"[\p{L}\p{M}]"
_YEAR = r"\([0-9]{4}\)"
# Alternatives in order; what is left between them is a piece of its own.
WORD_PATTERN = "|".join(
    (
        _YEAR,
        r"[\r\n]",
        r"\p{Lu}{2,}: ",  # the speaker at the start of a turn
        rf"{_LETTER}+(?:['’]{_LETTER}+)*{_SPACE}?",
        rf"\p{{N}}{{1,4}}{_SPACE}?",
        rf"{_SPACE}+",
        rf"(?:(?!{_YEAR})[^\s\p{{L}}\p{{M}}\p{{N}}])+{_SPACE}?",
    )
)


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """Size of the model. Example: TinyConfig(hidden=192, heads=3, kv_heads=1)"""

    hidden: int = 256
    layers: int = 4
    ffn: int = 768
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 8192
    """Ceiling of the vocabulary: at most half of it are bytes and words, titles may take the rest."""

    @classmethod
    def of(cls, settings: ModelConfig) -> TinyConfig:
        """The sizes that the section [model] names."""
        return cls(*(getattr(settings, field.name) for field in fields(cls)))

    def __post_init__(self) -> None:
        for key in ("hidden", "layers", "ffn", "heads", "kv_heads"):
            if (value := getattr(self, key)) <= 0:
                raise ValueError(f"tiny model: {key} must be positive, got {value}")
        if self.vocab < MIN_VOCAB:
            raise ValueError(f"tiny model: vocab must be at least {MIN_VOCAB}, got {self.vocab}")
        if self.hidden % (2 * self.heads):  # rotary embeddings turn pairs of features
            raise ValueError(
                f"tiny model: hidden must be an even multiple of heads, got {self.hidden} and {self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"tiny model: kv_heads must divide heads, got {self.kv_heads} and {self.heads}")


def make_tiny(
    dataset: Dataset,
    config: TinyConfig,
    *,
    seed: int,
    num_ranks: int = 20,
    prompt: PromptFormat | None = None,
    new_tokens: Sequence[str] = (),
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A randomly initialised model and the tokenizer of `dataset`'s train split; the same for the same arguments."""
    tokenizer = train_tokenizer(dataset, config.vocab, num_ranks, prompt, new_tokens)
    model = init_model(config, tokenizer, seed=seed)
    if new_tokens:  # the last ids, random like all others: equal rows would teach a model from nothing no difference
        mark_rows(model, len(tokenizer) - len(new_tokens), len(tokenizer))
    return model, tokenizer


def init_model(config: TinyConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """Random float32 weights, a function of `seed`; leaves the global RNG alone.

    Normal with std hidden^-1/2, embeddings tied. The usual 0.02 is meant for wide models: at 256 it makes attention
    nearly uniform, and the model stays at the popularity list for a thousand steps before it reads the titles.
    """
    llama_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        intermediate_size=config.ffn,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=config.hidden**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(llama_config)


def train_tokenizer(
    dataset: Dataset,
    vocab: int,
    num_ranks: int = 20,
    prompt: PromptFormat | None = None,
    new_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the train split's words, plus its titles and the instruction to list `num_ranks` as
    phrases; at most `vocab` ids.

    Reads train conversations, their ground truth and demonstrations (`completion`), and the catalog's titles. A small
    data set gets fewer ids. `new_tokens` are the last of them, and no phrase holds one. Raises ValueError when the
    train split has no text, and when there is no room for the new tokens.
    """
    if len(new_tokens) > vocab // 4:
        raise ValueError(
            f"{len(new_tokens)} new tokens are too many for model.vocab = {vocab}; it must be four times that"
        )
    prompt = prompt or PromptFormat(dataset.catalog.item_format)
    instruction = [line for line in prompt.fixed_lines(num_ranks, dataset.train) if " " in line]
    titles = dataset.catalog.lines
    lines = corpus_lines(dataset)
    if not lines:
        raise ValueError(f"data set {dataset.name!r}: the train split has no conversation to fit a tokenizer to")

    counts, _ = split_phrases(lines, titles)
    counts.update(title_line(title, year) for sample in dataset.train for title, year in sample.groundtruth)
    counts.update(line for sample in dataset.train if sample.completion for line in sample.completion.split("\n"))
    parts = re.compile("|".join(map(re.escape, new_tokens)) or r"(?!)")
    whole = (t for t in titles if counts[t] >= MIN_TITLE_COUNT and _is_phrase(t) and not parts.search(t))
    frequent = sorted(whole, key=lambda title: (-counts[title], title))

    phrases = instruction + frequent[: vocab // 2 - len(instruction) - len(new_tokens)]
    _, words = split_phrases(lines, [*phrases, *new_tokens])
    spelled = set(titles).difference(phrases)
    words += split_phrases([title for title in titles if title in spelled], new_tokens)[1]
    # Every prompt has them, but lines are counted once, and the chat template is not in the lines.
    words += [*SPEAKERS, *(f"{label}: " for label in SPEAKERS.values())] * len(dataset.train)
    backend = _train_words(words, vocab // 2)
    backend.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    backend.add_tokens([added(token) for token in new_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_TOKEN, pad_token=PAD_TOKEN, chat_template=CHAT_TEMPLATE
    )


def corpus_lines(dataset: Dataset) -> list[str]:
    """Distinct lines of the train conversations, speaker included, in order of first appearance.

    Distinct, because a dialog gives one sample a turn: its opening would otherwise count as often as it has turns.
    """
    texts = (format_context(sample.conversation) for sample in dataset.train)
    return [line for line in dict.fromkeys(line for text in texts for line in text.split("\n")) if line]


def split_phrases(texts: Iterable[str], phrases: Iterable[str]) -> tuple[Counter[str], list[str]]:
    """How often each phrase occurs in `texts` (leftmost, then longest match), and the text between the matches."""
    # A BPE without a vocabulary drops every character: only the phrases are left, with their offsets.
    matcher = Tokenizer(models.BPE())
    matcher.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    counts: Counter[str] = Counter()
    between = []
    texts = list(texts)
    for text, encoding in zip(texts, matcher.encode_batch(texts), strict=True):
        counts.update(encoding.tokens)
        end = 0
        for start, stop in encoding.offsets:
            between.append(text[end:start])
            end = stop
        between.append(text[end:])
    return counts, [piece for piece in between if piece]


def _is_phrase(line: str) -> bool:
    """Whether a line may be a token: the decoder must take it literally, or as the same bytes."""
    return " " in line or line.isascii()


def _train_words(texts: list[str], vocab: int) -> Tokenizer:
    """A byte-level BPE whose merges stay inside the pieces of WORD_PATTERN."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # Phrases are stored as plain text, not in the byte alphabet. The decoder takes a token that holds a character
    # outside that alphabet literally, and every phrase holds one: a space.
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend
