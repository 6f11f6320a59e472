"""Configs as people have them: Python files, those that come with the package, recorded runs."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ml_collections

from distill_jax import data, graph, methods, models
from distill_jax.runs.config.defaults import SECTIONS, default_config
from distill_jax.runs.config.fields import ConfigError, merge, unknown
from distill_jax.train import optim

RECORDED, RUN = "config.json", "run.json"  # in the folder of a run
RESOLVED = "resolved"  # its section that is no field of a config


class ConfigSource(NamedTuple):
    """Where a config comes from.

    Args:
      path: a Python file with `get_config`, or the config.json of a run.
      arguments: what `get_config` is given; None where nothing is.
    """

    path: Path
    arguments: str | None

    def __str__(self) -> str:
        return str(self.path) if self.arguments is None else f"{self.path}:{self.arguments}"


def find_config(text: str) -> ConfigSource:
    """Finds the config that a text names.

    Args:
      text: FILE.py, the NAME of one that comes with the package, a run's folder or its config.json;
        of the first two with `:ARGUMENTS` where `get_config` is to be given some.

    Raises:
      ConfigError: there is none.
    """
    given, colon, arguments = text, "", ""
    if not _path(text).exists():
        given, colon, arguments = text.partition(":")
    path = _path(given)
    if not path.exists():
        packaged = {file.stem: file for file in _packaged()}
        if given not in packaged:
            what = "config files of the package" if path.suffix == "" else "config"
            hint = unknown(what, given, tuple(packaged))
            raise ConfigError(f"there is no file {given}. {hint}")
        path = packaged[given]
    if path.is_dir():
        path /= RECORDED
    if not path.is_file() or path.suffix not in (".py", ".json"):
        raise ConfigError(f"{text} is no config: expected a .py file, or the folder of a run")
    if colon and path.suffix != ".py":
        raise ConfigError(f"{path} takes no arguments, got {arguments!r}: it is no Python file")
    return ConfigSource(path.absolute(), arguments if colon else None)


def load_config(text: str) -> ml_collections.ConfigDict:
    """Loads a config; a Python file is run for it.

    Args:
      text: see `find_config`.

    Raises:
      ConfigError: there is none, it has no `get_config`, or what that gives is no config.
    """
    source = find_config(text)
    if source.path.suffix != ".py":
        return _recorded(source.path)
    config = _run(source)
    if isinstance(config, Mapping):  # of the fields that differ from the defaults
        return _filled(merge(default_config().to_dict(), config, "config"))
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"get_config of {source.path} gives a {type(config).__name__}: expected a ConfigDict, "
            "such as default_config() with some fields changed"
        )
    return config


def _recorded(path: Path) -> ml_collections.ConfigDict:
    """The config that a run recorded, with the names that it uses registered."""
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as the config of a run: {error}") from error
    if not isinstance(saved, dict) or not isinstance(saved.get(RESOLVED), dict):
        raise ConfigError(f"{path} is not the {RECORDED} of a run: expected a section {RESOLVED!r}")
    registered = saved.pop(RESOLVED).get("registered", {})
    if _unknown(registered):
        _run_recorded_file(path)
    if unknown_names := _unknown(registered):
        raise ConfigError(
            f"{path} uses {', '.join(unknown_names)}, registered by its user and not here: "
            "register the same first"
        )
    return _filled(saved)


def _run_recorded_file(path: Path) -> None:
    """Runs the Python file that a run's config came from, for what it registers, where it is."""
    try:
        file = json.loads(path.with_name(RUN).read_text())["config_file"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if file and Path(file.partition(":")[0]).suffix == ".py" and not isinstance(file, list):
        with contextlib.suppress(ConfigError):  # it is gone
            _run(find_config(file))


def _unknown(registered: Mapping[str, Any]) -> list[str]:
    """Which of the names that a run found registered are not so here, each with its kind."""
    known = {
        "networks": lambda name: models.is_registered(graph.architecture(name)[0]),
        "methods": methods.is_registered,
        "optimizers": optim.is_registered,
        "datasets": data.is_registered,
    }
    return [
        f"{kind.removesuffix('s')} {name!r}"
        for kind, is_known in known.items()
        for name in registered.get(kind, ())
        if not is_known(name)
    ]


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"config {text}: {error}") from None


def _packaged() -> list[Path]:
    """The configs that come with the package: inside it, or beside it where it is not installed."""
    package = Path(__file__).parents[2]
    folders = (package / "configs", package.parent / "configs")
    return sorted(next((f for f in folders if f.is_dir()), package).glob("[!_]*.py"))


def _run(source: ConfigSource) -> Any:
    """What the file's `get_config` returns."""
    name = f"distill_jax_config_{source.path.stem}"
    spec = importlib.util.spec_from_file_location(name, source.path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{source.path} is no Python file")
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickles and dataclasses of the file look their module up
    spec.loader.exec_module(module)
    if not callable(get_config := getattr(module, "get_config", None)):
        raise ConfigError(
            f"{source.path} has no function get_config: expected one that returns a config, see "
            "the quickstart's"
        )
    given = () if source.arguments is None else (source.arguments,)
    try:
        inspect.signature(get_config).bind(*given)
    except TypeError as error:
        raise ConfigError(f"get_config of {source.path}: {error}, got {list(given)}") from None
    return get_config(*given)


def _filled(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The default config with these values in it."""
    config = default_config()
    _fill(config, values)
    return config


def _fill(config: ml_collections.ConfigDict, values: Mapping[str, Any], section: str = "") -> None:
    for name, value in values.items():
        path = f"{section}.{name}" if section else name
        if name not in config:
            raise ConfigError(unknown(f"config.{path}", name, tuple(config)))
        if path in SECTIONS:
            _fill(config[name], value, path)
        else:
            config[name] = tuple(value) if isinstance(config[name], tuple) else value
