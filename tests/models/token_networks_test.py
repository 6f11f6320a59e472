"""Transformers and bidirectional LSTMs: padding counts for nothing, dropout follows the example."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import models
from distill_jax.models import Indices

NAMES = ("transformer_2_32", "bilstm_8")
SIZE, CLASSES = 20, 3


def tokens(values):
    return Indices(jnp.asarray(values, jnp.int32), SIZE)


@functools.cache
def built(name, length):
    spec = Indices(jax.ShapeDtypeStruct((1, length), jnp.int32), SIZE)
    return models.build(name, CLASSES, spec)


@functools.cache
def drawn(name):
    return built(name, 9).init(jax.random.key(0))


def shortened(variables, length):
    """The variables of the same network for fewer tokens."""
    params = dict(variables["params"])
    if "positions" in params:
        params["positions"] = jax.tree.map(lambda x: x[:length], params["positions"])
    return {**variables, "params": params}


IDS = np.array([[3, 7, 7, 2, 0, 0, 0, 0, 0], [5, 1, 4, 4, 9, 8, 19, 0, 0]])


@pytest.mark.parametrize("name", NAMES)
def test_padding_on_the_right_counts_for_nothing(name):
    whole = built(name, 9).apply(drawn(name), tokens(IDS))[0]
    assert whole.logits.shape == (2, CLASSES)
    for row, length in ((0, 4), (1, 7)):
        network, own = built(name, length), shortened(drawn(name), length)
        alone = network.apply(own, tokens(IDS[row : row + 1, :length]))[0]
        np.testing.assert_allclose(alone.logits[0], whole.logits[row], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(alone.feature[0], whole.feature[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_tokens_counts(name):
    swapped = IDS[:1, [1, 0, *range(2, 9)]]
    one, other = (built(name, 9).apply(drawn(name), tokens(x))[0] for x in (IDS[:1], swapped))
    assert np.abs(one.logits - other.logits).max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_drawn_for_each_example_from_the_key_of_the_step(name):
    network = built(name, 9)

    def trained(ids, seed):
        key = jax.random.key(seed)
        return network.apply(drawn(name), tokens(ids), train=True, rngs=key)[0].logits

    twice = np.concatenate([IDS[:1], IDS[:1]])
    one, again, other = trained(twice, 0), trained(twice, 0), trained(twice, 1)
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-4 and np.abs(one[0] - one[1]).max() > 1e-4
    np.testing.assert_allclose(trained(twice[:1], 0)[0], one[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_gives_the_logits_of_the_feature(name):
    network, variables = built(name, 9), drawn(name)
    outputs = network.apply(variables, tokens(IDS))[0]
    np.testing.assert_allclose(network.head(variables, outputs.feature), outputs.logits, rtol=1e-6)


def test_a_transformer_shows_its_layers_as_stages():
    outputs = built("transformer_2_32", 9).output_shapes
    assert [stage.shape for stage in outputs.stages] == [(1, 9, 32)] * 2
    assert built("bilstm_8", 9).output_shapes.stages == ()


def test_parameters_are_float32_whatever_networks_compute_in():
    spec = built("bilstm_8", 9).inputs
    for name in NAMES:
        network = models.build(name, CLASSES, spec, "bfloat16")
        assert {x.dtype for x in jax.tree.leaves(network.shapes)} == {np.dtype(np.float32)}
        assert network.dtype == "bfloat16" and network.output_shapes.logits.dtype == jnp.float32
        assert network.output_shapes.feature.dtype == jnp.bfloat16


def test_a_network_is_known_by_its_name_and_type_and_is_built_once():
    network = built("bilstm_8", 9)
    assert network.identity == ["bilstm_8", "float32"]
    assert models.build("bilstm_8", CLASSES, network.inputs) is network


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("bilstm_8", (8, 8, 3), r"bilstm_8 takes tokens.* got images of shape \(8, 8, 3\)"),
        (
            "transformer_1_32",
            jax.ShapeDtypeStruct((1, 4), jnp.int32),
            r"transformer_1_32 takes tokens, data.Indices of int32 \(1, length\), got inputs",
        ),
        ("plane2", built("bilstm_8", 9).inputs, "plane2 takes images"),
        (
            "transformer_1_40",
            built("bilstm_8", 9).inputs,
            "has width 40: expected a multiple of 32",
        ),
        ("evolving:bilstm_8", built("bilstm_8", 9).inputs, "for images only, and bilstm_8 takes"),
        ("transformers_1_40", (8, 8, 3), "other sizes of .*transformer_L_D, bilstm_D"),
    ],
)
def test_inputs_and_names_that_do_not_fit(name, inputs, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, CLASSES, inputs)


def test_names_of_built_in_networks_are_taken():
    with pytest.raises(ValueError, match="'bilstm_7' is a built-in network"):
        models.register_network("bilstm_7", lambda classes, inputs: None)
