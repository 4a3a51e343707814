"""Reflect: a judge rates the best candidates of a conversation, and its ratings move them (arXiv 2510.20150, Eq. 11).

    s_reflect = s_remap + gamma * r,   r in {-2, -1, 0, 1, 2}

Only the first 100 candidates or so are rated, the others have r = 0. The judge, a language model behind an endpoint,
answers a line a candidate, `movie_name (release_year)####rating`. Lines are read strictly: a candidate of the question,
by its title and year, and one of the five ratings. An answer that rates less than half of its candidates is asked again
and then given up, which leaves the conversation's scores as they were.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankgrpo.data.prompt import DEFAULT_PROMPT, PromptFormat, format_context
from rankgrpo.data.samples import Sample
from rankgrpo.distill.llm import CallReport, Endpoint, Estimate, ReplyLog, ask_all, estimate_calls
from rankgrpo.distill.metadata import item_name
from rankgrpo.distill.remap import Scores
from rankgrpo.items.catalog import Catalog, Item

TOKENS_PER_LINE = 24
RATINGS = {"-2": -2, "-1": -1, "0": 0, "1": 1, "2": 2, "+1": 1, "+2": 2}
MIN_RATED = 0.5

PROMPT = (
    "Pretend you are a {noun} recommender system.\n"
    "I will give you a conversation between a user and you (a recommender system), and a list of candidate {nouns}. "
    "Rate how well each candidate fits as a recommendation for this user at the end of this conversation: 2 (fits very "
    "well), 1 (fits), 0 (neutral), -1 (does not fit), -2 (does not fit at all). Reply with one line for each candidate "
    "in the form of {rated}####rating with NO extra words or sentences.\n"
    "Here is the conversation: {context}"
    "Here are the candidates:\n{candidates}"
)
_LINE = re.compile(r"^(?P<name>.*\S)\s*####\s*(?P<rating>[+-]?[0-9])\s*$")


def judge_prompt(sample: Sample, candidates: Sequence[Item], prompt: PromptFormat = DEFAULT_PROMPT) -> str:
    """The question about one conversation."""
    context = format_context(sample.conversation)
    rated = "movie_name (release_year)" if prompt.item_format.is_film else prompt.words("{form}")
    listed = "\n".join(item_name(item) for item in candidates)
    question = prompt.words(PROMPT).replace("{rated}", rated)
    return question.replace("{candidates}", listed).replace("{context}", context)


def read_ratings(reply: str, candidates: Sequence[int], catalog: Catalog) -> dict[int, int]:
    """Rating by candidate (catalog index). Lines that do not rate a candidate are skipped; the first rating counts."""
    wanted = set(candidates)
    ratings: dict[int, int] = {}
    for line in reply.splitlines():
        match = _LINE.match(line.strip())
        if match is None or match["rating"] not in RATINGS:
            continue
        items = catalog.parse(match["name"])
        if len(items) == 1 and items[0].title is not None:
            index = catalog.lookup(items[0].title, items[0].year)
            if index in wanted:
                ratings.setdefault(index, RATINGS[match["rating"]])
    return ratings


@dataclass(frozen=True)
class Judge:
    """The questions of the reflect stage: samples, and the candidates (catalog indices) of each."""

    samples: Sequence[Sample]
    candidates: Sequence[Sequence[int]]
    catalog: Catalog
    endpoint: Endpoint
    prompt: PromptFormat = DEFAULT_PROMPT

    def prompts(self) -> list[str]:
        """One question a sample."""
        items = self.catalog.items
        return [
            judge_prompt(sample, [items[index] for index in indices], self.prompt)
            for sample, indices in zip(self.samples, self.candidates, strict=True)
        ]

    @property
    def max_tokens(self) -> int:
        return TOKENS_PER_LINE * max(map(len, self.candidates), default=1)

    def estimate(self, log: ReplyLog) -> Estimate:
        """The cost of `rate`."""
        return estimate_calls(self.endpoint, self.prompts(), self.max_tokens, log)

    def rate(self, log: ReplyLog) -> tuple[list[dict[int, int]], CallReport]:
        """The ratings by candidate for every sample; none for a sample whose answer could not be read."""
        prompts = self.prompts()
        candidates_of = dict(zip(prompts, self.candidates, strict=True))

        def is_readable(prompt: str, reply: str) -> bool:
            candidates = candidates_of[prompt]
            return len(read_ratings(reply, candidates, self.catalog)) >= MIN_RATED * len(candidates)

        replies, report = ask_all(
            self.endpoint, prompts, log, max_tokens=self.max_tokens, is_readable=is_readable, title="reflect"
        )
        pairs = zip(replies, self.candidates, strict=True)
        return [{} if reply is None else read_ratings(reply, c, self.catalog) for reply, c in pairs], report


@dataclass(frozen=True)
class ReflectScores:
    """s_reflect: scores plus gamma times the ratings."""

    scores: Scores
    ratings: Sequence[dict[int, int]]
    gamma: float = 0.5

    @property
    def num_samples(self) -> int:
        return self.scores.num_samples

    @property
    def num_items(self) -> int:
        return self.scores.num_items

    def block(self, samples: Sequence[int]) -> Tensor:
        """Scores of a block of samples, float32 (B, N)."""
        scores_BN = self.scores.block(samples)
        for row, sample in enumerate(samples):
            rated = self.ratings[sample]
            if rated:
                scores_BN[row, list(rated)] += self.gamma * torch.tensor(list(rated.values()), dtype=torch.float32)
        return scores_BN
