"""Networks of the authors: outputs in both modes, gradients, running statistics."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import models
from distill_jax.interop import choosing, torch_weights
from distill_jax.methods import losses
from experiments import golden
from experiments.parity.cases import RUNNING_STATISTICS, Case, Found, load


def shown(outputs: models.Outputs) -> list[jax.Array]:
    """Logits of the backbone, logits of the branches, feature of the backbone, of the branches."""
    everything = (outputs, *outputs.branches)
    if not outputs.branches:
        return [outputs.logits]
    return [x.logits for x in everything] + [x.feature for x in everything]


def check_model(case: Case, dtype: str) -> Iterator[Found]:
    """Outputs in both modes, gradients of the cross-entropy, running statistics afterwards."""
    meta, n = case.meta, case.meta["n"]
    network, variables = load(case, meta["name"], meta["state"], meta["seed"], dtype)
    names = choosing.names_in([key for key, _ in meta["state"]], network)
    parameters = models.count_parameters(network)
    yield Found("params", abs(parameters - meta["params"]), 0.5)
    images = jnp.asarray(golden.images(n, meta["seed"]), dtype)
    labels = golden.labels(n, meta["seed"], meta["classes"])
    evaluated = jax.jit(lambda v: shown(network.apply(v, images)[0]))(variables)

    def loss_of(params):
        outputs, stats = network.apply({**variables, "params": params}, images, train=True)
        ce = jnp.mean(losses.cross_entropy(outputs.logits, labels))
        return ce, (shown(outputs), stats)

    trained = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(variables["params"])
    (ce, (outputs, stats)), grads = trained
    for mode, found in (("eval", evaluated), ("train", outputs)):
        for i, output in enumerate(found):
            yield case.compare(f"{mode}_{i}", output)
    yield case.compare("ce", ce)
    grads = torch_weights.to_state_dict({"params": grads})
    yield case.compare(
        "grad_norms", [np.linalg.norm(grads[names[key]]) for key in meta["grad_keys"]]
    )
    stats = torch_weights.to_state_dict(stats)
    for key, reference in meta["bn_after"].items():
        found = [np.mean(stats[names[key]]), np.linalg.norm(stats[names[key]])]
        yield case.compare(key, found, reference, RUNNING_STATISTICS)
