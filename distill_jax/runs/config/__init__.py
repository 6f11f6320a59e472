"""The config of an experiment: its defaults, and the typed values that come of it.

A config file starts from `default_config`; `resolve` checks everything that can be checked without
data and turns it into an `Experiment`.
"""

from distill_jax.runs.config.arguments import config_arguments, pair_arguments
from distill_jax.runs.config.defaults import FIELDS, SECTIONS, Field, default_config
from distill_jax.runs.config.experiment import CLASSIFIER, LOGITS, Comparison, Experiment
from distill_jax.runs.config.fields import ConfigError
from distill_jax.runs.config.files import (
    RECORDED,
    RESOLVED,
    RUN,
    ConfigSource,
    find_config,
    load_config,
)
from distill_jax.runs.config.help import fields_help
from distill_jax.runs.config.resolve import (
    PROTOCOLS,
    checkpoint_due,
    fields_of,
    resolve,
    swept_fields,
)
from distill_jax.runs.config.smoke import smoke

__all__ = [
    "CLASSIFIER",
    "FIELDS",
    "LOGITS",
    "PROTOCOLS",
    "RECORDED",
    "RESOLVED",
    "RUN",
    "SECTIONS",
    "ConfigError",
    "ConfigSource",
    "Experiment",
    "Comparison",
    "Field",
    "checkpoint_due",
    "config_arguments",
    "default_config",
    "fields_help",
    "fields_of",
    "find_config",
    "load_config",
    "pair_arguments",
    "resolve",
    "smoke",
    "swept_fields",
]
