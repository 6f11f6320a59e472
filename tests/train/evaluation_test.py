"""Evaluation counts every example once: the same integers for every batch size and device count."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn
from marks import slow

from distill_jax import data, models
from distill_jax.train import inference, sharding

N = 61  # a prime: no batch and no number of devices divides it


class Linear(nn.Module):
    """The smallest network there is, to be compiled for every batch size in little time."""

    @nn.compact
    def __call__(self, images, mode):
        x = images.reshape(len(images), -1)
        return models.Outputs(nn.Dense(3)(x), x, ())


@pytest.fixture(scope="module")
def case():
    """A network, variables, data, and how many the network has right, counted by hand."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (N, 8, 8, 1), np.uint8)
    labels = rng.integers(0, 3, N).astype(np.int32)
    dataset = data.from_arrays((images, labels), (images, labels), classes=3, valid_fraction=0)
    network = models.Network("linear", Linear(), 3, (8, 8, 1))
    variables = {"batch_stats": {}, **network.init(jax.random.key(1))}
    outputs = network.apply(variables, data.normalise(images, dataset.mean, dataset.std))[0]
    right = int((np.argmax(outputs.logits, -1) == labels).sum())
    assert 0 < right < N
    return network, variables, dataset, np.asarray(outputs.logits), right


FEW = (1, 2, 7, 30, 61, 64)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("every", [False, *slow(True)])
def test_counts_are_the_same_for_every_batch_size(case, mode, devices, every, monkeypatch):
    network, variables, dataset, expected, right = case
    topology = sharding.Topology(mode, devices)
    exact = expected.astype(np.float64)
    losses = np.log(np.exp(exact).sum(1)) - exact[np.arange(N), dataset.test.labels]
    for size in range(1, 65) if every else FEW:
        monkeypatch.setitem(inference.PART, "cpu", size)
        monkeypatch.setattr(inference, "DISPATCH_BYTES", size * (size % 5) * 64 * devices)
        pairs = [(network, variables)]
        shown = inference.teacher_outputs(pairs, dataset.test, dataset, topology)
        chex.assert_shape(shown.logits, (N, 1, 3))
        np.testing.assert_allclose(shown.logits[:, 0], expected, rtol=1e-5, atol=1e-6)
        placed = inference.device_put(dataset.test, topology, dataset.classes)
        for split in (dataset.test, placed):
            found = inference.evaluate(pairs, split, dataset, topology)[0]
            assert found["accuracy"] == right / N
            assert found["loss"] == pytest.approx(losses.sum() / N, rel=1e-5)


@dataclasses.dataclass(frozen=True)
class AsOnGPU(sharding.Topology):
    """Chooses what a GPU is given."""

    backend = "gpu"


@pytest.mark.parametrize("devices", [1, 2])
def test_networks_that_are_alike_run_at_once_on_a_gpu(case, devices, monkeypatch):
    network, variables, dataset, *_ = case
    other = dataclasses.replace(network, name="other")
    monkeypatch.setattr(inference, "DISPATCH_BYTES", 64 * 64)
    changed = jax.tree.map(lambda x: 1 - x, variables)
    pairs = [(network, variables), (other, variables), (network, changed)]
    called = []
    outputs_program = inference._outputs_program
    monkeypatch.setattr(
        inference,
        "_outputs_program",
        lambda *a: called.append(a[:2]) or outputs_program(*a),
    )
    found = inference.evaluate(pairs, dataset.test, dataset, AsOnGPU(devices=devices))
    assert called == [(network, 2), (other, 1)]
    one_by_one = [inference.evaluate([pair], dataset.test, dataset)[0] for pair in pairs]
    assert found[0]["accuracy"] != found[2]["accuracy"]
    for own, expected in zip(found, one_by_one, strict=True):
        assert own["accuracy"] == expected["accuracy"]
        assert own["loss"] == pytest.approx(expected["loss"], rel=1e-5)
