"""The trie that the lists of update.py's --held are walked through."""

from __future__ import annotations

import numpy as np

from rankgrpo.data.load import load_dataset
from rankgrpo.items.trie import CatalogTrie
from rankgrpo.model.presets import open_tokenizer


def make_trie(data: str, tokenizer_name: str, vocab: int, num_ranks: int = 20) -> CatalogTrie:
    """Lines of a data set's catalog; ValueError where the tokenizer has ids that a vocabulary of `vocab` lacks."""
    dataset = load_dataset(data)
    tokenizer = open_tokenizer(tokenizer_name, dataset)
    lines = [f"{item.title} ({item.year})" for item in dataset.catalog.items]
    trie = CatalogTrie.build(lines, tokenizer, num_ranks=num_ranks, eos_id=tokenizer.eos_token_id)
    largest = max(int(np.max(trie.list_ids([item]))) for item in range(len(trie.line_of_item)))
    if largest >= vocab:
        raise ValueError(f"--tokenizer {tokenizer_name} has the id {largest}, and --shape's vocabulary is {vocab}")
    return trie
