"""Which ids were allowed at each of many tokens: what the head over allowed ids (`rankgrpo.model.allowed`) reads."""

# Shape letters: N tokens, R tokens of a block or of the ragged piece, C ids of a block, X closed ids of a block,
# F entries of the ragged piece, U distinct ids of a plan.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens whose allowed ids are the same but for a few that are closed to some of them. All int64."""

    row_R: Tensor
    """Number of every token."""
    column_C: Tensor
    """The ids, as places in ids_U."""
    target_R: Tensor
    """Place in column_C of the id each token is."""
    closed_row_X: Tensor
    """Place in row_R of a token that may not be ..."""
    closed_X: Tensor
    """... the id at this place of column_C."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """Tokens with allowed ids of their own, those of a token one after the other. All int64."""

    row_R: Tensor
    """Number of every token."""
    place_F: Tensor
    """Place in row_R of the token of each entry, ascending."""
    column_F: Tensor
    """The allowed id, as a place in ids_U."""
    target_R: Tensor
    """The entry of the id each token is."""


@dataclass(frozen=True, slots=True)
class AllowedIds:
    """Which ids were allowed at each of `num_tokens` tokens, and which of them the token is.

    A token is in one block, or in the ragged piece, or in neither: then it had no other id.
    """

    num_tokens: int
    ids_U: Tensor
    """Every id that is allowed somewhere, distinct, ascending."""
    blocks: tuple[Block, ...]
    ragged: Ragged

    @classmethod
    def from_lists(cls, allowed: Sequence[Sequence[int]], ids: Sequence[int]) -> AllowedIds:
        """Of token n the allowed ids and the id it is. Tokens with equal lists form a block when there are several.

        Example: AllowedIds.from_lists([[3, 7, 9], [4]], [7, 4])
        """
        if len(allowed) != len(ids):
            raise ValueError(f"expected the allowed ids of {len(ids)} tokens, got {len(allowed)}")
        groups: dict[tuple[int, ...], list[int]] = {}
        for n, (own, token_id) in enumerate(zip(allowed, ids, strict=True)):
            if len(set(own)) != len(own) or token_id not in own:
                raise ValueError(f"token {n} is id {token_id}, its allowed ids must be distinct and hold it: {own}")
            if len(own) > 1:
                groups.setdefault(tuple(own), []).append(n)
        ids_U = sorted({i for own in groups for i in own})
        place = {token_id: u for u, token_id in enumerate(ids_U)}
        none = torch.zeros(0, dtype=torch.int64)
        blocks, rows, places, columns, targets = [], [], [], [], []
        for own, tokens in groups.items():
            column = [place[i] for i in own]
            if len(tokens) > 1:
                target = [own.index(ids[n]) for n in tokens]
                blocks.append(Block(*map(torch.tensor, (tokens, column, target)), none, none))
                continue
            targets.append(len(columns) + own.index(ids[tokens[0]]))
            places += [len(rows)] * len(own)
            columns += column
            rows += tokens
        ragged = Ragged(*(torch.tensor(x, dtype=torch.int64) for x in (rows, places, columns, targets)))
        return cls(len(ids), torch.tensor(ids_U, dtype=torch.int64), tuple(blocks), ragged)

    def to(self, device: torch.device | str) -> AllowedIds:
        if self.ids_U.device == torch.device(device):
            return self
        blocks, ragged = tuple(_moved(block, device) for block in self.blocks), _moved(self.ragged, device)
        return AllowedIds(self.num_tokens, self.ids_U.to(device, non_blocking=True), blocks, ragged)


def _moved(part, device):
    return type(part)(*(getattr(part, f.name).to(device, non_blocking=True) for f in fields(part)))
