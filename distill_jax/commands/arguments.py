"""The arguments of the commands: flags of a command's own, and a config with fields to override."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from distill_jax.runs.config import FIELDS, SECTIONS, find_config, load_config

HELP = ("-h", "-help", "--help", "--helpshort", "--helpfull")
_CONFIG = re.compile(r"--?config(=|$)")
_OVERRIDE = re.compile(r"--?config\.([^=]+)=(.*)", re.DOTALL)


class ArgumentsError(Exception):
    """A command line that cannot be read; the message says what was expected."""


class Flag(NamedTuple):
    """A flag of a command, a text.

    Args:
      name: without dashes.
      about: a line for the help.
      default: where it is not given.
      choices: the values that it may have; any where empty.
    """

    name: str
    about: str
    default: str | None = None
    choices: tuple[str, ...] = ()


class Command(NamedTuple):
    """A command.

    Args:
      about: a line for the help.
      run: what it does with its arguments: the words and flags by name, `config` and `config_file`;
        returns the exit code.
      words: the names of the arguments that stand without dashes.
      more: the name of a list of further ones; "" takes none.
      flags: those that it takes.
      config: whether it takes a config: "required", "optional" or "no".
    """

    about: str
    run: Callable[[SimpleNamespace], int]
    words: tuple[str, ...] = ()
    flags: tuple[Flag, ...] = ()
    config: str = "no"
    more: str = ""


def parse(name: str, command: Command, argv: Sequence[str]) -> SimpleNamespace:
    """Reads the arguments of a command; its config file, if any, is run.

    Raises:
      ArgumentsError: an unknown flag or word, or a value that cannot be read.
      ConfigError: see `load_config`.
    """
    values = flags.FlagValues()
    for flag in command.flags:
        if flag.choices:
            flags.DEFINE_enum(flag.name, flag.default, flag.choices, flag.about, values)
        else:
            flags.DEFINE_string(flag.name, flag.default, flag.about, values)
    given, source = [_quoted(argument) for argument in argv], ""
    config = None
    if command.config != "no":
        text, given = _take_config(given)
        if text is None and command.config == "required":
            raise ArgumentsError(
                f"{name} needs a config: --config=FILE.py, the --config=NAME of one that comes "
                "with the package, such as quickstart, or the folder of a run"
            )
        if text is not None:
            source, config = str(find_config(text)), load_config(text)
            _check_sections(given)
    words = _parsed(values, config, given)
    own_words, rest = words[: len(command.words)], words[len(command.words) :]
    if len(own_words) != len(command.words) or (rest and not command.more):
        expected = " ".join(command.words) or "values as --config.FIELD=VALUE"
        got = f"got {' '.join(map(repr, words))}" if words else "got none"
        raise ArgumentsError(f"{name}: expected {expected}, {got}")
    own = {flag.name: values[flag.name].value for flag in command.flags}
    own |= dict(zip(command.words, own_words, strict=True))
    own |= {command.more: rest} if command.more else {}
    return SimpleNamespace(**own, config=config, config_file=source)


def _parsed(
    values: flags.FlagValues, config: ml_collections.ConfigDict | None, given: list[str]
) -> list[str]:
    """Sets flags and the config's fields; the words among the arguments."""
    argv = ["distill_jax", *given]
    try:
        if config is not None:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        return values(argv)[1:]
    except (AttributeError, KeyError) as error:
        # ml_collections' answer to an unknown field; its text may suggest another.
        message = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").strip("\"'").split())
        raise ArgumentsError(f"--config has no such field: {message}") from None
    except flags.UnrecognizedFlagError as error:
        hint = "" if config is not None else "; fields of a config need a --config"
        override = error.flagname.startswith("config.")
        raise ArgumentsError(f"{error}{hint if override else ''}") from None
    except flags.Error as error:
        raise ArgumentsError(str(error)) from None


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and all other arguments."""
    places = [i for i, argument in enumerate(argv) if _CONFIG.match(argument)]
    if not places:
        return None, argv
    if len(places) > 1:
        raise ArgumentsError(f"one --config is expected, got {len(places)}")
    (i,) = places
    text, end = argv[i].partition("=")[2], i + 1
    if "=" not in argv[i]:
        text, end = "".join(argv[i + 1 : i + 2]), i + 2
    if not text:
        raise ArgumentsError("--config is empty: expected FILE.py, NAME or the folder of a run")
    return text, argv[:i] + argv[end:]


def _check_sections(argv: list[str]) -> None:
    """Raises ArgumentsError where a section is given a value, which would replace its fields."""
    for argument in argv:
        found = _OVERRIDE.fullmatch(argument)
        if found and found[1] in SECTIONS:
            field = next(field for field in FIELDS if field.section == found[1])
            raise ArgumentsError(
                f"config.{found[1]} is a section: give its fields, such as "
                f"--config.{field.path}=VALUE; got {found[2]!r}"
            )


def _quoted(argument: str) -> str:
    """The argument; names as a tuple of one text where they are not one already.

    ml_collections reads a tuple as Python, and a>b, a<b+c;d<a or evolving:a are none. The config
    takes the text apart.
    """
    found = re.fullmatch(r"(--?config\.(?:networks|guidance|students)=)([^(\[].*)", argument)
    return f"{found[1]}({found[2]!r},)" if found else argument


def usage(name: str, command: Command) -> str:
    """The help of a command: how it is called, and its flags."""
    words = "".join(f" {word.upper()}" for word in command.words)
    words += f" [{command.more.upper()} ...]" if command.more else ""
    config = {"no": "", "optional": " [--config=CONFIG]", "required": " --config=CONFIG"}
    head = f"distill_jax {name}{words}{config[command.config]}"
    rows = [(f"--{flag.name}", flag.about) for flag in command.flags]
    if command.config != "no":
        head += " [--config.FIELD=VALUE ...]"
        about = (
            "FILE.py with get_config, FILE.py:ARGUMENTS, the NAME of a config that comes with the "
            "package, or the folder of a run. A Python file is run."
        )
        rows.insert(0, ("--config", about))
    return f"usage: {head}\n\n{textwrap.fill(command.about, 80)}\n\n{columns(rows)}"


def columns(rows: Sequence[tuple[str, str]], width: int = 80) -> str:
    """Two columns of text, the second wrapped."""
    first = max((len(name) for name, _ in rows), default=0) + 4
    return "\n".join(
        textwrap.fill(
            text, width, initial_indent=f"  {name}".ljust(first), subsequent_indent=" " * first
        )
        for name, text in rows
    )
