"""The tokenizer of an export, read with the `tokenizers` library alone: what prompts, tries and samplers need."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

# Classes of transformers without rules of their own: tokenizer.json says all.
COMPLETE_FILES = ("TokenizersBackend", "PreTrainedTokenizerFast")
KNOWN_KEYS = frozenset(
    "add_prefix_space backend bos_token eos_token is_local local_files_only model_max_length pad_token tokenizer_class "
    "unk_token".split()
)


def _refuse(message: str) -> None:
    raise TemplateError(message)


class PlainTokenizer:
    """`tokenizer.json` with a chat template and the names of its special tokens."""

    is_fast = True

    def __init__(self, backend: Tokenizer, chat_template: str, *, eos_token: str, pad_token: str, **special: str):
        self.backend_tokenizer, self.chat_template = backend, chat_template
        self.eos_token, self.pad_token = eos_token, pad_token
        self._special = {"eos_token": eos_token, "pad_token": pad_token, **special}
        self.eos_token_id, self.pad_token_id = backend.token_to_id(eos_token), backend.token_to_id(pad_token)
        backend.no_padding()
        backend.no_truncation()
        # As transformers compiles templates; `strftime_now` comes with every prompt, for it must not be the clock's.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _refuse
        self._environment = environment

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def __call__(self, texts: Sequence[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        encodings = self.backend_tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in encodings]}

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False, **_: Any) -> str:
        return self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def get_chat_template(self) -> str:
        return self.chat_template

    def apply_chat_template(
        self,
        chats: Sequence[Sequence[Mapping[str, str]]],
        *,
        add_generation_prompt: bool,
        tokenize: bool = False,
        chat_template: str | None = None,
        **options: Any,
    ) -> list[str]:
        """The text of every chat, special tokens where the template writes them. Raises ValueError to tokenize."""
        if tokenize:
            raise ValueError("a PlainTokenizer writes the text of a chat; its ids are those of calling it with that")
        known = self._special | {"add_generation_prompt": add_generation_prompt} | options
        template = self._environment.from_string(chat_template or self.chat_template)
        return [template.render(messages=chat, **known) for chat in chats]


def open_plain_tokenizer(folder: Path) -> PlainTokenizer | None:
    """The tokenizer of an export; None for a folder that needs transformers to say what its files mean."""
    files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
    if not all(file.is_file() for file in files):
        return None
    tokenizer, config, template = (file.read_text(encoding="utf-8") for file in files)
    config = json.loads(config)
    names = (config.get("eos_token"), config.get("pad_token"))
    if config.get("tokenizer_class") not in COMPLETE_FILES or config.get("backend") != "tokenizers":
        return None
    if config.keys() - KNOWN_KEYS or not all(isinstance(name, str) for name in names):
        return None
    backend = Tokenizer.from_str(tokenizer)
    if any(backend.token_to_id(name) is None for name in names):
        return None
    others = {key: config[key] for key in ("bos_token", "unk_token") if config.get(key) is not None}
    if not all(isinstance(name, str) for name in others.values()):
        return None
    return PlainTokenizer(backend, template, eos_token=names[0], pad_token=names[1], **others)
