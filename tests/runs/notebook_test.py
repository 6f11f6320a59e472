"""As in a notebook: what registered code names gets another value, and the code stays an object."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distill_jax
from distill_jax import data, methods, models
from distill_jax.train import optim

CONFIG = {
    "networks": ("notebook_net", "notebook_net#2"),
    "guidance": ("direct",),
    "recipe": {"epochs": 1, "batch_size": 16, "optimizer": "notebook_sgd"},
    "methods": {"notebook_loss": 1.0},
}
LOGITS = LOSS = RATE = INPUTS = 1.0


def init(key):
    return {"params": {"w": jax.random.normal(key, (6, 2))}}


def apply(variables, x):
    return LOGITS * (x @ variables["params"]["w"])


@jax.jit
def difference(a, b):
    return LOSS * jnp.mean((a - b) ** 2, -1)


def loss(student, teacher, labels, hyper):
    return difference(student.logits, teacher.logits)


def sgd(schedule, hyper):
    return optax.sgd(lambda step: RATE * schedule(step))


def preprocess(x, key, train):
    return INPUTS * x


def register():
    models.register_network("notebook_net", lambda classes, inputs: (init, apply))
    methods.register_method("notebook_loss", loss)
    optim.register_optimizer("notebook_sgd", sgd)


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    monkeypatch.setattr(models.registry, "_REGISTERED", dict(models.registry._REGISTERED))
    monkeypatch.setattr(methods.registry, "_registered", dict(methods.registry._registered))
    monkeypatch.setattr(optim, "_registered", dict(optim._registered))
    register()


def trained():
    """The stage's id, and its weights and losses."""
    x = np.random.default_rng(0).normal(size=(96, 6)).astype(np.float32)
    y = (x[:, 0] > 0).astype(int)
    task = data.Task(x[0], 2, preprocess)
    arrays = data.from_arrays((x[:64], y[:64]), (x[64:], y[64:]), task=task, valid_fraction=0.25)
    results = distill_jax.run(CONFIG, dataset=arrays, progress=False)
    (history,), (network,) = results.histories.values(), results.networks.values()
    weights = np.asarray(network[1]["params"]["w"]).ravel().tolist()
    return results.rows[0]["stage"], [*weights, history[0]["train_loss"]]


@pytest.mark.parametrize(
    ("name", "again"), [("LOGITS", False), ("LOSS", True), ("RATE", False), ("INPUTS", False)]
)
def test_another_value_of_what_code_names_trains_otherwise(name, again, monkeypatch):
    first = trained()
    monkeypatch.setitem(globals(), name, 3.0)
    if again:
        register()
    other = trained()
    assert other[0] != first[0] and np.abs(np.subtract(other[1], first[1])).max() > 1e-3
