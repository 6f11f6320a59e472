"""What follows the colon of `--config=FILE.py:cifar100,smoke`: the arguments of a config file."""

from __future__ import annotations

import types

from distill_jax.runs.config.fields import ConfigError, unknown

SMOKE = "smoke"


def config_arguments(text: str, **choices: tuple[str, ...]) -> types.SimpleNamespace:
    """Parses the comma-separated arguments of a config file.

    Args:
      text: what `get_config` is given.
      **choices: the values of each argument, of which one may be named; the first where none is.

    Returns:
      The value of each argument, and `smoke`: whether that word stands among them.

    Raises:
      ConfigError: a word that is none of these, or two values of one argument.

    Examples:
      >>> given = config_arguments("cifar100,smoke", dataset=("cifar10", "cifar100"))
      >>> given.dataset, given.smoke
      ('cifar100', True)
    """
    argument_of = {value: name for name, values in choices.items() for value in values}
    given: dict[str, str] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        if word not in (*argument_of, SMOKE):
            raise ConfigError(unknown("arguments of the config file", word, (*argument_of, SMOKE)))
        name = argument_of.get(word, SMOKE)
        if given.setdefault(name, word) != word:
            raise ConfigError(
                f"arguments of the config file name one {name}, got {given[name]} and {word}"
            )
    chosen = {name: given.get(name, values[0]) for name, values in choices.items()}
    return types.SimpleNamespace(**chosen, smoke=SMOKE in given)


def pair_arguments(text: str, *, pair: str, small: str) -> types.SimpleNamespace:
    """Parses the arguments of a config file of two networks: TEACHER:STUDENT, and `smoke`.

    Args:
      text: what `get_config` is given.
      pair: taken where none is named.
      small: taken where none is named, for smoke.

    Returns:
      `teacher`, `student`, `smoke`, and `named`: the pairs of the text, one or none.

    Raises:
      ConfigError: another word, two pairs, or a part of one that is empty.
    """
    words = text.split(",")
    named = [word for word in words if ":" in word]
    given = config_arguments(",".join(word for word in words if ":" not in word))
    chosen = named[0] if named else small if given.smoke else pair
    teacher, _, student = chosen.partition(":")
    if len(named) > 1 or not (teacher and student):
        raise ConfigError(f"a pair is TEACHER:STUDENT, got {text!r}")
    return types.SimpleNamespace(teacher=teacher, student=student, smoke=given.smoke, named=named)
