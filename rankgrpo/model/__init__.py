"""Models: where each comes from, the packed forward pass over them, adapters."""
