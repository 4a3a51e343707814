"""Lists of a policy for each of many samples, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tqdm import tqdm

from rankgrpo.config import Config
from rankgrpo.data.prompt import encode_prompts, open_prompt
from rankgrpo.data.samples import Sample
from rankgrpo.items.catalog import Catalog
from rankgrpo.sampler.base import Sampler, prompt_seed

if TYPE_CHECKING:
    from rankgrpo.model.plain_policy import PlainPolicy
    from rankgrpo.model.policy import Policy


def recommend_lists(
    policy: Policy | PlainPolicy,
    sampler: Sampler,
    samples: list[Sample],
    catalog: Catalog,
    config: Config,
    *,
    title: str | None = None,
) -> list[str]:
    """One list a sample at eval.temperature, as text; a progress bar named `title` unless it is None.

    With a temperature above 0 the draw depends on (config.seed, sample id) alone, so models meet the same luck.
    `sampler` has the policy's weights.
    """
    temperature = config.eval.temperature
    groups = sample_lists(policy, sampler, samples, catalog, config, num_lists=1, temperature=temperature, title=title)
    return [text for (text,) in groups]


def sample_lists(
    policy: Policy | PlainPolicy,
    sampler: Sampler,
    samples: list[Sample],
    catalog: Catalog,
    config: Config,
    *,
    num_lists: int,
    temperature: float,
    title: str | None,
) -> list[list[str]]:
    """`num_lists` lists a sample, as text; otherwise as `recommend_lists`."""
    data = config.data
    prompts = encode_prompts(
        policy.tokenizer,
        samples,
        data.max_prompt_tokens,
        data.num_ranks,
        quiet=title is None,
        prompt=open_prompt(data),
    )
    unit = "list" if num_lists == 1 else "conversation"
    with tqdm(total=len(samples), desc=title, unit=unit, disable=title is None, dynamic_ncols=True) as bar:
        groups = sampler.sample(
            prompts,
            group_size=num_lists,
            seeds=[prompt_seed(config.seed, 0, sample.id) for sample in samples],
            max_new_tokens=config.rl.max_new_tokens,
            temperature=temperature,
            seen=policy.seen(samples, catalog),
            on_progress=bar.update,
        )
    return [[rollout.text for rollout in group] for group in groups]
