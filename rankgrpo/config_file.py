"""Configurations on disk and on the command line: TOML of a preset and of a method, and `section.key=value` overrides.

Unknown keys, wrong types and impossible values fail at load, naming the file or override and the key. The resolved copy
is written into the run folder, and a run resumes only under the configuration it was started with.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from rankgrpo.config import Config
from rankgrpo.errors import ConfigError
from rankgrpo.files.sections import Fault, SectionError, unknown_key
from rankgrpo.files.template import prompt_text

# Keys that change how a run is watched, kept and shared out, not what it computes: a run may resume with other values.
FREE_KEYS = frozenset(
    {
        *("sft.save_every", "sft.keep_last", "rl.save_every", "rl.keep_last", "rl.stop_on_failure"),
        "rl.log_lists",
        *("rl.vllm_memory", "rl.vllm_sleep", "rl.mismatch_alarm"),
        *("parallel.shard", "parallel.cpu_offload"),
        *("track.kind", "track.project", "track.offline"),
    }
)

SIZES = tuple(f"model.{size}" for size in ("hidden", "layers", "ffn", "heads", "kv_heads", "vocab"))
"""Of the tiny preset: no other model reads them."""
# Keys that nothing reads unless another, one of these, has one of these values.
READ_WITH: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(SIZES, {"model.name": ("tiny",)}),
    **dict.fromkeys(
        (f"adapter.{key}" for key in ("rank", "alpha", "rslora", "targets")), {"adapter.kind": ("lora", "dora")}
    ),
    "rl.gamma": {"rl.returns": ("exp",)},
    "rl.year_tolerance": {"data.item": ("{title} ({year})",)},
    "rl.forbid": {"rl.constrain": ("catalog",), "eval.constrain": ("catalog",)},
    "rl.count_forced": {"rl.constrain": ("catalog",)},
    "sft.constrain": {"rl.constrain": ("catalog",)},
    "rl.second_phase_at": {"rl.schedule": ("two-phase",)},
    "rl.second_phase_lr": {"rl.schedule": ("two-phase",)},
    "rl.sapo_tau": {"rl.surrogate": ("sapo",)},
    "rl.dppo_delta": {"rl.surrogate": ("dppo",)},
    "rl.mismatch_cap": {"rl.mismatch_correction": ("truncate", "mask")},
}
_CHOSEN = "what was chosen for the model"
_SECTIONS = {name: kind for name, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)}


def presets_dir() -> Path:
    """The folder of preset TOML files (experiments/ of the repository, installed as rankgrpo_experiments)."""
    spec = importlib.util.find_spec("rankgrpo_experiments")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).resolve().parents[1] / "experiments"


def preset_file(model: str) -> Path | None:
    """The TOML file of a preset; None for any other model."""
    file = presets_dir() / f"{model}.toml"
    return file if file.is_file() else None


def method_files() -> dict[str, Path]:
    """The named methods, each a TOML file that sets what makes the method and nothing else."""
    files = {path.stem: path for path in (presets_dir() / "methods").glob("*.toml")}
    return dict(sorted(files.items()))


def load_config(
    source: Path | None = None,
    overrides: list[str] | None = None,
    *,
    method: str | None = None,
    saved: bool = False,
    chosen: Mapping[str, Any] | None = None,
    **direct: Any,
) -> Config:
    """Join defaults, the TOML file, the method's, `overrides` (section.key=value), `direct` (section__key); later wins.

    chosen: settings between the defaults and the file, section.key -> value.
    saved: the file is the config.toml of a run, which names every key, also those that the run does not read.
    Raises ConfigError naming the file or override and the key, and for a method that is none of `method_files`.
    """
    flat: dict[str, Any] = {}
    sources: dict[str, str] = {}  # of every key that is set, the file or override that set it last

    def take(settings: dict[str, Any], source: str) -> None:
        flat.update(settings)
        sources.update(dict.fromkeys(settings, source))

    take(dict(chosen or {}), _CHOSEN)
    if source is not None:
        take(read_settings(source), str(source))
    if method is not None:
        files = method_files()
        if method not in files:
            raise ConfigError(f"unknown method {method!r}; methods are {', '.join(files)}")
        take(read_settings(files[method]), str(files[method]))
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"override {override!r}: expected section.key=value, for example rl.lr=1e-5")
        take({key.strip(): _parse_value(text.strip())}, f"override {override!r}")
    take({key.replace("__", "."): value for key, value in direct.items()}, "")
    config, faults = _build(flat)
    if config is not None:
        whole = {_CHOSEN, *([str(source)] if saved else [])}  # made for all keys, not to say what is read
        faults = _unread(config, [key for key in flat if sources[key] not in whole])
    if faults:
        raise ConfigError("\n".join(fault.told(sources) for fault in faults))
    return config


def flatten(config: Config) -> dict[str, Any]:
    """The values by dotted key: {"seed": ..., "rl.lr": ..., ...}."""
    flat = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{f.name}.{g.name}": getattr(value, g.name) for g in dataclasses.fields(value)}
        else:
            flat[f.name] = value
    return flat


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML that load_config reads back to an equal Config.

    It holds the text of a prompt's file: a run keeps the prompt it was trained with, whatever becomes of the file.
    """
    return tomli_w.dumps(dataclasses.asdict(with_prompt_text(config)))


def with_prompt_text(config: Config) -> Config:
    """The configuration with the text of its prompt in place of the file that holds it. Raises ConfigError."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, prompt=prompt_text(config.data.prompt)))


def changed_keys(saved: Config, current: Config) -> list[str]:
    """`key: saved -> current` for every key on which the two differ and that changes what a run computes."""
    return [f"{key}: {old!r} -> {new!r}" for key, (old, new) in _differing(saved, current).items()]


def own_keys(config: Config) -> dict[str, Any]:
    """`key: value` of the keys that change what is computed and are not at their defaults; no seed, no data path."""
    own = {key: new for key, (_, new) in _differing(Config(), config).items() if key not in ("seed", "data.path")}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}


def _differing(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    before, after = flatten(with_prompt_text(old)), flatten(with_prompt_text(new))
    compared = [key for key in after if key not in FREE_KEYS and (_is_read(key, before) or _is_read(key, after))]
    return {key: (before[key], after[key]) for key in compared if before[key] != after[key]}


def _is_read(key: str, flat: Mapping[str, Any]) -> bool:
    return key not in READ_WITH or any(flat[owner] in values for owner, values in READ_WITH[key].items())


def _unread(config: Config, keys: list[str]) -> list[Fault]:
    """Faults of the `keys` that were set and are not read, unless they have their default."""
    flat, defaults = flatten(config), flatten(Config())
    faults = []
    for key in keys:
        if not _is_read(key, flat) and flat[key] != defaults[key]:
            owners = READ_WITH[key]
            needed = " or ".join(f"{owner} = {' or '.join(values)}" for owner, values in owners.items())
            found = " and ".join(f"{owner} is {flat[owner]!r}" for owner in owners)
            faults.append(Fault((key,), f"{key}: is read with {needed} only, and {found}", is_rule=True))
    return faults


def read_toml(path: Path, *, what: str = "configuration file") -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError naming the file when it is missing ("no such `what`") or broken."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a TOML file, section.key -> value, unchecked."""
    flat = {}
    for name, value in read_toml(path).items():
        flat |= {f"{name}.{key}": leaf for key, leaf in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string: model.name=tiny


def _build(flat: Mapping[str, Any]) -> tuple[Config | None, list[Fault]]:
    """The configuration, or None and all that is wrong with these settings."""
    defaults, faults = flatten(Config()), []
    given: dict[str, dict[str, Any]] = {"": {}} | {section: {} for section in _SECTIONS}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        if key in defaults:
            given[section][name] = value
        else:
            section = key.split(".")[0]
            near = [known for known in defaults if known.startswith(f"{section}.")]
            faults.append(unknown_key(key, near or sorted({known.split(".")[0] for known in defaults})))
    made = {}
    for section, kind in _SECTIONS.items():
        try:
            made[section] = kind(**given[section])
        except SectionError as error:
            faults += error.faults
    try:
        config = Config(**given[""], **made)
    except SectionError as error:
        faults += error.faults
    return (None if faults else config), faults
