"""Smoothed labels: what the cross-entropies of all methods and of the trainer make of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contexts import context_of, outputs_of
from float64 import close, log_softmax

import distill_jax
from distill_jax import methods, models
from distill_jax.methods import FRSKD, TESKD, CrossEntropy, Hyper, Shapes, TfKDReg, TfKDSelf
from distill_jax.methods.losses import cross_entropy
from distill_jax.train.stage import Recipe

B, C, EPSILON = 6, 5, 0.3
LOGITS = np.random.default_rng(0).normal(0, 3, (4, B, C)).astype(np.float32)
LABELS = np.arange(B) % C
BASE = {
    "dataset": {"name": "synthetic:8x8x1:4:16:16", "valid_fraction": 0},
    "networks": ("plane4", "plane2"),
    "guidance": ("none",),
    "recipe": {"epochs": 1, "batch_size": 16},
    "selection": "last",
}


def smoothed(logits, epsilon=EPSILON):
    """(B,) in float64: the label keeps 1 - ε, and each class has ε/C."""
    targets = (1 - epsilon) * np.eye(C)[LABELS] + epsilon / C
    return -(targets * log_softmax(logits)).sum(-1)


# ------------------------------------------------------------------------------------ the numbers
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.9])
def test_the_cross_entropy_of_smoothed_labels_is_that_of_numpy_and_of_optax(epsilon):
    def ours(logits):
        return cross_entropy(logits, LABELS, epsilon).sum()

    def theirs(logits):
        targets = optax.smooth_labels(jax.nn.one_hot(LABELS, C), epsilon)
        return optax.softmax_cross_entropy(logits, targets).sum()

    value = cross_entropy(jnp.asarray(LOGITS), LABELS, epsilon)
    close(value, np.stack([smoothed(x, epsilon) for x in LOGITS]))
    logits = jnp.asarray(LOGITS[0])
    np.testing.assert_allclose(jax.grad(ours)(logits), jax.grad(theirs)(logits), atol=1e-6)


def counted(method, student=None, teachers=()):
    """The method's term of the labels where they are smoothed, and the outputs it is of."""
    student = student or outputs_of(jnp.asarray(LOGITS[0]))

    def terms(student):
        shapes = Shapes(student, (), C, B)
        variables = method.init(jax.random.key(0), shapes)
        hyper = Hyper(label_smoothing=EPSILON)
        found, _ = method.terms(
            variables, context_of(student, teachers, labels=LABELS, hyper=hyper)
        )
        (name,) = (name for name in found if name.endswith("ce"))
        given = list(student.stages)
        own = getattr(method, "module", None)
        mode = models.basics.Mode(train=True)
        taught = own(C).apply(variables, given, mode, mutable=True)[0][1] if own else student.logits
        return found[name].value, taught

    return jax.jit(terms, compiler_options=models.run_once("cpu"))(student)


def test_every_method_that_counts_the_labels_itself_smooths_them():
    for method in (CrossEntropy(), TfKDReg(), TfKDSelf()):
        value, logits = counted(method, teachers=LOGITS[1:2])
        close(value, smoothed(logits))
    maps = tuple(jnp.ones((B, size, size, 2)) * LOGITS[0, :, :1, None, None] for size in (4, 2))
    value, logits = counted(FRSKD(width=1, depth=1), outputs_of(LOGITS[0], stages=maps))
    close(value, smoothed(logits), 1e-4)
    exits = [outputs_of(jnp.asarray(x), jnp.ones((B, 2))) for x in LOGITS[:3]]
    value, _ = counted(TESKD(), exits[0]._replace(branches=tuple(exits[1:])))
    close(value, sum(smoothed(x) for x in LOGITS[:3]))


def test_a_method_in_the_place_of_the_cross_entropy_says_how_it_smooths():
    builds = [methods.build(name) for name in methods.METHODS]
    replacing = {type(m) for m in builds if m.replaces_ce}
    own = {kind for kind in replacing if not kind.takes_label_smoothing}
    assert own == {methods.LabelSmoothing, methods.PSKD}  # whose targets are smooth already


# ------------------------------------------------------------------------------------ the trainer
def test_the_recipe_smooths_the_labels_of_the_step_for_a_sweep_of_values():
    results = distill_jax.run({**BASE, "sweep": {"label_smoothing": (0.0, 0.1, 0.2, 0.4)}})
    first = {
        label.rpartition("=")[2]: history[0]["train_ce"]
        for (label, *_), history in results.histories.items()
    }
    rise = first["0.1"] - first["0.0"]  # of untrained networks: linear in ε
    assert rise != 0
    assert first["0.2"] - first["0.0"] == pytest.approx(2 * rise, abs=1e-5)
    assert first["0.4"] - first["0.0"] == pytest.approx(4 * rise, abs=1e-5)
    assert results.rows[1]["label_smoothing"] == 0.1


def test_the_method_and_the_recipe_smooth_alike():
    recipe = {**BASE["recipe"], "label_smoothing": 0.1}
    by_recipe = distill_jax.run({**BASE, "recipe": recipe})
    by_method = distill_jax.run({**BASE, "methods": {"label_smoothing": 1.0}})
    ((a,), (b,)) = (r.histories.values() for r in (by_recipe, by_method))
    assert a[0]["train_ce"] == pytest.approx(b[0]["train_label_smoothing"], rel=1e-6)
    for (_, one), (_, other) in zip(
        by_recipe.networks.values(), by_method.networks.values(), strict=True
    ):
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)


def test_labels_that_a_method_smooths_itself_are_not_smoothed_twice():
    config = {
        **BASE,
        "methods": {"label_smoothing": 1.0},
        "recipe": {**BASE["recipe"], "label_smoothing": 0.1},
    }
    with pytest.raises(ValueError, match="label_smoothing is 0.1, and method 'label_smoothing'"):
        distill_jax.run(config)


@pytest.mark.parametrize("epsilon", [-0.1, 1.0, float("nan")])
def test_a_smoothing_out_of_its_range_is_refused(epsilon):
    with pytest.raises(
        ValueError, match=f"label_smoothing is 0 or more and below 1, got {epsilon}"
    ):
        Recipe(label_smoothing=epsilon)
    with pytest.raises(ValueError, match=f"below 1, got {epsilon}"):
        distill_jax.run({**BASE, "recipe": {**BASE["recipe"], "label_smoothing": epsilon}})
