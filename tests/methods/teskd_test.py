"""TESKD: its loss in float64, where its gradients go, devices that agree, and a whole stage."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables

import distill_jax
from distill_jax import ConfigError, data, models
from distill_jax.evals import classification
from distill_jax.methods import losses
from distill_jax.methods.losses import EvolveOptions, LossOptions
from distill_jax.models import Outputs
from distill_jax.train import optim, programs, sharding
from distill_jax.train.reporter import Reporter
from distill_jax.train.step import (
    Batch,
    Hyper,
    Resident,
    TrainState,
    evolving_objective,
    make_train_step,
    multi_teacher_objective,
)

RANDOM = np.random.RandomState(0)
B, C, F = 6, 7, 5
LOGITS = (3 * RANDOM.standard_normal((3, B, C))).astype(np.float32)
FEATURES = RANDOM.standard_normal((3, B, F)).astype(np.float32)  # of both signs
LABELS = RANDOM.randint(0, C, B)
OPTIONS = [
    EvolveOptions(),
    EvolveOptions(temperature=3.0, feature_weight=0.1),
    EvolveOptions(detach_target=True, feature_weight=0.01),
    EvolveOptions(branch_weights=(0.5, 2.0), feature_weight=0.01, feature_reduction="mean"),
    EvolveOptions(
        temperature=3.0, ce_weight=1.0, kd_weight=0.3, detach_target=True, branch_weights=(0.0, 1.5)
    ),
    EvolveOptions(ce_weight=0.0, kd_weight=0.0, feature_weight=1.0),
]


# ----------------------------------------------------------------------- the loss again, in float64
def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def by_hand(logits, features, labels, options, batch_size):
    """The terms (B,) unweighted, and the gradients of the weighted loss, each (1 + branches, ...).

    The gradients are those of the sum over examples; by (ce and kl and feature) in this order.
    """
    s, f = np.float64(logits), np.float64(features)
    branches, t = len(s) - 1, options.temperature
    w = options.branch_weights or (1.0,) * branches
    a, b, c = options.ce_weight, options.kd_weight, options.feature_weight
    count = batch_size if options.feature_reduction == "sum" else 1
    ce, kl, feature = (np.zeros(len(labels)) for _ in range(3))
    by_logits, by_features = np.zeros_like(s), np.zeros_like(f)
    for i, weight in enumerate((1.0, *w)):
        log_q = log_softmax(s[i])
        ce += -weight * log_q[np.arange(len(labels)), labels]
        by_logits[i] += a * weight * (np.exp(log_q) - np.eye(s.shape[-1])[labels])
    p = np.exp(log_softmax(s[0] / t))
    m = p + 1e-7
    for i, weight in enumerate(w, 1):
        log_q = log_softmax(s[i] / t)
        kl += weight * t**2 * np.sum(m * (np.log(m) - log_q), -1)
        by_logits[i] += b * weight * t * (m.sum(-1, keepdims=True) * np.exp(log_q) - m)
        if not options.detach_target:
            slope = np.log(m) + 1 - log_q
            by_logits[0] += b * weight * t * p * (slope - np.sum(p * slope, -1, keepdims=True))
        gap = np.where((f[i] > 0) | (f[0] > 0), f[i] - f[0], 0)
        feature += weight * count * np.sum(gap**2, -1)
        by_features[i] += c * weight * count * 2 * gap
    terms = {"ce": ce, "kl": kl, "feature": feature}
    return terms, by_logits, by_features


@functools.partial(jax.jit, static_argnums=(3, 4))
def found(logits, features, labels, options, batch_size):
    def total(logits, features):
        loss, terms = losses.self_distillation(
            logits, features, labels, batch_size=batch_size, options=options
        )
        return jnp.sum(loss), (loss, terms)

    return jax.grad(total, (0, 1), has_aux=True)(logits, features)


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape and got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("options", OPTIONS)
def test_loss_terms_and_gradients_equal_float64(options):
    batch = 4 * B  # of which these are one device's
    (by_logits, by_features), (loss, terms) = found(LOGITS, FEATURES, LABELS, options, batch)
    expected, expected_by_logits, expected_by_features = by_hand(
        LOGITS, FEATURES, LABELS, options, batch
    )
    weights = (options.ce_weight, options.kd_weight, options.feature_weight)
    assert terms.keys() == {*expected, *(f"weighted_{name}" for name in expected)}
    for (name, value), weight in zip(expected.items(), weights, strict=True):
        close(terms[name], value)
        close(terms[f"weighted_{name}"], weight * value)
    close(loss, sum(w * v for w, v in zip(weights, expected.values(), strict=True)))
    close(by_logits, expected_by_logits, 4e-5)
    close(by_features, expected_by_features)


def test_the_gradients_by_hand_equal_numeric_differences():
    options = OPTIONS[1]
    _, by_logits, by_features = by_hand(LOGITS, FEATURES, LABELS, options, B)

    def loss(logits, features):
        terms, _, _ = by_hand(logits, features, LABELS, options, B)
        return sum(
            w * v.sum()
            for w, v in zip(
                (options.ce_weight, options.kd_weight, options.feature_weight),
                terms.values(),
                strict=True,
            )
        )

    for index in itertools.product(range(3), (0, B - 1), (0, 3)):
        step = np.zeros(LOGITS.shape)
        step[index] = 1e-5
        numeric = loss(LOGITS + step, FEATURES) - loss(LOGITS - step, FEATURES)
        assert numeric / 2e-5 == pytest.approx(by_logits[index], rel=1e-5, abs=1e-7)
        if index[0]:  # the backbone's own feature is a constant here, whatever the numbers say
            step = np.zeros(FEATURES.shape)
            step[index] = 1e-5
            numeric = loss(LOGITS, FEATURES + step) - loss(LOGITS, FEATURES - step)
            assert numeric / 2e-5 == pytest.approx(by_features[index], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("detach", [False, True])
def test_the_kl_reaches_the_backbone_unless_detached_and_the_feature_term_never(detach):
    options = EvolveOptions(ce_weight=0.0, feature_weight=1.0, detach_target=detach)
    (by_logits, by_features), _ = found(LOGITS, FEATURES, LABELS, options, B)
    assert (np.abs(by_logits[0]).min() > 1e-6) == (not detach)
    assert detach == (not np.any(by_logits[0]))
    assert not np.any(by_features[0])
    assert np.any(by_logits[1:]) and np.any(by_features[1:])


def test_features_that_neither_has_are_left_out():
    features = np.float32([[[-1, -1, 2, 2]], [[-5, 3, -5, 3]]])  # of the backbone, of a branch
    _, (_, terms) = found(LOGITS[:2, :1], features, LABELS[:1], EvolveOptions(), 1)
    assert float(terms["feature"][0]) == 16 + 49 + 1


def test_the_feature_sum_grows_with_the_batch_and_the_mean_does_not():
    def mean_of(reduction, repeats):
        _, terms = losses.self_distillation(
            np.tile(LOGITS, (1, repeats, 1)),
            np.tile(FEATURES, (1, repeats, 1)),
            np.tile(LABELS, repeats),
            batch_size=B * repeats,
            options=EvolveOptions(feature_reduction=reduction),
        )
        return {name: float(value.mean()) for name, value in terms.items()}

    for reduction, factor in (("sum", 3), ("mean", 1)):
        once, thrice = mean_of(reduction, 1), mean_of(reduction, 3)
        for name in once:
            expected = once[name] * (factor if "feature" in name else 1)
            assert thrice[name] == pytest.approx(expected, rel=1e-5)
    assert mean_of("sum", 1)["feature"] == pytest.approx(B * mean_of("mean", 1)["feature"])


def test_impossible_options_are_refused():
    for values, message in (
        ({"temperature": 0.0}, "temperature is a number above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature is a number above 0"),
        ({"kd_weight": -0.1}, "kd_weight is a number of 0 or more, got -0.1"),
        ({"ce_weight": float("inf")}, "ce_weight is a number of 0 or more"),
        ({"branch_weights": (1.0, -1.0)}, "branch_weights are numbers of 0 or more"),
        ({"feature_reduction": "max"}, "feature_reduction is one of"),
    ):
        with pytest.raises(ValueError, match=message):
            EvolveOptions(**values)
    with pytest.raises(ValueError, match="2 branches need as many branch_weights"):
        found(LOGITS, FEATURES, LABELS, EvolveOptions(branch_weights=(1.0,)), B)


# ------------------------------------------------------------------------ taught by frozen teachers
def test_a_frozen_teacher_adds_its_weighted_kl_to_the_backbone():
    def seen(logits, features):
        exits = [Outputs(s, f, ()) for s, f in zip(logits, features, strict=True)]
        return exits[0]._replace(branches=tuple(exits[1:]))

    teachers = jnp.asarray(2 * RANDOM.standard_normal((2, B, C)), jnp.float32)
    hyper = Hyper(1.0, 0.0, 3.0, 0.7, 1.0)  # another temperature than the branches'

    @functools.partial(jax.jit, static_argnums=2)
    def run(logits, keep, number):
        objective = evolving_objective(EvolveOptions(), LossOptions())

        def total(logits):
            loss, terms = objective(
                seen(logits, FEATURES), LABELS, teachers[:number], keep[:number], hyper, B
            )
            return jnp.sum(loss), (loss, terms)

        return jax.grad(total, has_aux=True)(logits)

    every, none = jnp.array([True, True]), jnp.array([False, False])
    alone_gradient, (alone, alone_terms) = run(LOGITS, every, 0)
    gradient, (loss, terms) = run(LOGITS, every, 2)
    log_q, log_p = (log_softmax(np.float64(x) / 3.0) for x in (LOGITS[0], teachers))
    kl = np.sum(np.exp(log_p) * (log_p - log_q), (0, 2))
    close(terms["frozen_kl"], kl)
    close(terms["weighted_frozen_kl"], 0.7 * 9 * kl)
    close(loss, np.asarray(alone) + 0.7 * 9 * kl)
    for name in alone_terms:
        np.testing.assert_array_equal(terms[name], alone_terms[name])
    weighted = sum(value for name, value in terms.items() if name.startswith("weighted_"))
    np.testing.assert_allclose(weighted, loss, rtol=1e-5)
    added = 0.7 * 3 * (2 * np.exp(log_q) - np.exp(log_p).sum(0))
    np.testing.assert_allclose(gradient[0] - alone_gradient[0], added, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(gradient[1:], alone_gradient[1:])
    _, (dropped, _) = run(LOGITS, none, 2)
    np.testing.assert_allclose(dropped, alone, rtol=1e-6)


# ---------------------------------------------------------------------------- through real networks
SHAPE, CLASSES, BATCH, STEPS = (8, 8, 3), 4, 8, 3
SGD = optim.OptimOptions(learning_rate=0.05)
SUMMED = EvolveOptions(feature_weight=1e-2)  # enough for a wrong sum to show


def examples(n=BATCH * STEPS):
    rng = np.random.default_rng(1)
    return (
        rng.integers(0, 256, (n, *SHAPE), np.uint8),
        rng.integers(0, CLASSES, n).astype(np.int32),
    )


def prepare(keys, images):
    return images.astype(jnp.float32) / 127.5 - 1


def test_the_kl_reaches_the_backbones_classifier_and_the_feature_term_its_stages_alone():
    network = models.build("evolving:plane2", CLASSES, SHAPE)
    variables = random_variables(network.shapes)
    images, labels = examples(BATCH)

    @jax.jit
    @jax.grad
    def gradient_of(params, chosen):
        outputs, _ = network.apply(
            {**variables, "params": params}, prepare(None, images), train=True
        )
        values = []
        for detach in (False, True):
            objective = evolving_objective(EvolveOptions(detach_target=detach), LossOptions())
            empty = jnp.zeros((0, BATCH, CLASSES)), jnp.zeros(0, bool)
            _, terms = objective(outputs, labels, *empty, Hyper(), BATCH)
            values += [terms["kl"].mean(), terms["feature"].mean()]
        return jnp.dot(chosen, jnp.stack(values))

    live, feature, detached, _ = (gradient_of(variables["params"], c) for c in np.eye(4))
    classifier, first, branch = "fc_layers.0", "conv_layers.0", "fc_b1"

    def largest(gradient, name):
        return float(jnp.abs(gradient[name]["kernel"]).max())

    assert largest(live, classifier) > 1e-3
    assert largest(detached, classifier) == largest(feature, classifier) == 0
    assert largest(feature, branch) == 0
    for gradient in (live, feature, detached):  # all of them come through the shared stages
        assert largest(gradient, first) > 1e-3
    np.testing.assert_allclose(live[branch]["kernel"], detached[branch]["kernel"], rtol=1e-4)


@functools.cache
def trained(mode, devices):
    """The state after some steps of evolving:plane2 and the metrics' sums, as NumPy."""
    topology = sharding.Topology(mode, devices)
    network = models.build("evolving:plane2", CLASSES, SHAPE)

    def step(axis_name):
        return make_train_step(
            network=network,
            teachers=(),
            optimizer=SGD,
            schedule=optim.schedule(SGD, 1, STEPS),
            objective=evolving_objective(SUMMED, LossOptions()),
            prepare=prepare,
            axis_name=axis_name,
        )

    state = start_of(network)
    images, labels = examples()
    rows = jnp.arange(BATCH)
    batch = Batch(images[:BATCH], labels[:BATCH], rows)
    arguments = (Hyper(weight_decay=1e-3), jax.random.key(0))
    sums = jax.eval_shape(step(None), state, (), batch, *arguments)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    order = np.arange(BATCH * STEPS, dtype=np.int32).reshape(STEPS, BATCH)
    loop = sharding.train_loop(step(topology.axis_name), topology)
    state, zeros, data, arguments = topology.replicate(
        (state, zeros, Resident(images, labels), arguments)
    )
    bounds = np.int32(0), np.int32(STEPS)
    return jax.device_get(loop(state, zeros, (), data, order, *bounds, *arguments))


def start_of(network):
    variables = random_variables(network.shapes)
    opt_state = optim.transform(SGD, 0.0, 0.0).init(variables["params"])
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, variables["params"], variables["batch_stats"], opt_state, jnp.int32(0))


@pytest.mark.parametrize(("mode", "devices"), [("pmap", 1), ("pmap", 2), ("pmap", 4)])
def test_every_mode_and_device_count_gives_the_same_loss_and_parameters(mode, devices):
    state, sums = trained(mode, devices)
    expected_state, expected = trained("jit", 1)
    assert {"kl", "feature", "weighted_feature", "branch1_accuracy"} <= expected.keys()
    for name in expected:
        np.testing.assert_allclose(sums[name], expected[name], rtol=2e-5, err_msg=name)
    chex.assert_trees_all_close(state, expected_state, rtol=2e-4, atol=2e-5)
    moved = np.abs(state.params["fc_b1"]["kernel"] - filled_kernel("fc_b1")).max()
    assert moved > 1e-3


def filled_kernel(name):
    variables = random_variables(models.build("evolving:plane2", CLASSES, SHAPE).shapes)
    return np.asarray(variables["params"][name]["kernel"])


def test_the_feature_sum_is_over_the_whole_batch_and_matters():
    _, sums = trained("jit", 1)
    _, halves = trained("pmap", 2)
    share = sums["weighted_feature"][0] / sums["loss"][0]
    assert share > 0.01  # else half of it would not have been seen above
    assert halves["feature"][0] == pytest.approx(sums["feature"][0], rel=2e-5)


# ----------------------------------------------------------------------------------- half precision
@pytest.mark.parametrize("name", ["plane2", "resnet8", "evolving:plane2"])
def test_bfloat16_gives_nearly_the_loss_of_float32_and_keeps_float32_variables(name):
    wide = models.build(name, CLASSES, SHAPE)
    narrow = dataclasses.replace(wide, dtype="bfloat16")
    objective = (
        evolving_objective(EvolveOptions(), LossOptions())
        if wide.branches
        else multi_teacher_objective(LossOptions())
    )
    images, labels = examples(BATCH)
    rows = jnp.arange(BATCH)
    batch = Batch(images, labels, rows)
    state = start_of(wide)
    empty = jnp.zeros((0, BATCH, CLASSES)), jnp.zeros(0, bool)

    @jax.jit
    def loss_of(variables):
        outputs, _ = wide.apply(variables, prepare(None, images), train=True)
        return objective(outputs, labels, *empty, Hyper(), BATCH)[0].mean()

    step = make_train_step(
        network=narrow,
        teachers=(),
        optimizer=SGD,
        schedule=lambda step: 0.05,
        objective=objective,
        prepare=prepare,
    )
    after, sums = jax.jit(step)(state, (), batch, Hyper(), jax.random.key(0))
    loss, expected = float(sums["loss"][0]) / BATCH, float(loss_of(state.variables))
    assert sums["loss"][0].dtype == jnp.float32
    # bfloat16 keeps eight bits; the layers' errors mostly cancel in the mean over the batch.
    assert loss == pytest.approx(expected, rel=2**-6)
    assert abs(loss - expected) > 1e-6 * expected  # else nothing was computed in it
    for tree in (after.params, after.batch_stats, after.opt_state):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {np.dtype(np.float32)}
    chex.assert_tree_all_finite(after)


# ------------------------------------------------------------------------------------ a whole stage
TINY = {
    "dataset": {"name": "synthetic:8x8x3:4:64:32", "valid_fraction": 0.5},
    "networks": ("evolving:plane4", "plane2"),
    "students": ("evolving:plane4", "plane2"),
    "guidance": "dense",
    "recipe": {"epochs": 2, "batch_size": 16},
}


@pytest.fixture(scope="module")
def run():
    """The results, and the whole evolving network with the variables that it was left with."""
    kept, deploy = [], models.deploy

    def spy(network, variables):
        kept.append((network, variables))
        return deploy(network, variables)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "deploy", spy)
        results = distill_jax.run(TINY)
    ((whole, variables),) = [pair for pair in kept if pair[0].branches]
    return results, whole, variables


def test_what_is_left_of_an_evolving_network_is_its_backbone_with_the_same_logits(run):
    results, whole, variables = run
    network, deployed = results.networks["dense", "evolving:plane4", 0]
    assert network == models.build("plane4", 4, SHAPE)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, deployed) == jax.tree.map(jnp.shape, shapes)
    for collection, modules in deployed.items():
        for name, leaves in modules.items():
            chex.assert_trees_all_equal(leaves, variables[collection][name])
    dataset = data.load(**TINY["dataset"])
    asked = [(network, deployed), (whole, variables)]
    own, inside = (exits[0] for exits in programs.predict(asked, dataset.test, dataset))
    np.testing.assert_allclose(own, inside, rtol=1e-5, atol=1e-6)
    row = results.rows[0]
    assert row["network"] == "evolving:plane4"
    assert row["test_accuracy"] == classification.accuracy(own, dataset.test.labels)
    assert row["parameters"] == models.count_parameters(network)
    assert row["ece"] == classification.expected_calibration_error(own, dataset.test.labels)


def test_the_row_of_an_evolving_network_has_its_branches_accuracies(run):
    results, whole, variables = run
    dataset = data.load(**TINY["dataset"])
    images = data.normalise(jnp.asarray(dataset.test.images), dataset.mean, dataset.std)
    outputs = jax.jit(lambda v, x: whole.apply(v, x)[0])(variables, images)
    (branch,) = outputs.branches
    row = results.rows[0]
    expected = classification.accuracy(np.asarray(branch.logits), dataset.test.labels)
    assert row["test_branch1_accuracy"] == expected
    assert "test_branch2_accuracy" not in row and "test_branch1_accuracy" not in results.rows[1]
    for record in results.histories["dense", "evolving:plane4", 0]:
        total = sum(record[f"train_weighted_{name}"] for name in ("ce", "kl", "feature"))
        assert record["train_loss"] == pytest.approx(total, rel=1e-5)
        assert {"train_branch1_accuracy", "valid_branch1_accuracy"} <= record.keys()


def test_an_evolved_backbone_heads_a_dense_row(run):
    results, _, _ = run
    dataset = data.load(**TINY["dataset"])
    row = results.rows[1]
    assert (row["network"], row["teachers"]) == ("plane2", ["evolving:plane4"])
    pairs = [results.networks["dense", name, 0] for name in ("plane2", "evolving:plane4")]
    student, teacher = programs.teach(pairs, dataset.test, dataset)
    assert row["agreement"] == {"evolving:plane4": classification.agreement(student, teacher)}
    assert row["kl"] == {"evolving:plane4": classification.kl(teacher, student)}
    assert all(record["train_kl"] > 0 for record in results.histories["dense", "plane2", 0])


def test_branch_weights_of_another_number_are_refused_before_anything_starts():
    class Loud(Reporter):
        def stage_started(self, jobs, step, steps, histories):
            raise AssertionError("a stage started")

    wrong = {**TINY, "evolve": {"branch_weights": (1.0, 1.0)}}
    with pytest.raises(ConfigError, match="evolving:plane4 has 1 branches"):
        distill_jax.run(wrong, reporter=Loud())
