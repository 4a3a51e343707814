"""The loss inside other trainers, one module a trainer. A trainer is imported only with its own module."""

from __future__ import annotations

import re
import warnings


def warn_if_untested(package: str, version: str, first: tuple[int, ...], past: tuple[int, ...]) -> None:
    """Warn of a version outside [first, past), on which the tests of `tests/peers` do not run."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[: len(past)])
    if not first <= numbers < past:
        tested = f">={'.'.join(map(str, first))},<{'.'.join(map(str, past))}"
        warnings.warn(
            f"{package} {version} is outside of what rankgrpo is tested with, {package}{tested}: compare a gradient "
            "with that of rank_grpo_loss before you train",
            stacklevel=3,
        )
