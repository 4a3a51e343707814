"""`rankgrpo plan`: its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from rankgrpo.errors import ConfigError
from rankgrpo.files.options import Overrides, check_least

if TYPE_CHECKING:
    from rankgrpo.config import Config
    from rankgrpo.sizing.plan import Rates


def plan(
    model: Positional[Annotated[str, arg(help="preset (see `rankgrpo models`) or folder with a config.json")]],
    *,
    gpus: Annotated[int, arg(help="GPUs of one node, one process each")] = 1,
    gpu_memory: Annotated[float, arg(help="GB of one GPU")] = 80.0,
    num_train: Annotated[int, arg(help="training samples; with them the hours of the whole RL run are shown")] = 0,
    longest_list: Annotated[
        int | None, arg(help="tokens of the longest list held to the catalog; `rankgrpo data check` prints it")
    ] = None,
    config: Annotated[Path | None, arg(help="TOML file (default: the preset's)")] = None,
    overrides: Overrides = [],  # noqa: B006
    rates: Annotated[
        list[str], arg(metavar="NAME=VALUE", help="assumptions behind the seconds, for example train_mfu=0.3")
    ] = [],  # noqa: B006
) -> None:
    """Whether a Rank-GRPO run fits on these GPUs, and the seconds a step that given rates mean; nothing is loaded.

    Try:
      rankgrpo plan qwen2.5-0.5b --gpus 4 --gpu-memory 80
      rankgrpo plan llama3.2-3b --gpus 4 --gpu-memory 141 --num-train 383013 --rates train_mfu=0.3 list_tokens=200
      rankgrpo plan qwen2.5-0.5b --gpu-memory 24 --set rl.constrain=catalog --longest-list 412
      rankgrpo plan path/to/model --gpus 1 --gpu-memory 24 --set rl.token_budget=8192 rl.group_size=4
    """
    from rankgrpo.config import with_steps
    from rankgrpo.config_file import load_config, preset_file
    from rankgrpo.sizing.architecture import find_architecture
    from rankgrpo.sizing.plan import Machine, make_plan, render

    check_least(0, num_train=num_train)
    check_least(1, gpus=gpus, longest_list=longest_list)
    settings = load_config(config or preset_file(model), overrides, model__name=model)
    arch = find_architecture(model, settings.model)
    if num_train > 0:
        settings = with_steps(settings, num_train)
    settings = with_longest_list(settings, longest_list)
    print(render(make_plan(model, arch, settings, Machine(gpus, gpu_memory), parse_rates(rates))))


def with_longest_list(config: Config, tokens: int | None) -> Config:
    """`config` with lists of at most so many tokens where they are held to the catalog: none is cut there.

    Raises ConfigError where they are held and tokens is None, or given for lists that are not.
    """
    held = config.rl.constrain == "catalog"
    if held and tokens is None:
        raise ConfigError(
            "rl.constrain = catalog: the catalog's lines say how long lists can be; give --longest-list, which "
            "`rankgrpo data check DATA --tokenizer MODEL` prints, or count free lists: --set rl.constrain=none"
        )
    if tokens is not None and not held:
        raise ConfigError("--longest-list is of lists held to the catalog; --set rl.max_new_tokens is for others")
    return config if tokens is None else replace(config, rl=replace(config.rl, max_new_tokens=tokens))


def parse_rates(words: Sequence[str]) -> Rates:
    """Rates with some given as "name=number"."""
    from rankgrpo.sizing.plan import Rates  # torch is not far behind it, and `--help` does not need it

    given = {}
    known = [f.name for f in fields(Rates)]
    for word in words:
        name, _, number = word.partition("=")
        if name not in known:
            raise ValueError(f"rate {word!r}: expected NAME=NUMBER with a name of {', '.join(known)}")
        try:
            given[name] = float(number)
        except ValueError:
            raise ValueError(f"rate {word!r}: expected a number after =") from None
    return Rates(**given)
