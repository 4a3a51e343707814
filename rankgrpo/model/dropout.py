"""Dropout is off while a policy is trained: old and new log-probs must differ by the update alone."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

WORD = "drop"


def switch_off_dropout(model: PreTrainedModel) -> list[str]:
    """Set every rate of dropout in the model and its configuration to 0; returns those that were not, as key = rate.

    A rate is a number whose name has WORD in it, wherever a module or a configuration keeps it. Jitter is left alone:
    PhiMoE's is also a threshold of its router, in evaluation too.
    """
    found: dict[str, None] = {}
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        for name in _rates(vars(config)):
            found[f"{name} = {getattr(config, name):g}"] = None
            setattr(config, name, 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            found.setdefault(f"dropout = {module.p:g}")
            module.p = 0.0
        for name in _rates(vars(module)):
            found.setdefault(f"{name} = {getattr(module, name):g}")
            setattr(module, name, 0.0)
    return list(found)


def _rates(values: dict) -> list[str]:
    return [
        name
        for name, value in values.items()
        if WORD in name and isinstance(value, int | float) and not isinstance(value, bool) and value
    ]
