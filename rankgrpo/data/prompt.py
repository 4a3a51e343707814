"""From a conversation to the token ids of its prompt: the paper's template inside the tokenizer's chat template."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from rankgrpo.data.samples import Sample, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Appendix D.1 of the paper, word for word for 20 ranks: models trained elsewhere with it stay comparable.
PROMPT = (
    "Pretend you are a movie recommender system.\n"
    "I will give you a conversation between a user and you (a recommender system). Based on the conversation, you need "
    "to reply with {num_ranks} recommendations. List the standardized English title of each movie in each line in the "
    'form of "movie name" (release_year) with NO extra words or sentences.\n'
    "Here is the conversation: {context}"
)
SPEAKERS = {"user": "USER", "assistant": "SYSTEM"}

# Llama 3's chat template writes today's date into the prompt unless told one; a prompt must not change overnight.
TEMPLATE_DATE = "26 Jul 2024"

ENCODED_AT_ONCE = 512  # prompts a call of the tokenizer, which spreads them over the cores


def format_prompt(conversation: Sequence[Turn], num_ranks: int) -> str:
    """The user message: the instruction to list so many items, then a line `USER: ...` or `SYSTEM: ...` a turn, ending
    with a newline."""
    context = "".join(f"{SPEAKERS[turn.role]}: {turn.content}\n" for turn in conversation)
    instruction = PROMPT.replace("{num_ranks}", str(num_ranks))
    return instruction.replace("{context}", context)  # not str.format: a turn may hold braces


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    max_tokens: int,
    num_ranks: int,
    *,
    quiet: bool = False,
) -> list[list[int]]:
    """Token ids of every sample's prompt in the tokenizer's chat template, generation prompt included.

    A prompt of more than `max_tokens` loses its oldest turns one by one; when the last turn alone is still too long, it
    loses the beginning of its text. The instruction is never cut: ValueError when it does not fit the budget.
    """
    prompts = []
    with tqdm(
        total=len(samples), desc="tokenise prompts", unit="prompt", disable=quiet or len(samples) < 2000, leave=False
    ) as bar:
        for start in range(0, len(samples), ENCODED_AT_ONCE):
            conversations = [sample.conversation for sample in samples[start : start + ENCODED_AT_ONCE]]
            for conversation, ids in zip(conversations, _encode(tokenizer, conversations, num_ranks), strict=True):
                fits = len(ids) <= max_tokens
                prompts.append(ids if fits else _shorten(tokenizer, conversation, max_tokens, num_ranks))
            bar.update(len(conversations))
    return prompts


def _encode(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Turn]], num_ranks: int
) -> list[list[int]]:
    return tokenizer.apply_chat_template(
        [[{"role": "user", "content": format_prompt(turns, num_ranks)}] for turns in conversations],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        date_string=TEMPLATE_DATE,
    )


def _shorten(
    tokenizer: PreTrainedTokenizerBase, conversation: Sequence[Turn], max_tokens: int, num_ranks: int
) -> list[int]:
    def encode(turns: Sequence[Turn]) -> list[int]:
        (ids,) = _encode(tokenizer, [turns], num_ranks)
        return ids

    if conversation:
        *_, last = conversation
        shorter = [conversation[drop:] for drop in range(1, len(conversation))]
        shorter += [[Turn(last.role, last.content[cut:])] for cut in range(1, len(last.content) + 1)]
        # Length falls with every step but for a token or two where pieces merge; a place that bisect returns inside
        # the range was itself tried and fits.
        place = bisect.bisect_left(range(len(shorter)), True, key=lambda i: len(encode(shorter[i])) <= max_tokens)
        if place < len(shorter):
            return encode(shorter[place])
    raise ValueError(
        f"the instruction and the chat template alone take {len(encode(()))} tokens, max_tokens is {max_tokens}; raise "
        "the prompt's token budget"
    )
