"""Convolution, max pool and BatchNorm, values and gradients, against NumPy in float64.

Where another platform's algorithm is meant, it is run here, on the CPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import models
from distill_jax.models.backend import traced_for
from distill_jax.models.basics import Mode
from distill_jax.models.kernels.batch_norm import BatchNorm
from distill_jax.models.kernels.convolution import conv2d
from distill_jax.models.kernels.pools import max_pool


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def taps(kernel, stride, out):
    """Each tap of a kernel, and which pixels of the padded input it meets."""
    for i, j in np.ndindex(*kernel.shape[:2]):
        rows = slice(i, i + stride * (out[0] - 1) + 1, stride)
        columns = slice(j, j + stride * (out[1] - 1) + 1, stride)
        yield (i, j), (slice(None), rows, columns)


def convolve(x, kernel, stride, padding):
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    out = [(n - k) // stride + 1 for n, k in zip(padded.shape[1:3], kernel.shape, strict=False)]
    return sum(padded[there] @ kernel[tap] for tap, there in taps(kernel, stride, out))


def convolve_back(x, kernel, stride, padding, g):
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    dx, dw = np.zeros_like(padded), np.zeros_like(kernel)
    for tap, there in taps(kernel, stride, g.shape[1:3]):
        dx[there] += g @ kernel[tap].T
        dw[tap] = np.einsum("bhwi,bhwo->io", padded[there], g)
    height, width = x.shape[1:3]
    return dx[:, padding : padding + height, padding : padding + width], dw


@pytest.mark.parametrize("batch", [3, 24])  # the second in parts
@pytest.mark.parametrize(
    ("inputs", "outputs", "k", "stride", "padding", "size"),
    [
        (3, 16, 3, 1, 1, (8, 8)),  # pixels, four at once
        (16, 16, 3, 1, 1, (6, 7)),  # two at once, and a row that they do not divide
        (3, 32, 3, 1, 1, (4, 6)),
        (16, 32, 3, 1, 1, (6, 6)),
        (16, 16, 5, 1, 0, (8, 9)),
        (32, 32, 3, 1, 1, (8, 8)),  # tiles
        (32, 48, 3, 1, 1, (9, 7)),
        (64, 32, 3, 1, 1, (3, 3)),  # too few tiles for three images
        (64, 32, 3, 1, 1, (2, 2)),  # maps smaller than the kernel
        (4, 6, 3, 1, 1, (1, 1)),
        (4, 6, 3, 2, 1, (2, 1)),
        (4, 6, 7, 2, 3, (5, 6)),
        (8, 4, 1, 1, 0, (5, 5)),  # patches
        (8, 4, 1, 2, 0, (5, 6)),
        (8, 4, 2, 2, 0, (5, 6)),
        (16, 32, 3, 2, 1, (8, 8)),  # strides
        (16, 32, 3, 2, 1, (7, 9)),
        (4, 8, 3, 3, 1, (8, 7)),
        (3, 8, 7, 2, 3, (12, 11)),
        (4, 6, 3, 2, 0, (9, 8)),
    ],
)
def test_convolution_and_its_gradients(batch, inputs, outputs, k, stride, padding, size):
    x, kernel = draw(batch, *size, inputs), draw(k, k, inputs, outputs, seed=1)
    expected = convolve(x, kernel, stride, padding)
    g = draw(*expected.shape, seed=2)
    expected_dx, expected_dw = convolve_back(x, kernel, stride, padding, g)

    def run(x, kernel, g):
        y, pull = jax.vjp(lambda x, kernel: conv2d(x, kernel, stride, padding), x, kernel)
        return y, *pull(g)

    found = jax.jit(run)(*(jnp.asarray(a, jnp.float32) for a in (x, kernel, g)))
    for got, wanted in zip(found, (expected, expected_dx, expected_dw), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-6 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "k", "stride", "padding", "size"),
    [
        (8, 8, 8, 3, 1, 1, (6, 7)),  # depthwise
        (8, 8, 8, 3, 2, 1, (6, 7)),
        (6, 6, 6, 3, 2, 1, (1, 2)),
        (6, 6, 6, 5, 1, 0, (7, 5)),
        (4, 8, 4, 3, 1, 1, (4, 4)),  # two outputs a channel
        (6, 9, 3, 1, 1, 0, (5, 4)),  # a few groups
        (6, 12, 3, 3, 2, 1, (5, 6)),
        (24, 12, 12, 3, 1, 1, (4, 4)),  # many
    ],
)
def test_convolution_in_groups_and_its_gradients(
    inputs, outputs, groups, k, stride, padding, size, dtype, tolerance
):
    x, kernel = draw(4, *size, inputs), draw(k, k, inputs // groups, outputs, seed=1)
    parts = list(zip(*(np.split(a, groups, -1) for a in (x, kernel)), strict=True))
    expected = np.concatenate([convolve(*part, stride, padding) for part in parts], -1)
    g = draw(*expected.shape, seed=2)
    back = [
        convolve_back(*part, stride, padding, own)
        for part, own in zip(parts, np.split(g, groups, -1), strict=True)
    ]
    wanted = expected, *(np.concatenate(each, -1) for each in zip(*back, strict=True))

    def run(x, kernel, g):
        y, pull = jax.vjp(lambda *a: conv2d(*a, stride, padding, groups), x, kernel)
        return y, *pull(g)

    for found, want in zip(
        jax.jit(run)(*(jnp.asarray(a, dtype) for a in (x, kernel, g))), wanted, strict=True
    ):
        assert found.dtype == dtype
        found = np.asarray(found, np.float64)
        np.testing.assert_allclose(found, want, atol=tolerance * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("groups", [3, 12])
def test_convolution_in_groups_in_float64(groups):
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(draw(2, 5, 5, 12)), jnp.asarray(draw(3, 3, 12 // groups, 12))

        def run(convolve, x, kernel):
            y, pull = jax.vjp(convolve, x, kernel)
            return y, *pull(jnp.cos(y))

        ours, theirs = (
            jax.jit(functools.partial(run, traced_for(platform, function)))(x, kernel)
            for platform in ("cpu", "gpu")  # there it is one convolution of XLA's
            for function in [lambda x, kernel: conv2d(x, kernel, 2, 1, groups)]
        )
    for found, wanted in zip(ours, theirs, strict=True):
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, wanted, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups"),
    [
        ((3, 3, 3, 16), 1, 1, 1),
        ((2, 2, 3, 4), 2, 0, 1),
        ((9, 9, 3, 4), 1, 4, 1),
        ((3, 3, 1, 3), 2, 1, 3),
        ((1, 1, 1, 6), 1, 0, 3),
    ],
)
def test_elsewhere_than_on_a_cpu_a_convolution_is_one(kernel, stride, padding, groups):
    run = traced_for("gpu", lambda x, kernel: conv2d(x, kernel, stride, padding, groups))
    shapes = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4, 8, 8, 3), kernel))
    text = jax.jit(run).lower(*shapes).as_text()
    assert text.count("stablehlo.convolution") == 1
    for written_out in ("dot_general", "optimization_barrier", "custom_vjp"):
        assert written_out not in text


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_max_pool_gives_its_gradient_to_the_first_of_equals(size, platform):
    x = np.random.default_rng(0).integers(0, 3, (2, *size, 3)).astype(np.float64)
    g = draw(2, size[0] // 2, size[1] // 2, 3)
    expected, dx = np.zeros_like(g), np.zeros_like(x)
    for b, i, j, c in np.ndindex(*g.shape):
        window = x[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c]
        row, column = np.unravel_index(np.argmax(window), (2, 2))  # of equals the first
        expected[b, i, j, c] = window.max()
        dx[b, 2 * i + row, 2 * j + column, c] = g[b, i, j, c]
    pooled, pull = jax.vjp(traced_for(platform, max_pool), jnp.asarray(x, jnp.float32))
    np.testing.assert_array_equal(pooled, expected)
    np.testing.assert_array_equal(pull(jnp.asarray(g, jnp.float32))[0], dx.astype(np.float32))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_max_pool_passes_nan_on(platform):
    x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 2, 0].set(jnp.nan)
    pooled = traced_for(platform, max_pool)(x)
    np.testing.assert_array_equal(jnp.isnan(pooled)[0, :, :, 0], [[False, True], [False] * 2])


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("offset", [0.0, 30.0])  # means far beyond the deviation too
@pytest.mark.parametrize("shape", [(6, 3, 5, 4), (9, 7)])
def test_batch_norm_and_its_gradients(shape, offset, platform):
    x, g = draw(*shape) * 2 + offset, draw(*shape, seed=1)
    scale, bias = draw(shape[-1], seed=2), draw(shape[-1], seed=3)
    axes, n = tuple(range(x.ndim - 1)), x.size // shape[-1]
    mean, var = x.mean(axes), x.var(axes)
    standard = (x - mean) / np.sqrt(var + 1e-5)
    dbias, dscale = g.sum(axes), (g * standard).sum(axes)
    dx = scale / np.sqrt(var + 1e-5) * (g - dbias / n - standard * dscale / n)

    norm = BatchNorm(shape[-1])
    stats = {"mean": jnp.ones(shape[-1]), "var": jnp.full(shape[-1], 3.0)}

    def run(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        return norm.apply(variables, x, Mode(train=True), mutable="batch_stats")

    given = (jnp.asarray(a, jnp.float32) for a in (x, scale, bias))
    y, pull, updated = jax.vjp(traced_for(platform, run), *given, has_aux=True)
    tolerance = {"rtol": 0, "atol": 1e-6 * (1 + abs(offset))}
    np.testing.assert_allclose(y, standard * scale + bias, **tolerance)
    new = updated["batch_stats"]
    np.testing.assert_allclose(new["mean"], 0.9 + 0.1 * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["var"], 0.9 * 3 + 0.1 * var * n / (n - 1), rtol=1e-5)
    for got, wanted in zip(pull(jnp.asarray(g, jnp.float32)), (dx, dscale, dbias), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-5 * (1 + abs(offset)) ** 0.5)


@pytest.mark.parametrize("name", ["plane2", "evolving:plane4"])
def test_a_network_trains_elsewhere_as_on_a_cpu(name):
    """A bias that a BatchNorm follows is left out of its sums there, and has no gradient."""
    network = models.build(name, 4, (8, 8, 3))
    variables = network.init(jax.random.key(0))
    images = jnp.asarray(draw(6, 8, 8, 3), jnp.float32)

    def run(params):
        outputs, state = network.apply({**variables, "params": params}, images, train=True)
        return jnp.sum(jnp.square(outputs.logits)), state["batch_stats"]

    here, there = (
        jax.jit(jax.value_and_grad(traced_for(platform, run), has_aux=True))(variables["params"])
        for platform in ("cpu", "gpu")
    )
    for own, other in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(other, own, rtol=1e-3, atol=1e-4)


def test_a_frozen_network_has_its_biases_in_the_type_that_it_computes_in():
    network = models.build("plane2", 4, (8, 8, 3), "bfloat16")
    made = jax.eval_shape(network.freeze, network.shapes)["frozen"]
    types = {leaf.dtype for name in made for leaf in jax.tree.leaves(made[name]) if "conv" in name}
    assert types == {jnp.dtype("bfloat16")}
