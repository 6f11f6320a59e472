"""Knowledge distillation in JAX: TAKD, DGKD with stochastic teaching, and TESKD."""

from distill_jax.runs.config import (
    ConfigError,
    Experiment,
    config_arguments,
    default_config,
    resolve,
    smoke,
)
from distill_jax.runs.runner import Results, run

__all__ = [
    "ConfigError",
    "Experiment",
    "Results",
    "config_arguments",
    "default_config",
    "resolve",
    "run",
    "smoke",
]
