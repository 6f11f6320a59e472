"""Networks by name. What leaves this room is `Network`: its `init`, its `apply`, its `head`."""

from distill_jax.models.basics import Outputs, Variables
from distill_jax.models.branched import BRANCHED, backbone_name
from distill_jax.models.families import FAMILIES, MODELS, published_rate
from distill_jax.models.indices import Indices
from distill_jax.models.logits_table import LogitsTable, logits_table
from distill_jax.models.network import (
    DTYPES,
    Network,
    count_flops,
    count_parameters,
    deploy,
    run_once,
)
from distill_jax.models.registry import build, check_name, is_registered, register_network

__all__ = [
    "BRANCHED",
    "DTYPES",
    "FAMILIES",
    "Indices",
    "LogitsTable",
    "MODELS",
    "Network",
    "Outputs",
    "Variables",
    "backbone_name",
    "build",
    "check_name",
    "count_flops",
    "count_parameters",
    "deploy",
    "is_registered",
    "logits_table",
    "published_rate",
    "register_network",
    "run_once",
]
