"""An export opened without transformers: one list from the command line needs no more, and importing takes longer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rankgrpo.config import Config
from rankgrpo.data.samples import Sample
from rankgrpo.items.catalog import Catalog
from rankgrpo.model.constraint import Constraint, forbidden_items, hold_to_catalog
from rankgrpo.model.decoder import Decoder, open_decoder
from rankgrpo.model.head import valid_token_mask
from rankgrpo.model.plain_tokenizer import PlainTokenizer


@dataclass(frozen=True)
class PlainPolicy:
    """What sampling needs of a `model.policy.Policy`."""

    model: Decoder
    tokenizer: PlainTokenizer
    allowed_V: Tensor
    constraint: Constraint | None = None

    def seen(self, samples: Sequence[Sample], catalog: Catalog) -> list[tuple[int, ...]]:
        """For every sample the items that its lists must not name: none, unless what was seen is forbidden."""
        return forbidden_items(self.constraint, samples, catalog)


def open_plain_policy(folder: Path, config: Config, catalog: Catalog) -> PlainPolicy | None:
    """The model that a run wrote to `folder`, on the CPU in float32, held to what shown lists are held to.

    None where that needs transformers.
    """
    if config.model.autocast != "none" or (opened := open_decoder(folder)) is None:
        return None
    model, tokenizer = opened
    policy = PlainPolicy(model, tokenizer, valid_token_mask(model, tokenizer))
    return hold_to_catalog(policy, config, catalog, shown=True)
