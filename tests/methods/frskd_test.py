"""FRSKD: which networks it takes, how its pyramid changes sizes, whom its terms train."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of, outputs_of

import distill_jax
from distill_jax import methods, models
from distill_jax.methods import FRSKD, Shapes, total
from distill_jax.methods.frskd import shrunk

B, C = 4, 3
SMALL = FRSKD(width=1, depth=1)


def shown(*maps, size=B):
    """Outputs whose stages have these shapes, with numbers of both signs."""
    draw = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(draw.standard_normal((size, *shape)), jnp.float32)

    return outputs_of(array(C), stages=tuple(array(*shape) for shape in maps))


def shapes_of(student):
    return jax.eval_shape(lambda: Shapes(student, (), C, 16))


@functools.partial(jax.jit, static_argnums=0, compiler_options=models.run_once("cpu"))
def trained_by(method, student):
    """{term: its gradients by the student's outputs and by the method's parameters}."""
    variables = method.init(jax.random.key(0), shapes_of(student))

    def value(outputs, params, name):
        context = context_of(outputs, labels=jnp.arange(B) % C)
        terms, _ = method.terms({**variables, "params": params}, context)
        return total({name: terms[name]})

    names = ("frskd_ce", "frskd_kl", "frskd_at")
    by_both = jax.grad(value, (0, 1))
    return {name: by_both(student, variables["params"], name) for name in names}


def moves(tree):
    return any(jnp.any(x != 0) for x in jax.tree.leaves(tree))


def test_only_the_cross_entropy_trains_the_teacher_and_it_reaches_the_network():
    gradients = trained_by(SMALL, shown((4, 4, 2), (2, 2, 3)))
    chex.assert_tree_all_finite(gradients)
    trained = {
        name: (moves(o.logits), moves(o.stages), moves(p)) for name, (o, p) in gradients.items()
    }
    assert trained == {
        "frskd_ce": (False, True, True),
        "frskd_kl": (True, False, False),
        "frskd_at": (False, True, False),
    }


@pytest.mark.parametrize(
    "maps",
    [
        [(5, 7, 2)],
        [(8, 8, 2), (8, 8, 3), (4, 4, 3)],
        [(7, 5, 2), (4, 3, 3), (2, 1, 3), (1, 1, 1)],
        [(7, 5, 2), (3, 2, 3), (1, 1, 3)],
        [(6, 3, 2), (3, 3, 3)],
    ],
)
def test_levels_have_the_sizes_of_stages_that_are_equal_or_halved(maps):
    student, method = shown(*maps), FRSKD(width=3)
    method.check(shapes_of(student))

    def levels():
        variables = method.init(jax.random.key(0), shapes_of(student))
        terms, after = method.terms(variables, context_of(student))
        given = list(student.stages)
        refined, logits = method.module(C).apply(variables, given, models.basics.Mode())
        return variables, after, terms, refined, logits

    before, after, terms, refined, logits = jax.eval_shape(levels)
    assert [x.shape for x in refined] == [(B, h, w, 3 * c) for h, w, c in maps]
    assert logits.shape == (B, C)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert {name: term.value.shape for name, term in terms.items()} == dict.fromkeys(terms, (B,))


@pytest.mark.parametrize(("size", "halves"), [(8, 4), (7, 4), (7, 3), (2, 1), (1, 1), (5, 5)])
def test_a_map_shrinks_to_the_largest_of_three_beside_zeros(size, halves):
    x = np.random.default_rng(size).random((2, size, 6, 3)).astype(np.float32)
    before = max(2 * halves + 1 - size, 0) // 2  # rows of zeros
    rows = [
        x[:, i : i + 1] if halves == size else x[:, max(2 * i - before, 0) : 2 * i - before + 3]
        for i in range(halves)
    ]
    columns = [
        x.max(1, keepdims=True)[:, :, 2 * j : 2 * j + 3].max(2) for x in rows for j in range(3)
    ]
    expected = np.stack(columns, 1).reshape(2, halves, 3, 3)
    np.testing.assert_array_equal(shrunk(jnp.asarray(x), halves, 3), expected)


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (shown(), "frskd refines the ends of stages: the student has none"),
        (shown((8, 8, 2), (2, 2, 3)), "maps are 8×8×2, 2×2×3: expected each as high and wide as"),
        (shown((4, 4, 2), (8, 8, 3)), "maps are 4×4×2, 8×8×3: expected each as high and wide as"),
        (shown((9, 2), (9, 3)), "maps are 9×2, 9×3: expected height, width and channels of each"),
        (shown((2, 2, 2), (1, 1, 3), size=1), "expected at least 2 examples, got 1"),
    ],
)
def test_stages_that_are_no_pyramid_are_refused_in_a_line_with_their_shapes(student, said):
    with pytest.raises(ValueError, match=said) as error:
        FRSKD().check(shapes_of(student))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.0}, "frskd's temperature is a number above 0, got 0.0"),
        ({"kd_weight": -1.0}, "frskd's kd_weight is a number of 0 or more, got -1.0"),
        ({"width": 1.5}, "frskd's width is a whole number above 0, got 1.5"),
        ({"depth": 0}, "frskd's depth is a whole number above 0, got 0"),
    ],
)
def test_numbers_out_of_range_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        methods.build("frskd", options)


def test_a_network_trains_its_own_teacher_beside_the_labels_and_leaves_it_behind():
    results = distill_jax.run(
        {
            "dataset": {"name": "synthetic:8x8x3:4:64:16"},
            "networks": ("resnet8",),
            "guidance": ("none",),
            "methods": {"frskd": 1.0},
            "method_options": {"frskd": {"width": 1, "depth": 1}},
            "recipe": {"epochs": 2, "batch_size": 16, "learning_rate": 0.05},
            "selection": "last",
        }
    )
    ((network, variables),) = results.networks.values()
    ((first, last),) = results.histories.values()
    whole = last["train_ce"] + last["train_frskd_ce"]
    whole += 2 * 16 * last["train_frskd_kl"] + 100 * last["train_frskd_at"]
    assert last["train_loss"] == pytest.approx(whole, rel=1e-5)
    assert last["train_frskd_ce"] < first["train_frskd_ce"]
    chex.assert_trees_all_equal_shapes(variables, network.shapes)
