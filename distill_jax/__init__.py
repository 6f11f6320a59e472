"""Knowledge distillation in JAX: TAKD, DGKD with stochastic teaching, and TESKD."""

from distill_jax import data, interop, methods, models
from distill_jax.data import register_dataset
from distill_jax.methods import register_method
from distill_jax.models import register_network
from distill_jax.processes import ProcessError
from distill_jax.report import EpochEnded, StageEnded, StageInfo, StageStarted
from distill_jax.runs.config import (
    ConfigError,
    Experiment,
    config_arguments,
    default_config,
    load_config,
    pair_arguments,
    resolve,
    smoke,
)
from distill_jax.runs.load import load
from distill_jax.runs.results import Results, StagesFailed
from distill_jax.runs.runner import run
from distill_jax.runs.workdir import WorkdirError
from distill_jax.train.memory import OutOfMemoryError
from distill_jax.train.optim import register_optimizer

__all__ = [
    "ConfigError",
    "EpochEnded",
    "Experiment",
    "OutOfMemoryError",
    "ProcessError",
    "Results",
    "StageEnded",
    "StageInfo",
    "StageStarted",
    "StagesFailed",
    "WorkdirError",
    "config_arguments",
    "data",
    "default_config",
    "interop",
    "load",
    "load_config",
    "pair_arguments",
    "methods",
    "models",
    "register_dataset",
    "register_method",
    "register_network",
    "register_optimizer",
    "resolve",
    "run",
    "smoke",
]
