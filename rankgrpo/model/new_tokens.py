"""Tokens added to a model: the parts of semantic ids, or any words that are to be one token each.

A token's row in embeddings and head begins as the mean of the rows that were there, and is trained with the rest. Where
adapters are trained and the model is frozen, these rows are trained beside them and no others; with the adapters off
they are as they began, so that the reference of the KL term is the model before it was trained.
"""

# Shape letters: V vocabulary (rows of embeddings and head), D hidden size.
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankgrpo.errors import ConfigError
from rankgrpo.items.catalog import Catalog

ROWS = "rankgrpo_new_rows"
"""Name in config.json of [first, last + 1] of the ids that were added."""
FIRST_ROWS = "rankgrpo_first_rows"
_PART = re.compile(r"<[^<>\s]+>")


def read_new_tokens(setting: str, catalog: Catalog) -> list[str]:
    """The tokens that model.new_tokens means: the lines of a file, or the distinct `<...>` parts of a catalog column.

    In order of the file, or sorted. Raises ConfigError for what is neither, and for a column without such parts.
    """
    if not setting:
        return []
    path = Path(setting)
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        tokens = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not tokens:
            raise ConfigError(f"model.new_tokens: {path} is empty; it holds a token a line")
        return tokens
    rows = [dict(item.fields) for item in catalog]
    columns = sorted({name for row in rows for name in row})
    if setting not in columns:
        raise ConfigError(
            f"model.new_tokens = {setting!r} is neither a file nor a column of the catalog; its columns are "
            f"{', '.join(columns) or 'title and year of films alone'}"
        )
    tokens = sorted({part for row in rows for part in _PART.findall(row.get(setting, ""))}, key=_in_order)
    if not tokens:
        raise ConfigError(
            f"model.new_tokens: the column {setting!r} of the catalog holds no part such as <a_12>; give a file with a "
            "token a line"
        )
    return tokens


def _in_order(part: str) -> tuple[object, ...]:
    """`<a_2>` before `<a_12>`."""
    return tuple((1, int(piece), "") if piece.isdecimal() else (0, 0, piece) for piece in re.split(r"(\d+)", part))


def added(token: str) -> AddedToken:
    """A token as the tokenizer stores it: text like any other, which decoding keeps."""
    return AddedToken(token, normalized=False, special=False)


@torch.no_grad()
def add_new_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Give the tokenizer these tokens and the model rows for those that it did not have, in place."""
    before = len(tokenizer)
    tokenizer.add_tokens([added(token) for token in tokens])
    after = len(tokenizer)
    if after == before:
        return
    if after > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(after, mean_resizing=False)
    # A head may have had more rows than the tokenizer had ids: those are no text's.
    for weight_VD in tables(model):
        weight_VD[before:after] = weight_VD[:before].double().mean(0).to(weight_VD.dtype)
    mark_rows(model, before, after)


def mark_rows(model: PreTrainedModel, first: int, end: int) -> None:
    """Note in the configuration, which exports keep, which ids were added."""
    setattr(model.config, ROWS, [first, end])


def has_new_rows(model: PreTrainedModel) -> bool:
    """Whether tokens were added to the model."""
    return getattr(model.config, ROWS, None) is not None


def tables(model: PreTrainedModel) -> list[nn.Parameter]:
    """Embeddings and head, one of them where they are tied."""
    weights = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    return list({id(weight): weight for weight in weights}.values())


def train_new_rows(model: PreTrainedModel) -> None:
    """In a model that is frozen, train the rows of added tokens and remember how they began; nothing where none were.

    The gradient of every other row is 0, so without weight decay an optimizer leaves it as it is.
    """
    rows = getattr(model.config, ROWS, None)
    if rows is None:
        return
    first, end = rows
    for weight_VD in tables(model):
        setattr(weight_VD, FIRST_ROWS, weight_VD.detach()[first:end].clone())
        weight_VD.requires_grad_(True)
        weight_VD.register_hook(lambda grad_VD: _only_rows(grad_VD, first, end))


def _only_rows(grad_VD: Tensor, first: int, end: int) -> Tensor:
    kept_VD = torch.zeros_like(grad_VD)
    kept_VD[first:end] = grad_VD[first:end]
    return kept_VD


@contextmanager
def new_rows_off(model: PreTrainedModel) -> Iterator[None]:
    """Compute with the rows of added tokens as they began. For forwards without a gradient."""
    trained = [(weight, getattr(weight, FIRST_ROWS)) for weight in model.parameters() if hasattr(weight, FIRST_ROWS)]
    if not trained:
        yield
        return
    first, end = getattr(model.config, ROWS)
    kept = [weight.detach()[first:end].clone() for weight, _ in trained]
    with torch.no_grad():
        for weight, began in trained:
            weight[first:end] = began
    try:
        yield
    finally:
        with torch.no_grad():
            for (weight, _), rows in zip(trained, kept, strict=True):
                weight[first:end] = rows
