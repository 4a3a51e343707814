"""Settings that fit a model which is no preset: by its size, by the run it comes from and by measured lengths.

Learning rates, KL and compute type are those of the preset nearest in size. The token budgets come from the data under
the model's own tokenizer: conversations, and demonstrations or, before there are any, lists drawn from the training
split's ground truth. Whatever the user sets wins, and is checked against the same lengths.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rankgrpo.config import Config
from rankgrpo.config_file import SIZES, flatten, load_config, preset_file, read_settings
from rankgrpo.data.load import load_dataset
from rankgrpo.data.prompt import LENGTHS_FILE, encode_prompts, open_prompt
from rankgrpo.data.samples import Dataset, Sample, read_samples
from rankgrpo.errors import ConfigError, ModelError
from rankgrpo.files.atomic import write_lines
from rankgrpo.items.format import ItemFormat
from rankgrpo.model.presets import PRESETS, count_parameters, open_tokenizer, resolve_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Up to so many parameters the settings are those of this preset; the bounds lie between the presets' own sizes.
NEAREST = (
    (2e7, "tiny"),
    (2.5e8, "smollm2-135m"),
    (8e8, "qwen2.5-0.5b"),
    (2e9, "llama3.2-1b"),
    (float("inf"), "llama3.2-3b"),
)
PROMPT = ("data.prompt", "data.item_noun", "data.item_nouns", "data.system_prompt", "data.chat_template_kwargs")
INHERITED = (
    *("data.num_ranks", "data.item", *PROMPT, "data.max_prompt_tokens"),
    *("rl.max_new_tokens", "rl.constrain", "rl.forbid"),
)
"""Settings that a model keeps of the run that trained it, beside those of its `model` section."""
MEASURED_PROMPTS, MEASURED_LISTS = 5000, 512
QUANTILE = 0.99
HEADROOM = 1.25
"""A list that is sampled may be longer than the demonstrations, and one that is cut has no end."""
UNBOUNDED = 2**30


@dataclass(frozen=True)
class Lengths:
    """Tokens of conversations and lists under one tokenizer, sorted.

    Example: Lengths([200, 310], [140, 176], "demonstrations")
    """

    prompts: list[int]
    lists: list[int]
    what: str
    """What the lists are."""

    @property
    def prompt_tokens(self) -> int:
        return quantile(self.prompts, QUANTILE)

    @property
    def list_tokens(self) -> int:
        return quantile(self.lists, QUANTILE)

    def num_cut(self, config: Config) -> int:
        """Conversations that data.max_prompt_tokens shortens."""
        return sum(length > config.data.max_prompt_tokens for length in self.prompts)

    def summary(self, config: Config) -> dict[str, Any]:
        """Counts, quantiles and maxima, as JSON."""
        of = {"prompts": self.prompts, "lists": self.lists}
        counts = {
            name: {"count": len(all_), "p50": quantile(all_, 0.5), "p99": quantile(all_, QUANTILE), "max": all_[-1]}
            for name, all_ in of.items()
        }
        return {**counts, "prompts_cut": self.num_cut(config), "what": self.what}

    def lines(self, config: Config) -> list[str]:
        """What data.max_prompt_tokens and rl.max_new_tokens mean for these lengths, in one line each."""
        cut = self.num_cut(config)
        lost = f"{cut} longer ones lose their oldest turns" if cut else "none is longer"
        longer = sum(length > config.rl.max_new_tokens for length in self.lists)
        held = ", not read while lists are held to the catalog" if config.rl.constrain == "catalog" else ""
        return [
            f"data.max_prompt_tokens = {config.data.max_prompt_tokens}: 99 % of {len(self.prompts)} training "
            f"conversations have at most {self.prompt_tokens} tokens; {lost}",
            f"rl.max_new_tokens = {config.rl.max_new_tokens}{held}: 99 % of {len(self.lists)} {self.what} have at most "
            f"{self.list_tokens} tokens, the longest {self.lists[-1]}; {longer} longer than that",
        ]


def quantile(values: Sequence[int], share: float) -> int:
    """The smallest of the sorted values that at least this share of them does not exceed."""
    return values[max(-int(-share * len(values) // 1), 1) - 1]


def check_run_lengths(
    config: Config, dataset: Dataset, start: str, demonstrations: Sequence[Sample] | None, run_dir: Path
) -> list[str]:
    """What a run's budgets cut, one line each, kept in run_dir/lengths.json; ConfigError for what cannot work.

    start: the model whose tokenizer counts. A run whose lengths are there has passed and is not measured again.
    """
    path = run_dir / LENGTHS_FILE
    if path.exists():
        return []
    context = context_of(start)
    texts = None if demonstrations is None else [sample.completion for sample in demonstrations if sample.completion]
    lengths = measure(open_tokenizer(start, dataset), dataset, config, texts)
    check_lengths(config, lengths, context)
    prompts, lists = lengths.lines(config)
    told = [prompts] if lengths.num_cut(config) else []
    if lengths.lists[-1] > config.rl.max_new_tokens and config.rl.constrain == "none":
        told.append(lists)
    write_lines(path, [json.dumps({"lines": [prompts, lists], "cut": told, **lengths.summary(config)}, indent=1)])
    return told


def model_settings(
    model: str | None,
    source: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    from_model: str | None = None,
    run_dir: Path | None = None,
    method: str | None = None,
    **direct: Any,
) -> tuple[Config, list[str]]:
    """The settings of a command, and the lines that say which were chosen and why; a preset has its file and no line.

    model: None is that of the file `source`, else `model_name`'s. A run folder that has begun keeps what was chosen for
    it. Raises ConfigError and ModelError.
    """
    if model is None and source is not None:  # the file says which model its settings are for
        return load_config(source, list(overrides), method=method, **direct), []
    run = run_of(from_model) if model is None and from_model is not None else None
    model = model_name(model, from_model)
    resolve_model(model)  # an unknown name fails before anything is read or written
    inherited: dict[str, Any] = {}
    lines: list[str] = []
    if run is not None:
        saved = flatten(load_config(run / "config.toml", saved=True))
        inherited = {
            key: value for key, value in saved.items() if key in INHERITED or (key in SIZES and model == "tiny")
        }
        lines = [f"settings of {model}; lengths and list format as in {run / 'config.toml'}, which made {from_model}"]
    settings = {"method": method, "model__name": model, **direct}
    overrides = list(overrides)
    if model in PRESETS:
        file = read_settings(preset_file(model)) if source is None else {}
        return load_config(source, overrides, chosen=file | inherited, **settings), lines
    begun = run_dir / "config.toml" if run_dir is not None else None
    size = count_model(model)
    near = next(name for limit, name in NEAREST if size <= limit)
    chosen = {
        key: value for key, value in read_settings(preset_file(near)).items() if key not in ("model.name", *SIZES)
    }
    if begun is not None and begun.exists():
        saved = flatten(load_config(begun, saved=True))
        kept = {key: saved[key] for key in (*chosen, "data.max_prompt_tokens", "rl.max_new_tokens")}
        return load_config(source, overrides, chosen=kept, **settings), [f"settings as chosen in {begun}"]
    config = load_config(source, overrides, chosen=chosen | inherited, **settings)
    data = config.data
    dataset = load_dataset(data.path, num_train=data.num_train or None, item_format=ItemFormat(data.item))
    lengths = measure(open_tokenizer(model, dataset), dataset, config)
    chosen |= choose_lengths(lengths, context_of(model)) | inherited
    config = load_config(source, overrides, chosen=chosen, **settings)
    origin = (
        f"{model}: {size / 1e6:.1f}M parameters, so the settings of the preset {near}, the nearest in size: sft.lr = "
        f"{config.sft.lr:g}, rl.lr = {config.rl.lr:g}, rl.kl_coef = {config.rl.kl_coef:g}, rl.constrain = "
        f"{config.rl.constrain}"
    )
    return config, [*lines, origin, *lengths.lines(config)]


def model_name(model: str | None, from_model: str | None = None) -> str:
    """What model.name is where only `from_model` may be given: that of its run, else itself, else tiny."""
    if model is None and from_model is not None:
        run = run_of(from_model)
        return from_model if run is None else load_config(run / "config.toml", saved=True).model.name
    return model or "tiny"


def run_of(model: str) -> Path | None:
    """The run folder that a model's folder is in: RUN/init, RUN/sft/final, RUN/rl/best; None for any other."""
    folder = Path(model).absolute()
    for run in (folder.parent, folder.parent.parent):
        if folder.is_dir() and (run / "config.toml").is_file() and (run / "meta.json").is_file():
            return run
    return None


def count_model(model: str) -> int:
    """Parameters of a folder's or hub id's model, tied ones once, from its configuration alone."""
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(_config(model), trust_remote_code=False)
    made.tie_weights()
    return count_parameters(made)


def context_of(model: str) -> int:
    """Tokens that a model was made for, prompt and list together."""
    return getattr(_config(model), "max_position_embeddings", None) or UNBOUNDED


def _config(model: str) -> PretrainedConfig:
    location = resolve_model(model).location
    try:
        return AutoConfig.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError) as error:
        line = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{location}: its configuration cannot be read ({line}); give a folder in Hugging Face format "
            "(MODEL=/path/to/folder)"
        ) from error


def measure(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    config: Config,
    completions: Sequence[str] | None = None,
) -> Lengths:
    """Lengths of up to MEASURED_PROMPTS training conversations and of all `completions`, the demonstrations' lists.

    Without completions those of teacher.demonstrations, or MEASURED_LISTS lists of items that the training split asks
    for, as often as it does. A list counts its end token.
    """
    num_ranks, train = config.data.num_ranks, dataset.train
    samples = train[:: -(-len(train) // MEASURED_PROMPTS)]
    prompts = encode_prompts(tokenizer, samples, UNBOUNDED, num_ranks, prompt=open_prompt(config.data), quiet=True)
    what = "demonstrations"
    given = Path(config.teacher.demonstrations) / "demonstrations-train.jsonl"
    if completions is None and config.teacher.demonstrations and given.is_file():
        read = read_samples(given, item_format=dataset.catalog.item_format)[0]
        completions = [sample.completion for sample in read if sample.completion]
    if not completions:
        what, completions = "lists of items from the ground truth", draw_lists(dataset, num_ranks, config.seed)
    ids = tokenizer(list(completions), add_special_tokens=False)["input_ids"]
    return Lengths(sorted(map(len, prompts)), sorted(len(one) + 1 for one in ids), what)


def draw_lists(dataset: Dataset, num_ranks: int, seed: int) -> list[str]:
    """MEASURED_LISTS lists of `num_ranks` lines, drawn from the training split's ground truth with its frequencies."""
    catalog = dataset.catalog
    named = [catalog.lookup(*item) for sample in dataset.train for item in sample.groundtruth]
    wanted = [catalog.items[index].line for index in named if index is not None] or catalog.lines
    draw = random.Random(seed)
    return ["\n".join(draw.choices(wanted, k=num_ranks)) for _ in range(MEASURED_LISTS)]


def choose_lengths(lengths: Lengths, context: int) -> dict[str, int]:
    """data.max_prompt_tokens and rl.max_new_tokens under which 99 % of the conversations, and every list, are whole.

    Raises ConfigError for a model whose context does not hold both.
    """
    new_tokens = _round_up(max(HEADROOM * lengths.list_tokens, lengths.lists[-1]), 32)
    prompt_tokens = _round_up(lengths.prompt_tokens, 64)
    if new_tokens + min(lengths.prompts[0], prompt_tokens) > context:
        raise ConfigError(
            f"the model's context is {context} tokens; a list takes up to {new_tokens} and the shortest conversation "
            f"{lengths.prompts[0]}: take a model with a longer context, or a smaller data.num_ranks"
        )
    return {"data.max_prompt_tokens": min(prompt_tokens, context - new_tokens), "rl.max_new_tokens": new_tokens}


def _round_up(value: float, multiple: int) -> int:
    return -int(-value // multiple) * multiple


def check_lengths(config: Config, lengths: Lengths, context: int) -> None:
    """Raise ConfigError for budgets that cannot work: lists that would be cut, or more than the model's context.

    Lists held to the catalog are never cut. Drawn lists only say how long lists usually are, so half of them must fit.
    """
    budget, prompt_tokens = config.rl.max_new_tokens, config.data.max_prompt_tokens
    free = config.rl.constrain == "none" or config.shown_constrain == "none"
    exact = lengths.what == "demonstrations"
    needed = lengths.list_tokens if exact else quantile(lengths.lists, 0.5)
    if free and budget < needed:
        longer = sum(length > budget for length in lengths.lists)
        raise ConfigError(
            f"rl.max_new_tokens = {budget}: {longer} of {len(lengths.lists)} {lengths.what} are longer, up to "
            f"{lengths.lists[-1]} tokens, so lists would be cut before their end; set rl.max_new_tokens="
            f"{_round_up(max(HEADROOM * lengths.list_tokens, lengths.lists[-1]), 32)}"
        )
    longest = min(lengths.prompts[-1], prompt_tokens)
    if longest + lengths.lists[-1] > context:
        raise ConfigError(
            f"data.max_prompt_tokens = {prompt_tokens}: a conversation of {longest} tokens and a list of "
            f"{lengths.lists[-1]} are more than the model's context of {context}; set data.max_prompt_tokens="
            f"{max(context - lengths.lists[-1], 1)}"
        )
