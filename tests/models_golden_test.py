"""Every network against the outputs of its authors' own code, from the same weights and images."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses, models
from distill_jax.interop import torch_weights

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = sorted(GOLDEN.glob("model_*.npz"))
OURS = {"cifarresnet": "cifar_resnet", "seresnet": "cifar_senet", "resnext": "cifar_resnext"}

_spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fill)


def our_name(meta):
    """Our name of a golden case's network: `resnet_our.cifarresnet18` is one of the authors'."""
    if meta["kind"] != "teskd":
        return meta["name"]
    function = meta["name"].rpartition(".")[2]
    family = function.rstrip("0123456789")
    return f"evolving:{OURS.get(family, 'cifar_' + family)}{function.removeprefix(family)}"


def shown(outputs):
    """Outputs in the golden order: all logits, then all features, the backbone's first."""
    parts = (outputs, *outputs.branches)
    return [part.logits for part in parts] + [part.feature for part in parts]


def error(ours, theirs):
    """The largest absolute difference over the largest magnitude of the reference."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def training_gradient(network, variables, images, labels):
    """((mean cross-entropy, (outputs, batch statistics)), its gradient) in training mode."""

    def loss(params):
        outputs, batch_stats = network.apply({**variables, "params": params}, images, train=True)
        return losses.cross_entropy(outputs.logits, labels).mean(), (shown(outputs), batch_stats)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


def float64_gradient(network, variables, images, labels):
    """The gradient alone, as NumPy arrays, computed in float64."""
    network = dataclasses.replace(network, dtype="float64")
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)
        images = jnp.asarray(images, jnp.float64)
        _, gradient = training_gradient(network, variables, images, labels)
        return jax.tree.map(np.asarray, gradient)


def test_there_are_golden_models():
    assert len(CASES) >= 9


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_golden_model(case):
    golden = np.load(case)
    meta = json.loads(str(golden["meta"]))
    network = models.build(our_name(meta), meta["classes"], (32, 32, 3))
    assert models.count_parameters(network) == meta["params"]
    state = {key: fill.fill(key, shape, meta["seed"]) for key, shape in meta["state"]}
    variables = torch_weights.from_state_dict(state, network)
    images = fill.images(meta["n"], meta["seed"])
    labels = fill.labels(meta["n"], meta["seed"], meta["classes"])

    (ce, (trained, batch_stats)), gradient = training_gradient(network, variables, images, labels)
    evaluated = jax.jit(lambda v: shown(network.apply(v, images)[0]))(variables)
    found = {"ce": ce}
    found |= {f"eval_{i}": array for i, array in enumerate(evaluated)}
    found |= {f"train_{i}": array for i, array in enumerate(trained)}
    bound = {key: max(1e-5, 30 * noise) for key, noise in meta["noise"].items()}
    assert bound.keys() == set(golden.files) - {"meta"}
    for key in bound.keys() - {"grad_norms"}:
        assert error(found[key], golden[key]) <= bound[key], key

    def gradient_error(gradient):
        state = torch_weights.to_state_dict({"params": gradient})
        return error([np.linalg.norm(state[k]) for k in meta["grad_keys"]], golden["grad_norms"])

    if gradient_error(gradient) > bound["grad_norms"]:
        # In float32 a value within rounding of a ReLU's corner may fall on its other side.
        assert gradient_error(gradient) < 1e-3
        gradient = float64_gradient(network, variables, images, labels)
    assert gradient_error(gradient) <= bound["grad_norms"]
    running = torch_weights.to_state_dict({"batch_stats": batch_stats})
    for key, mean_and_norm in meta["bn_after"].items():
        mine = [running[key].mean(), np.linalg.norm(running[key])]
        assert error(mine, mean_and_norm) <= 1e-4, key
