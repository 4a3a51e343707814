"""What a list may name."""
