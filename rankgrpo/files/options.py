"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import arg

from rankgrpo.errors import ConfigError

Overrides = Annotated[
    list[str],
    arg(name="set", metavar="KEY=VALUE", help="override the configuration, for example rl.lr=1e-5 sft.num_steps=200"),
]


def check_least(least: int, /, **options: float | None) -> None:
    """Raise ConfigError for an option (by its name in Python, None where it was not given) that is below `least`."""
    for name, value in options.items():
        if value is not None and not value >= least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
