"""Keys of verl's configuration that Rank-GRPO reads."""

from __future__ import annotations

from typing import Any

from rankgrpo.errors import ConfigError


def num_ranks_of(algorithm: Any) -> int:
    """K, from the key `num_ranks` of verl's section `algorithm`; ConfigError without it."""
    num_ranks = option(algorithm, "num_ranks", None)
    if num_ranks is None:
        raise ConfigError("the length of the list that is asked for is missing: set +algorithm.num_ranks=20")
    return int(num_ranks)


def option(config: Any, name: str, default: Any) -> Any:
    """A key of a section, which verl holds as a mapping in some places and as an object in others."""
    if config is None:
        return default
    return config.get(name, default) if hasattr(config, "get") else getattr(config, name, default)
