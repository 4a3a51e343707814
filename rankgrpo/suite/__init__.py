"""Suites of experiments: many runs from one warm start, compared in one page. `rankgrpo experiments` runs them."""
