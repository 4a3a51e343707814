"""Samplers: G lists for every prompt, with the log-probabilities they were sampled at."""
