"""ReviewKD and SemCKD: what they train for whom, sizes that differ, warm-up, refusals."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of, outputs_of

import distill_jax
from distill_jax import methods, models
from distill_jax.methods import ReviewKD, SemCKD, Shapes
from distill_jax.methods.review import nearest, pyramid_gap

B, C = 8, 3


def shown(seed, *maps, feature=5):
    """Outputs whose stages are the ReLU of what is before it."""
    draw = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(draw.standard_normal((B, *shape)) + 0.4, jnp.float32)

    preacts = tuple(array(*shape) for shape in maps)
    stages = tuple(jnp.maximum(x, 0) for x in preacts)
    return outputs_of(array(C), array(feature), stages=stages, preacts=preacts)


STUDENT = shown(0, (6, 6, 3), (3, 3, 4))
# Of other sizes than the student's, and not by a whole factor.
TEACHER = shown(1, (9, 4, 6), (2, 5, 7), feature=8)


def shapes_of(student, *teachers):
    return jax.eval_shape(lambda: Shapes(student, teachers, C, 16))


@functools.partial(jax.jit, static_argnums=0, compiler_options=models.run_once("cpu"))
def computed(method, student, teachers):
    """The value of each example, the variables and those after it."""
    method.check(shapes := shapes_of(student, *teachers))
    variables = method.init(jax.random.key(0), shapes)
    context = context_of(student, teachers)
    terms, after = method.terms(variables, context)
    (term,) = terms.values()
    return term.value, variables, after


# ----------------------------------------------------------------------------- what is compared
@pytest.mark.parametrize("method", [ReviewKD(), SemCKD()])
def test_maps_of_any_sizes_are_compared_and_statistics_kept(method):
    value, before, after = computed(method, STUDENT, (TEACHER, shown(2, (4, 4, 2), (1, 1, 2))))
    chex.assert_shape(value, (B,))
    chex.assert_tree_all_finite(value)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    chex.assert_trees_all_equal(before["params"], after["params"])
    assert before["params"].keys() == {"0", "1"}
    means = [x["mean"] for x in _norms(after["batch_stats"])]
    assert len(means) > 4 and all(np.any(mean != 0) for mean in means)


def _norms(tree):
    """The statistics of each BatchNorm."""
    if "mean" in tree:
        return [tree]
    return [found for child in tree.values() for found in _norms(child)]


def test_half_precision_is_compared_in_float32():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (STUDENT, TEACHER))
    for method in (ReviewKD(), SemCKD()):
        exact, rounded = (computed(method, s, (t,))[0] for s, t in ((STUDENT, TEACHER), half))
        assert rounded.dtype == jnp.float32
        np.testing.assert_allclose(rounded, exact, rtol=0.1)


def test_enlarging_takes_the_nearest_below():
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    found = nearest(x, 7, 2)
    rows, columns = [0, 0, 0, 1, 1, 2, 2], [0, 2]
    np.testing.assert_array_equal(found[0, :, :, 0], x[0, :, :, 0][np.ix_(rows, columns)])
    assert nearest(x, 3, 4) is x


@pytest.mark.parametrize(
    ("size", "windows"), [((8, 8), (4, 2, 1)), ((4, 4), (2, 1)), ((8, 2), (1,)), ((1, 1), ())]
)
def test_averages_over_fewer_windows_count_half_as_much_each(size, windows):
    draw = np.random.default_rng(0)
    one, other = draw.standard_normal((2, B, *size, 3))
    with jax.enable_x64(True):
        found = pyramid_gap(jnp.asarray(one), jnp.asarray(other))
    want, weights = ((one - other) ** 2).mean((1, 2, 3)), [1.0]
    for n in windows:
        blocks = (one - other).reshape(B, n, size[0] // n, n, size[1] // n, 3).mean((2, 4))
        weights.append(weights[-1] / 2)
        want = want + weights[-1] * (blocks**2).mean((1, 2, 3))
    np.testing.assert_allclose(found, want / sum(weights), rtol=1e-12)


@pytest.mark.parametrize(("epoch", "expected"), [(0.0, 0.05), (0.9, 0.05), (9.0, 0.5), (50.0, 1.0)])
def test_reviewkd_warms_up_by_epochs(epoch, expected):
    method = ReviewKD()
    variables = method.init(jax.random.key(0), shapes_of(STUDENT, TEACHER))
    terms, _ = method.terms(variables, context_of(STUDENT, (TEACHER,), epoch=epoch))
    assert float(terms["reviewkd"].weight) == pytest.approx(expected)
    terms, _ = ReviewKD(warmup_epochs=0).terms(variables, context_of(STUDENT, (TEACHER,)))
    assert float(terms["reviewkd"].weight) == 1.0


def test_the_students_maps_are_those_after_or_before_the_relu():
    other = STUDENT._replace(preacts=STUDENT.stages)
    after, before = (ReviewKD(student_preact=preact) for preact in (False, True))
    values = [
        computed(method, student, (TEACHER,))[0]
        for method, student in ((after, STUDENT), (before, other), (before, STUDENT))
    ]
    np.testing.assert_array_equal(values[0], values[1])
    assert np.all(values[0] != values[2])


def test_what_is_trained_has_the_sizes_of_both():
    method = ReviewKD(max_channels=4)
    fresh = jax.eval_shape(lambda: method.init(jax.random.key(0), shapes_of(STUDENT, TEACHER)))
    levels = fresh["params"]["0"]
    kernels = [
        (levels[i]["conv1"]["0"]["kernel"].shape, levels[i]["conv2"]["0"]["kernel"].shape)
        for i in "012"
    ]
    assert kernels == [
        ((1, 1, 5, 4), (3, 3, 4, 8)),
        ((1, 1, 4, 4), (3, 3, 4, 7)),
        ((1, 1, 3, 4), (3, 3, 4, 6)),
    ]
    assert "att_conv" not in levels["0"] and "att_conv" in levels["2"]

    one = shown(3, (4, 4, 2))  # SemCKD takes any numbers of stages
    fresh = jax.eval_shape(lambda: SemCKD(3).init(jax.random.key(0), shapes_of(STUDENT, one)))
    own = fresh["params"]["0"]
    assert own.keys() == {
        *("query_weight0", "query_weight1", "key_weight0", "regressor0_0", "regressor1_0")
    }
    chex.assert_shape(own["query_weight1"]["linear1"]["kernel"], (B, 4))
    chex.assert_shape(own["key_weight0"]["linear2"]["kernel"], (4, 2))
    chex.assert_shape(own["regressor1_0"]["3"]["kernel"], (3, 3, 4, 4))


def test_the_stages_of_a_teacher_share_out_each_of_the_students():
    method = SemCKD()
    variables = method.init(jax.random.key(0), shapes_of(STUDENT, TEACHER))
    context = context_of(STUDENT, (TEACHER,))
    own = {kind: tree["0"] for kind, tree in variables.items()}
    attention, gaps, _ = method.compared(own, TEACHER, context)
    np.testing.assert_allclose(attention.sum(-1), np.ones((B, 2)), rtol=1e-6)
    value = method.terms(variables, context)[0]["semckd"].value
    np.testing.assert_allclose(value, (attention * gaps).sum((1, 2)) / 2, rtol=1e-5)


# ----------------------------------------------------------------------------------- in training
@pytest.mark.parametrize("method", ["reviewkd", "semckd"])
def test_a_config_trains_with_it(method):
    config = {
        "dataset": {"name": "synthetic:8x8x1:4:48:16", "valid_fraction": 0.25},
        "networks": ("plane4", "plane2"),
        "guidance": ("direct",),
        "methods": {method: 1.0},
        "recipe": {"epochs": 1, "batch_size": 12, "learning_rate": 0.01},
    }
    (record,) = distill_jax.run(config, progress=False).histories["direct", "plane2", 0]
    value, weighted = record[f"train_{method}"], record[f"train_weighted_{method}"]
    assert value > 0
    assert weighted == pytest.approx(value * (0.05 if method == "reviewkd" else 1.0), rel=1e-5)


# -------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("method", "student", "teacher", "message"),
    [
        (
            ReviewKD(),
            STUDENT,
            shown(3, (6, 6, 3)),
            "student's maps are 6×6×3, 3×3×4, the teacher's 6×6×3: expected as many of both",
        ),
        (
            ReviewKD(),
            STUDENT,
            TEACHER._replace(preacts=()),
            "student's maps are 6×6×3, 3×3×4, the teacher's none: expected as many of both",
        ),
        (
            ReviewKD(),
            STUDENT._replace(feature=None),
            TEACHER,
            "reviewkd compares the vectors before the classifier: the student has none",
        ),
        (
            ReviewKD(student_preact=True),
            STUDENT._replace(preacts=()),
            TEACHER,
            "the student's maps are none, the teacher's 9×4×6, 2×5×7: expected as many of both",
        ),
        (
            ReviewKD(),
            *jax.tree.map(lambda x: x[:1], (STUDENT, TEACHER)),
            "reviewkd normalises vectors over the batch: expected at least 2 examples, got 1",
        ),
        (
            SemCKD(),
            STUDENT._replace(stages=()),
            TEACHER,
            "semckd compares feature maps at the end of stages: the student has none",
        ),
        (
            SemCKD(),
            STUDENT._replace(stages=(jnp.zeros((B, 4, 3)),)),
            TEACHER,
            "maps are 4×3, the teacher's 9×4×6, 2×5×7: expected height, width and channels of each",
        ),
        (
            SemCKD(),
            *jax.tree.map(lambda x: x[:3], (STUDENT, TEACHER)),
            "over its factor 4: expected a batch of at least 4, got 3",
        ),
    ],
)
def test_networks_and_batches_that_do_not_fit_are_refused(method, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        method.check(shapes_of(student, teacher))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("reviewkd", {"warmup_epochs": -1}, "warmup_epochs is a number of 0 or more, got -1"),
        ("reviewkd", {"max_channels": 0}, "max_channels is a whole number above 0, got 0"),
        ("reviewkd", {"student_preact": 1}, "student_preact is True or False, got 1"),
        ("semckd", {"factor": 2.0}, "semckd's factor is a whole number above 0, got 2.0"),
        ("semckd", {"weight": 400}, "method 'semckd' has no option 'weight'"),
    ],
)
def test_numbers_out_of_their_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        methods.build(name, options)
