"""FitNet against the field's reference code, and which layers and teachers it takes."""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of, outputs_of

from distill_jax.interop.torch_weights import _from_torch_layout, _to_torch_layout
from distill_jax.methods import Shapes
from distill_jax.methods.fitnet import FitNet

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "methods" / "method_fitnet.npz"
LEAVES = {"conv": {"kernel": "weight", "bias": "bias"}, "bn": {"scale": "weight", "bias": "bias"}}
STATISTICS = {"bn": {"mean": "running_mean", "var": "running_var"}}
B, C = 4, 3


def seen(*maps, stem=None):
    """Outputs with stages."""
    return outputs_of(jnp.zeros((len(maps[0]), C)), stages=tuple(maps), stem=stem)


# ------------------------------------------------------------------------- the authors' numbers
@functools.cache
def golden():
    with np.load(GOLDEN) as arrays:
        return {name: arrays[name] for name in arrays.files}


def regressor(names, entry):
    """A module's leaves from the entries of the state dict."""
    return {
        module: {leaf: entry(f"regressor.{module}.{torch}") for leaf, torch in leaves.items()}
        for module, leaves in names.items()
    }


def bound(name, dtype):
    noise = json.loads(str(golden()["meta"]))["noise"].get(name, 0.0)
    return max(1e-9, 1e-6 * noise) if dtype == np.float64 else max(1e-5, 30 * noise)


def check_against(name, got, dtype):
    want = golden()[name]
    assert got.dtype == dtype and got.shape == want.shape
    error = np.abs(got - want).max() / (np.abs(want).max() or 1.0)
    assert error <= bound(name, dtype), (name, error)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", ["same", "half", "double", "valid"])
def test_loss_gradients_and_statistics_are_those_of_the_reference(case, dtype):
    arrays = golden()

    def entry(kind):
        return lambda name: _from_torch_layout(arrays[f"{case}:{kind}:{name}"].astype(dtype))

    params, stats = regressor(LEAVES, entry("param")), regressor(STATISTICS, entry("buf"))
    student, teacher = (arrays[f"{case}:in:{who}_feature"] for who in ("student", "teacher"))
    method = FitNet(hint_layer=1)

    def total(params, student):
        variables = {"params": {"0": params}, "batch_stats": {"0": stats}}
        context = context_of(seen(student), (seen(jnp.asarray(teacher, dtype)),))
        terms, after = method.terms(variables, context)
        (term,) = terms.values()
        chex.assert_shape(term.value, (len(student),))
        assert term.weight == 1.0
        return jnp.mean(term.value), after["batch_stats"]["0"]

    with jax.enable_x64(dtype == np.float64):
        compiled = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
        (loss, after), (by_params, by_student) = jax.device_get(
            compiled(jax.tree.map(jnp.asarray, params), jnp.asarray(student, dtype))
        )
    check_against(f"{case}:loss:hint", loss, dtype)
    check_against(f"{case}:grad:hint:student_feature", by_student, dtype)
    for module, leaves in LEAVES.items():
        for leaf, torch in leaves.items():
            name = f"{case}:gparam:hint:regressor.{module}.{torch}"
            gradient = _to_torch_layout(by_params[module][leaf])
            if name.endswith("conv.bias"):  # zero but for rounding, before a BatchNorm
                limit = np.abs(by_params["conv"]["kernel"]).max() * bound(name, dtype)
                assert np.abs(gradient).max() <= limit
            else:
                check_against(name, gradient, dtype)
    for leaf, torch in STATISTICS["bn"].items():
        check_against(f"{case}:bufafter:regressor.bn.{torch}", after["bn"][leaf], dtype)


# --------------------------------------------------------------------------------- its variables
def drawn(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


STUDENT = seen(drawn(B, 4, 4, 2), drawn(B, 2, 2, 3))
TEACHERS = (
    seen(drawn(B, 4, 4, 5, seed=1), drawn(B, 4, 4, 6, seed=2)),
    seen(drawn(B, 4, 4, 2, seed=3), drawn(B, 2, 2, 4, seed=4)),
)
SHAPES = jax.eval_shape(lambda: Shapes(STUDENT, TEACHERS, C, 8))
METHOD = FitNet()


@functools.partial(jax.jit, static_argnums=3)
def evaluated(variables, teachers, mask, method=METHOD):
    """((value (B,), variables after), gradient by the variables' parameters)."""

    def total(params):
        context = context_of(STUDENT, teachers, mask)
        terms, after = method.terms({**variables, "params": params}, context)
        (term,) = terms.values()
        return term.value.mean(), (term.value, after)

    gradient, aux = jax.grad(total, has_aux=True)(variables["params"])
    return aux, gradient


@functools.cache
def variables():
    return jax.jit(lambda key: METHOD.init(key, SHAPES))(jax.random.key(0))


def test_each_teacher_has_a_regressor_of_its_own():
    fresh = variables()
    assert fresh.keys() == {"params", "batch_stats"}
    # The first teacher's map is twice as large, the second's as large as the student's.
    chex.assert_shape(fresh["params"]["0"]["conv"]["kernel"], (4, 4, 6, 3))
    chex.assert_shape(fresh["params"]["1"]["conv"]["kernel"], (1, 1, 3, 4))
    chex.assert_shape(fresh["batch_stats"]["0"]["bn"]["mean"], (6,))
    twice = jax.eval_shape(lambda: Shapes(STUDENT, TEACHERS[1:] * 2, C, 8))
    one, other = METHOD.init(jax.random.key(0), twice)["params"].values()
    assert not np.array_equal(one["conv"]["kernel"], other["conv"]["kernel"])


def test_the_distances_of_kept_teachers_add_up_and_a_dropped_one_is_masked():
    masks = ([True, True], [True, False], [False, True], [False, False])
    (both, after), _ = evaluated(variables(), TEACHERS, jnp.array(masks[0]))
    values = []
    for mask in masks[1:]:
        # What is dropped comes as zeros.
        shown = jax.tree.map(jnp.zeros_like, TEACHERS)
        shown = tuple(t if k else z for t, z, k in zip(TEACHERS, shown, mask, strict=True))
        (value, _), gradient = evaluated(variables(), shown, jnp.array(mask))
        values.append(value)
        for k, kept in enumerate(mask):
            moved = jax.tree.map(np.any, gradient[str(k)])
            assert moved["conv"]["kernel"] == moved["bn"]["scale"] == kept
    np.testing.assert_allclose(values[0] + values[1], both, rtol=1e-6)
    np.testing.assert_array_equal(values[2], np.zeros(B))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, variables())
    assert all(np.any(x != 0) for x in jax.tree.leaves(after["batch_stats"]))


def test_layers_are_counted_from_the_stem():
    stem = drawn(B, 4, 4, 2, seed=7)
    student, teacher = seen(drawn(B, 2, 2, 3), stem=stem), seen(drawn(B, 2, 2, 4), stem=2 * stem)
    shapes = jax.eval_shape(lambda: Shapes(student, (teacher,), C, 8))
    for method, kernel in (
        (FitNet(0), (1, 1, 2, 2)),
        (FitNet(1), (1, 1, 3, 4)),
        (FitNet(0, 1), (3, 3, 2, 4)),
        (FitNet(1, 0), (4, 4, 2, 3)),
    ):
        method.check(shapes)
        fresh = jax.eval_shape(lambda m=method: m.init(jax.random.key(0), shapes))
        chex.assert_shape(fresh["params"]["0"]["conv"]["kernel"], kernel)


# -------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("method", "message"),
    [
        (FitNet(3), "the student has feature maps 0 to 2, got layer 3"),
        (FitNet(-1), "the student has feature maps 0 to 2, got layer -1"),
        (FitNet(0), "the student has feature maps 0 to 2, got layer 0"),  # no stem
        (FitNet(1, 5), "the teacher has feature maps 0 to 2, got layer 5"),
    ],
)
def test_layers_that_are_not_there_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        method.check(SHAPES)


@pytest.mark.parametrize(
    ("own", "theirs"),
    [((4, 4), (5, 5)), ((4, 4), (9, 9)), ((4, 4), (8, 4)), ((8, 5), (4, 4)), ((6, 5), (4, 4))],
)
def test_maps_to_which_no_regressor_leads_are_refused(own, theirs):
    def shapes():
        return Shapes(seen(jnp.zeros((B, *own, 2))), (seen(jnp.zeros((B, *theirs, 2))),), C, 8)

    with pytest.raises(
        ValueError, match="the student's layer 1 is .*, the teacher's 1 .* expected the"
    ):
        FitNet(1).check(jax.eval_shape(shapes))


@pytest.mark.parametrize(
    ("own", "theirs"),
    [((4, 4), (4, 4)), ((4, 6), (8, 12)), ((8, 4), (4, 2)), ((6, 7), (4, 5)), ((1, 1), (2, 2))],
)
def test_maps_that_are_taken_lead_to_the_teachers_shape(own, theirs):
    def difference():
        student, teacher = seen(jnp.zeros((B, *own, 2))), seen(jnp.zeros((B, *theirs, 3)))
        shapes, method = Shapes(student, (teacher,), C, 8), FitNet(1)
        method.check(shapes)
        fresh = method.init(jax.random.key(0), shapes)
        return method.terms(fresh, context_of(student, (teacher,)))[0]["fitnet"].value

    assert jax.eval_shape(difference).shape == (B,)
