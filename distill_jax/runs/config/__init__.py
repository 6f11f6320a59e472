"""The config of an experiment: its defaults, and the typed values that come of it.

A config file starts from `default_config`; `resolve` checks everything that can be checked without
data and turns it into an `Experiment`.
"""

from distill_jax.runs.config.defaults import default_config, smoke
from distill_jax.runs.config.experiment import PROTOCOLS, Experiment, Row, checkpoint_due, resolve
from distill_jax.runs.config.fields import ConfigError

__all__ = [
    "PROTOCOLS",
    "ConfigError",
    "Experiment",
    "Row",
    "checkpoint_due",
    "default_config",
    "resolve",
    "smoke",
]
