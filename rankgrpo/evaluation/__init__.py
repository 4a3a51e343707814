"""Scores of lists, during training and after it; tables; lists for people."""
