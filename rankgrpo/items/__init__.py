"""What a list may name: the catalog, titles as other models write them, and the catalog as a trie of tokens."""
