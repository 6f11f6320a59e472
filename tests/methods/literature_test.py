"""Methods of the literature: what the authors' numbers in tests/golden do not show of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of, outputs_of

from distill_jax import methods, models
from distill_jax.methods import Hyper, LossOptions, Shapes, total
from distill_jax.methods.several import smallest_sum
from distill_jax.runs.config import resolve

B, C, F = 4, 5, 3
TAUGHT = {
    **{
        name: methods.build(name)
        for name in (
            *("dkd", "nkd", "dist", "normkd", "ctkd", "wttm", "mse_logits", "tfkd_self"),
            *("aver", "ebkd", "ae_kd", "ca_mkd"),
        )
    },
    "dkd, standardised": methods.DKD(scaling="standardise"),
    "dkd, norm": methods.DKD(scaling="norm"),
    "kd, standardised": methods.KD(LossOptions(standardise=True)),
    "ae_kd, normalised": methods.AEKD(normalise=True),
    "wttm, unweighted": methods.WTTM(weighted=False),
}
UNTAUGHT = {name: methods.build(name) for name in ("label_smoothing", "tfkd_reg")}
EVERY = TAUGHT | UNTAUGHT
LABELS = jnp.arange(B) % C
DRAWN = jax.random.normal(jax.random.key(0), (3, B, C))
MAPS = jax.random.normal(jax.random.key(1), (3, B, 4, 4, F))


def once(function):
    return jax.jit(function, compiler_options=models.run_once("cpu"))


def shown(logits, maps):
    return outputs_of(logits, maps.mean((1, 2)), stages=(maps,))


SHAPES = jax.eval_shape(
    lambda: Shapes(shown(DRAWN[0], MAPS[0]), (shown(DRAWN[1], MAPS[1]),) * 2, C, 8)
)


@once
def everything(student, teachers, mask):
    """{method: its loss and the gradient by the student's logits}, of all at once."""
    heads = tuple(lambda x, s=s: jnp.tile(x, 2)[:, :C] * s for s in (1.0, 2.0))
    found = {}
    for name, method in EVERY.items():
        variables = method.init(jax.random.key(2), SHAPES)

        def loss(logits, method=method, variables=variables):
            context = context_of(
                shown(logits, MAPS[0]),
                tuple(shown(t, MAPS[1 + k]) for k, t in enumerate(teachers)),
                mask,
                LABELS,
                Hyper(temperature=2.0, kd_weight=1.0),
                teacher_heads=heads,
                epoch=jnp.float32(1.0),
            )
            terms, _ = method.terms(variables, context)
            return total({k: t for k, t in terms.items() if not k.endswith("_ce")})

        found[name] = jax.value_and_grad(loss)(student)
    return found


ONE_HOT = 60.0 * jax.nn.one_hot(LABELS, C)
EDGES = {
    "equal logits": (jnp.zeros((B, C)), jnp.zeros((2, B, C))),
    "a student sure of the label": (ONE_HOT, DRAWN[1:]),
    "teachers sure of the label": (DRAWN[0], jnp.stack([ONE_HOT, 2 * ONE_HOT])),
    "teachers sure of another": (DRAWN[0], jnp.roll(jnp.stack([ONE_HOT, 2 * ONE_HOT]), 1, -1)),
    "all sure": (ONE_HOT, jnp.stack([ONE_HOT, ONE_HOT])),
    "one class for all": (jnp.tile(ONE_HOT[:1], (B, 1)), jnp.tile(ONE_HOT[1], (2, B, 1))),
    "half precision's largest": (65504 * jnp.sign(DRAWN[0]), 65504 * jnp.sign(DRAWN[1:])),
}


@pytest.mark.parametrize("mask", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("edge", EDGES)
def test_values_and_gradients_are_finite_where_the_codes_are_not(edge, mask):
    found = jax.device_get(everything(*EDGES[edge], jnp.array(mask)))
    broken = [n for n, pair in found.items() if not all(np.isfinite(x).all() for x in pair)]
    assert not broken


def test_a_dropped_teacher_leaves_no_trace_and_none_kept_teaches_nothing():
    other = DRAWN[1:].at[0].set(7 * DRAWN[0])
    for mask in ([False, True], [False, False]):
        some, same = (
            jax.device_get(everything(DRAWN[0], teachers, jnp.array(mask)))
            for teachers in (DRAWN[1:], other)
        )
        for name in TAUGHT:
            np.testing.assert_array_equal(some[name][0], same[name][0], name)
            np.testing.assert_array_equal(some[name][1], same[name][1], name)
            taught = np.abs(some[name][1]).max()
            assert (taught > 1e-6) == any(mask), name


def test_a_single_teacher_is_that_of_kd_whatever_weighs_it():
    found = everything(DRAWN[0], DRAWN[1:], jnp.array([True, False]))
    context = context_of(
        outputs_of(DRAWN[0]), DRAWN[1:2], hyper=Hyper(temperature=4.0, kd_weight=1.0)
    )
    expected = total(methods.KD().terms({}, context)[0])
    for name in ("aver", "ebkd", "ae_kd", "ae_kd, normalised"):
        np.testing.assert_allclose(found[name][0], expected, rtol=1e-5)


def test_a_student_that_is_sure_still_learns_the_labels_odds():
    """Where the authors' code takes the logarithm of 0."""
    student = 200.0 * jax.nn.one_hot(LABELS, C)
    method = methods.DKD(temperature=1.0, beta=0.0, warmup_epochs=0.0)

    def loss(logits):
        context = context_of(outputs_of(logits), DRAWN[1:2], labels=LABELS)
        return total(method.terms({}, context)[0])

    gradient = jax.grad(loss)(student)
    wrong = 1 - jax.nn.softmax(DRAWN[1])[np.arange(B), LABELS]
    np.testing.assert_allclose(gradient[np.arange(B), LABELS], wrong / B, rtol=1e-4)


@pytest.mark.parametrize(("epoch", "expected"), [(0.0, 0.05), (0.9, 0.05), (9.0, 0.5), (50.0, 1.0)])
def test_dkd_warms_up_by_epochs(epoch, expected):
    context = context_of(outputs_of(DRAWN[0]), DRAWN[1:2], labels=LABELS, epoch=epoch)
    terms, _ = methods.DKD(alpha=2.0).terms({}, context)
    assert float(terms["tckd"].weight) == pytest.approx(2 * expected)
    assert float(terms["nckd"].weight) == pytest.approx(8 * expected)


def test_nkd_and_wttm_are_their_papers_equations():
    s, t = np.asarray(DRAWN[:2], np.float64)

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(-1, keepdims=True)

    def loss_of(method):
        context = context_of(outputs_of(DRAWN[0]), DRAWN[1:2], labels=LABELS)
        return float(total(method.terms({}, context)[0]))

    at, others = (np.arange(B), np.asarray(LABELS)), ~np.eye(C, dtype=bool)[np.asarray(LABELS)]
    label = -(softmax(t)[at] * np.log(softmax(s)[at])).mean()
    theirs, own = (softmax(z[others].reshape(B, C - 1) / 3) for z in (t, s))
    other = -9 * 1.5 * (theirs * np.log(own)).sum(-1).mean()
    assert loss_of(methods.NKD(temperature=3.0)) == pytest.approx(label + other, rel=1e-5)

    powers = softmax(t) ** 0.3
    targets = powers / powers.sum(-1, keepdims=True)
    kl = (targets * np.log(targets / softmax(s))).sum(-1)
    weighted = (powers.sum(-1) * kl).mean()
    assert loss_of(methods.WTTM(gamma=0.3)) == pytest.approx(weighted, rel=1e-5)
    assert loss_of(methods.WTTM(gamma=0.3, weighted=False)) == pytest.approx(kl.mean(), rel=1e-5)


# ------------------------------------------------------------------------------ weights of AE-KD
@functools.cache
def solver():
    return once(smallest_sum)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("limit", [0.4, 0.6, 1.0])
def test_the_smallest_sum_is_the_smallest_on_a_grid(limit, scale):
    vectors = np.random.RandomState(3).standard_normal((3, 6)).astype(np.float32)
    weights = np.asarray(solver()(scale * vectors, jnp.ones(3, bool), limit))
    assert weights.sum() == pytest.approx(1) and weights.min() >= 0
    assert weights.max() <= limit + 1e-6
    steps = np.linspace(0, 1, 101)
    grid = [w for w in itertools.product(steps, steps) if sum(w) <= 1 + 1e-9]
    grid = np.array([(*w, 1 - sum(w)) for w in grid])
    grid = grid[(grid.max(1) <= limit + 1e-9) & (grid.min(1) >= -1e-9)]
    best = np.linalg.norm(grid @ vectors, axis=1).min()
    assert np.linalg.norm(weights @ vectors) <= best + 1e-6


@pytest.mark.parametrize("mask", [[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]])
def test_equal_or_missing_gradients_leave_weights_that_add_up(mask):
    weights = solver()(jnp.zeros((3, 6)), jnp.array(mask, bool), 0.1)
    expected = np.array(mask) / max(sum(mask), 1)
    np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_a_long_gradient_of_a_dropped_teacher_leaves_the_weights_of_the_others():
    kept = 1e-5 * np.random.RandomState(3).standard_normal((2, 6)).astype(np.float32)
    long, both = np.ones((1, 6), np.float32), jnp.array([False, True, True])
    weights = solver()(np.concatenate([long, kept]), both, 1.0)
    alone = solver()(np.concatenate([0 * long, kept]), both, 1.0)
    assert abs(alone[1] - alone[2]) > 0.1
    np.testing.assert_allclose(weights, alone, atol=1e-6)


# ------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dkd", {"temperature": 0}, "dkd's temperature is a number above 0, got 0"),
        ("dkd", {"beta": -1.0}, "dkd's beta is a number of 0 or more, got -1.0"),
        ("dkd", {"scaling": "std"}, "dkd's scaling is one of .*'norm'.*, got 'std'"),
        ("nkd", {"gamma": "much"}, "nkd's gamma is a number of 0 or more, got 'much'"),
        ("dist", {"gamma": float("nan")}, "dist's gamma is a number of 0 or more, got nan"),
        ("normkd", {"temperature": True}, "normkd's temperature is a number above 0, got True"),
        ("ctkd", {"epochs": 0}, "ctkd's epochs is a number above 0, got 0"),
        ("wttm", {"gamma": 0}, "wttm's gamma is a number above 0, got 0"),
        ("wttm", {"weighted": 1}, "wttm's weighted is True or False, got 1"),
        ("label_smoothing", {"smoothing": 2}, "smoothing is a number between 0 and 1, got 2"),
        ("label_smoothing", {"over": "none"}, "over is one of .*'others'.*, got 'none'"),
        ("tfkd_self", {"alpha": 1.5}, "tfkd_self's alpha is a number between 0 and 1, got 1.5"),
        ("tfkd_reg", {"correct": -1}, "tfkd_reg's correct is a number between 0 and 1, got -1"),
        ("aver", {"temperature": -4}, "aver's temperature is a number above 0, got -4"),
        ("ebkd", {"temperature": 0.0}, "ebkd's temperature is a number above 0, got 0.0"),
        ("ae_kd", {"limit": 2}, "ae_kd's limit is a number between 0 and 1, got 2"),
        ("ae_kd", {"normalise": "no"}, "ae_kd's normalise is True or False, got 'no'"),
        ("ca_mkd", {"feature_weight": -1}, "feature_weight is a number of 0 or more, got -1"),
        ("mse_logits", {"temperature": 4}, "'mse_logits' has no option 'temperature'"),
    ],
)
def test_numbers_out_of_their_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        methods.build(name, options)


def test_kd_is_standardised_or_not():
    with pytest.raises(ValueError, match="standardise is True or False, got 1"):
        LossOptions(standardise=1)


FLAT = jax.eval_shape(lambda: outputs_of(DRAWN[0], jnp.zeros((B, 48)), stages=(MAPS[0],)))


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        (
            "dist",
            SHAPES._replace(student=outputs_of(jax.ShapeDtypeStruct((1, C), "float32"))),
            "dist compares the examples of a batch: its size is 1, expected 2 or more",
        ),
        (
            "ca_mkd",
            SHAPES._replace(teachers=(SHAPES.teachers[0], FLAT)),
            r"last map is \(., ., 3\), its classifier takes \(48,\), expected \(3,\); feature_w",
        ),
        (
            "ca_mkd",
            SHAPES._replace(student=outputs_of(SHAPES.student.logits)),
            "ca_mkd compares feature maps at the end of stages: the student has none",
        ),
    ],
)
def test_networks_that_a_method_cannot_pair_are_refused(name, shapes, message):
    method = methods.build(name)
    method.check(SHAPES)
    with pytest.raises(ValueError, match=message):
        method.check(shapes)
    own = {"dist": {"gamma": 0}, "ca_mkd": {"feature_weight": 0}}[name]
    methods.build(name, own).check(shapes)


@pytest.mark.parametrize("classes", [2, 3])
def test_of_two_classes_some_forms_leave_nothing_to_teach_and_say_so(classes):
    """Two logits over their deviation, or two correlated probabilities, are as good as signs."""
    own, theirs = jax.random.normal(jax.random.key(3), (2, B, classes))
    forms = {name: m for name, m in TAUGHT.items() if name not in ("ctkd", "ca_mkd", "ae_kd")}
    forms |= {"dist of rows": methods.DIST(gamma=0.0), "kd": methods.KD()}

    def losses(logits):
        context = context_of(
            outputs_of(logits),
            theirs[None],
            None,
            LABELS % classes,
            Hyper(temperature=2.0, kd_weight=1.0),
        )
        return {
            name: total({k: t for k, t in m.terms({}, context)[0].items() if not k.endswith("_ce")})
            for name, m in forms.items()
        }

    gradients = once(jax.jacrev(losses))(own)
    nothing = {name for name, gradient in gradients.items() if jnp.abs(gradient).max() < 1e-3}
    assert nothing == {name for name, m in forms.items() if classes < m.least_classes}
    assert len(nothing) == (5 if classes == 2 else 0)


@pytest.mark.parametrize("name", [n for n in TAUGHT if n in methods.METHODS])
def test_a_network_is_not_compared_with_itself(name):
    config = {
        "networks": ("plane2",),
        "guidance": "plane2<plane2",
        "methods": {name: 1.0},
        "dataset": {"name": "synthetic:32x32x3:10:64:32"},
    }
    with pytest.raises(ValueError, match=f"none of its methods does so along that edge .{name}"):
        resolve(config).methods_of(models.build("plane2", 10, (32, 32, 3)), (), ("plane2",), {})
