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
