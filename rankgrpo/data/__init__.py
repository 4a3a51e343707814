"""Samples and their conversations: read, written, put into prompts and into the order of a run."""
