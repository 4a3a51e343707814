"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import arg

Overrides = Annotated[
    list[str],
    arg(name="set", metavar="KEY=VALUE", help="override the configuration, for example rl.lr=1e-5 sft.num_steps=200"),
]
