"""Configurations on disk and on the command line: TOML of a preset and of a method, and `section.key=value` words.

Unknown keys, wrong types and impossible values fail at load, naming the file or word and the key. The resolved copy is
written into the run folder, and a run resumes only under the configuration it was started with.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import tomllib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from rankgrpo.config import Config
from rankgrpo.errors import ConfigError

Set = Annotated[
    list[str],
    arg(name="set", metavar="KEY=VALUE", help="override the configuration, for example rl.lr=1e-5 sft.num_steps=200"),
]
# Keys that change how a run is watched, kept and shared out, not what it computes: a run may resume with other values.
FREE_KEYS = frozenset(
    {
        *("sft.save_every", "sft.keep_last", "rl.save_every", "rl.keep_last"),
        *("rl.vllm_memory", "rl.vllm_sleep", "rl.mismatch_alarm"),
        *("parallel.shard", "parallel.cpu_offload"),
    }
)


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
    source: Path | None = None, overrides: list[str] | None = None, *, method: str | None = None, **direct: Any
) -> Config:
    """Defaults, the TOML file, the method's, `section.key=value` words, `direct` (`section__key`): the later wins.

    Raises ConfigError naming the file or word and the key, and for a method that is none of `method_files`.
    """
    flat: dict[str, Any] = {}
    if source is not None:
        flat |= _read_settings(source)
    if method is not None:
        files = method_files()
        if method not in files:
            raise ConfigError(f"unknown method {method!r}; methods are {', '.join(files)}")
        flat |= _read_settings(files[method])
    for word in overrides or []:
        key, separator, text = word.partition("=")
        if not separator:
            raise ConfigError(f"override {word!r}: expected section.key=value, for example rl.lr=1e-5")
        flat[key.strip()] = _convert(key.strip(), _parse_word(text.strip()), f"override {word!r}")
    flat |= {key.replace("__", "."): value for key, value in direct.items()}
    return _build(flat)


def flatten(config: Config) -> dict[str, Any]:
    """{"seed": ..., "rl.lr": ..., ...}"""
    flat = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{f.name}.{g.name}": getattr(value, g.name) for g in dataclasses.fields(value)}
        else:
            flat[f.name] = value
    return flat


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML that load_config reads back to an equal Config."""
    lines = [f"seed = {config.seed}"]
    for section in (f.name for f in dataclasses.fields(config) if f.name != "seed"):
        lines += ["", f"[{section}]"]
        lines += [
            f"{f.name} = {_toml_value(getattr(getattr(config, section), f.name))}" for f in _fields(config, section)
        ]
    return "\n".join(lines) + "\n"


def changed_keys(saved: Config, current: Config) -> list[str]:
    """`key: saved -> current` for every key on which the two differ and that changes what a run computes."""
    return [f"{key}: {old!r} -> {new!r}" for key, (old, new) in _differing(saved, current).items()]


def own_keys(config: Config) -> dict[str, Any]:
    """`key: value` of the keys that change what is computed and are not at their defaults; no seed, no data path."""
    own = {key: new for key, (_, new) in _differing(Config(), config).items() if key not in ("seed", "data.path")}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}


def _differing(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    before, after = flatten(old), flatten(new)
    return {key: (before[key], after[key]) for key in after if key not in FREE_KEYS and before[key] != after[key]}


def _fields(config: Config, section: str) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(getattr(config, section))


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return repr(value)


@functools.cache
def _known_types() -> dict[str, Any]:
    known: dict[str, Any] = {"seed": int}
    for f in dataclasses.fields(Config):
        if f.name != "seed":
            hints = typing.get_type_hints(f.default_factory)
            known |= {f"{f.name}.{key}": kind for key, kind in hints.items()}
    return known


def read_toml(path: Path, *, what: str = "configuration file") -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError naming the file when it is missing ("no such `what`") or broken."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _read_settings(path: Path) -> dict[str, Any]:
    flat = {}
    for key, value in read_toml(path).items():
        for dotted, leaf in (
            {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        ).items():
            flat[dotted] = _convert(dotted, leaf, str(path))
    return flat


def _parse_word(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string: model.name=tiny


def _convert(key: str, value: Any, source: str) -> Any:
    known = _known_types()
    if key not in known:
        section = key.split(".")[0]
        near = [k for k in known if k.startswith(f"{section}.")] or sorted({k.split(".")[0] for k in known})
        raise ConfigError(f"{source}: unknown key {key!r}; known keys are {', '.join(near)}")
    kind = known[key]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ConfigError(f"{source}: {key} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        return value
    if typing.get_origin(kind) is tuple:
        width = len(typing.get_args(kind))
        numbers = isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
        if not numbers or len(value) != width:
            raise ConfigError(f"{source}: {key} must be a list of {width} numbers, got {value!r}")
        return tuple(float(v) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if (
        isinstance(kind, types.UnionType)
        or not isinstance(value, kind)
        or (kind is not bool and isinstance(value, bool))
    ):
        raise ConfigError(f"{source}: {key} must be {kind.__name__}, got {value!r}")
    return value


def _build(flat: dict[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        if key != "seed":
            section, name = key.split(".", 1)
            sections.setdefault(section, {})[name] = value
    built = {
        f.name: f.default_factory(**sections.get(f.name, {})) for f in dataclasses.fields(Config) if f.name != "seed"
    }
    return Config(seed=flat.get("seed", Config.seed), **built)
