"""TESKD: its loss in float64, where its gradients go, devices that agree, and a whole stage."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of, outputs_of
from float64 import close, kl_of, log_softmax
from marks import slow
from random_variables import random_variables

import distill_jax
from distill_jax import ConfigError, data, models
from distill_jax.evals import classification
from distill_jax.methods import KD, TESKD, CrossEntropy, Hyper, Shapes, base
from distill_jax.train import inference, metrics, optim, sharding
from distill_jax.train.reporter import Reporter
from distill_jax.train.state import Batch, DeviceDataset
from distill_jax.train.step import init_state, make_train_step
from distill_jax.train.terms import Student

RANDOM = np.random.RandomState(0)
B, C, F = 6, 7, 5
LOGITS = (3 * RANDOM.standard_normal((3, B, C))).astype(np.float32)
FEATURES = RANDOM.standard_normal((3, B, F)).astype(np.float32)  # of both signs
LABELS = RANDOM.randint(0, C, B)
METHODS = [
    TESKD(),
    TESKD(temperature=3.0, feature_weight=0.1),
    TESKD(detach_target=True, feature_weight=0.01),
    TESKD(branch_weights=(0.5, 2.0), feature_weight=0.01, feature_reduction="mean"),
    TESKD(
        temperature=3.0, ce_weight=1.0, kd_weight=0.3, detach_target=True, branch_weights=(0.0, 1.5)
    ),
    TESKD(ce_weight=0.0, kd_weight=0.0, feature_weight=1.0),
]


# ----------------------------------------------------------------------- the loss again, in float64
def by_hand(logits, features, labels, method, batch_size):
    """The terms (B,) unweighted, and the gradients of the weighted loss, each (1 + branches, ...).

    The gradients are those of the sum over examples; by (ce and kl and feature) in this order.
    """
    s, f = np.float64(logits), np.float64(features)
    branches, t = len(s) - 1, method.temperature
    w = method.branch_weights or (1.0,) * branches
    a, b, c = method.ce_weight, method.kd_weight, method.feature_weight
    count = batch_size if method.feature_reduction == "sum" else 1
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
        if not method.detach_target:
            slope = np.log(m) + 1 - log_q
            by_logits[0] += b * weight * t * p * (slope - np.sum(p * slope, -1, keepdims=True))
        gap = np.where((f[i] > 0) | (f[0] > 0), f[i] - f[0], 0)
        feature += weight * count * np.sum(gap**2, -1)
        by_features[i] += c * weight * count * 2 * gap
    terms = {"teskd_ce": ce, "teskd_kl": kl, "teskd_feature": feature}
    return terms, by_logits, by_features


def exits_of(logits, features):
    """The outputs of a backbone with its branches."""
    backbone, *branches = (outputs_of(*pair) for pair in zip(logits, features, strict=True))
    return backbone._replace(branches=tuple(branches))


def terms_of(logits, features, labels, method, batch_size):
    context = context_of(exits_of(logits, features), labels=labels)
    return method.terms({}, dataclasses.replace(context, batch_size=batch_size))[0]


@functools.partial(jax.jit, static_argnums=(3, 4))
def evaluated(logits, features, labels, method, batch_size):
    """Gradients of the summed loss by logits and features; (loss (B,), terms (B,), weights)."""

    def total(logits, features):
        terms = terms_of(logits, features, labels, method, batch_size)
        loss = sum(term.weight * term.value for term in terms.values())
        values, weights = ({k: term[i] for k, term in terms.items()} for i in range(2))
        return jnp.sum(loss), (loss, values, weights)

    return jax.grad(total, (0, 1), has_aux=True)(logits, features)


@pytest.mark.parametrize("method", METHODS)
def test_loss_terms_and_gradients_equal_float64(method):
    batch = 4 * B  # of which these are one device's
    case = (LOGITS, FEATURES, LABELS, method, batch)
    (by_logits, by_features), (loss, terms, weights) = evaluated(*case)
    expected, expected_by_logits, expected_by_features = by_hand(*case)
    numbers = (method.ce_weight, method.kd_weight, method.feature_weight)
    assert terms.keys() == expected.keys()
    for (name, value), number in zip(expected.items(), numbers, strict=True):
        close(terms[name], value)
        assert weights[name] == np.float32(number)
    close(loss, sum(w * v for w, v in zip(numbers, expected.values(), strict=True)))
    close(by_logits, expected_by_logits, 4e-5)
    close(by_features, expected_by_features)


def test_the_gradients_by_hand_equal_numeric_differences():
    method = METHODS[1]
    _, by_logits, by_features = by_hand(LOGITS, FEATURES, LABELS, method, B)

    def loss(logits, features):
        terms, _, _ = by_hand(logits, features, LABELS, method, B)
        return sum(
            w * v.sum()
            for w, v in zip(
                (method.ce_weight, method.kd_weight, method.feature_weight),
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
    method = TESKD(ce_weight=0.0, feature_weight=1.0, detach_target=detach)
    (by_logits, by_features), _ = evaluated(LOGITS, FEATURES, LABELS, method, B)
    assert (np.abs(by_logits[0]).min() > 1e-6) == (not detach)
    assert detach == (not np.any(by_logits[0]))
    assert not np.any(by_features[0])
    assert np.any(by_logits[1:]) and np.any(by_features[1:])


def test_features_that_neither_has_are_left_out():
    features = np.float32([[[-1, -1, 2, 2]], [[-5, 3, -5, 3]]])  # of the backbone, of a branch
    _, (_, terms, _) = evaluated(LOGITS[:2, :1], features, LABELS[:1], TESKD(), 1)
    assert float(terms["teskd_feature"][0]) == 16 + 49 + 1


def test_the_feature_sum_grows_with_the_batch_and_the_mean_does_not():
    def mean_of(reduction, repeats):
        _, (_, terms, weights) = evaluated(
            np.tile(LOGITS, (1, repeats, 1)),
            np.tile(FEATURES, (1, repeats, 1)),
            np.tile(LABELS, repeats),
            TESKD(feature_reduction=reduction),
            B * repeats,
        )
        means = {name: float(value.mean()) for name, value in terms.items()}
        return means | {f"weighted {name}": float(weights[name]) * means[name] for name in means}

    for reduction, factor in (("sum", 3), ("mean", 1)):
        once, thrice = mean_of(reduction, 1), mean_of(reduction, 3)
        for name in once:
            expected = once[name] * (factor if "feature" in name else 1)
            assert thrice[name] == pytest.approx(expected, rel=1e-5)
    one_sum, one_mean = (mean_of(reduction, 1)["teskd_feature"] for reduction in ("sum", "mean"))
    assert one_sum == pytest.approx(B * one_mean)


def test_impossible_numbers_are_refused():
    for values, message in (
        ({"temperature": 0.0}, "temperature is a number above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature is a number above 0"),
        ({"kd_weight": -0.1}, "kd_weight is a number of 0 or more, got -0.1"),
        ({"ce_weight": float("inf")}, "ce_weight is a number of 0 or more"),
        ({"branch_weights": (1.0, -1.0)}, "branch_weights are numbers of 0 or more"),
        ({"feature_reduction": "max"}, "feature_reduction is one of"),
    ):
        with pytest.raises(ValueError, match=message):
            TESKD(**values)


def test_networks_without_branches_or_with_others_than_weighted_are_refused():
    shapes = Shapes(exits_of(LOGITS, FEATURES), (), C, B)
    TESKD(branch_weights=(1.0, 2.0)).check(shapes)
    with pytest.raises(ValueError, match="has 2 branches, branch_weights gives"):
        TESKD(branch_weights=(1.0,)).check(shapes)
    alone = shapes._replace(student=shapes.student._replace(branches=()))
    with pytest.raises(ValueError, match="needs a network with branches"):
        TESKD().check(alone)


# ----------------------------------------------------------------------------- limits of numbers
LIMITS = [
    (dtype, float(limit))
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32)
    for limit in (jnp.finfo(dtype).max, jnp.finfo(dtype).tiny, jnp.finfo(dtype).smallest_subnormal)
]


@pytest.mark.parametrize(("dtype", "magnitude"), LIMITS)
@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.5, 1.0, 4.0, 20.0, 100.0])
def test_no_number_of_any_type_makes_a_loss_or_gradient_that_is_not_finite(
    dtype, magnitude, temperature
):
    values = np.zeros((3, 4))
    values[0, 0], values[1] = magnitude, [magnitude, -magnitude, magnitude, 0]
    exits = jnp.asarray(np.stack([values, -values, values[:, ::-1]]), dtype)
    labels = jnp.array([1, 1, 2])
    chex.assert_tree_all_finite(
        evaluated(exits, exits, labels, TESKD(temperature=temperature), len(labels))
    )


# ------------------------------------------------------------------------ taught by frozen teachers
def test_a_frozen_teacher_adds_its_weighted_kl_to_the_backbone():
    teachers = jnp.asarray(2 * RANDOM.standard_normal((2, B, C)), jnp.float32)
    hyper = Hyper(temperature=3.0, kd_weight=0.7)  # another temperature than the branches'

    @functools.partial(jax.jit, static_argnums=2)
    def run(logits, mask, methods):
        def total(logits):
            context = context_of(exits_of(logits, FEATURES), teachers, mask, LABELS, hyper)
            terms = {}
            for method in methods:
                terms |= method.terms({}, context)[0]
            loss = sum(term.weight * term.value for term in terms.values())
            return jnp.sum(loss), (loss, terms)

        return jax.grad(total, has_aux=True)(logits)

    every, none = jnp.array([True, True]), jnp.array([False, False])
    alone_gradient, (alone, alone_terms) = run(LOGITS, every, (TESKD(),))
    gradient, (loss, terms) = run(LOGITS, every, (TESKD(), KD()))
    kl = sum(kl_of(teacher, LOGITS[0], 3.0) for teacher in teachers)
    close(terms["kl"].value, kl)
    close(terms["kl"].weight * terms["kl"].value, 0.7 * 9 * kl)
    close(loss, np.asarray(alone) + 0.7 * 9 * kl)
    for name in alone_terms:
        chex.assert_trees_all_equal(terms[name], alone_terms[name])
    log_q, log_p = (log_softmax(np.float64(x) / 3.0) for x in (LOGITS[0], teachers))
    added = 0.7 * 3 * (2 * np.exp(log_q) - np.exp(log_p).sum(0))
    np.testing.assert_allclose(gradient[0] - alone_gradient[0], added, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(gradient[1:], alone_gradient[1:])
    _, (dropped, _) = run(LOGITS, none, (TESKD(), KD()))
    np.testing.assert_allclose(dropped, alone, rtol=1e-6)


# ---------------------------------------------------------------------------- through real networks
SHAPE, CLASSES, BATCH, STEPS = (8, 8, 3), 4, 8, 3
SGD = optim.OptimOptions(learning_rate=0.05)
SUMMED = TESKD(feature_weight=1e-2)  # enough for a wrong sum to show


def examples(n=BATCH * STEPS):
    rng = np.random.default_rng(1)
    return (
        rng.integers(0, 256, (n, *SHAPE), np.uint8),
        rng.integers(0, CLASSES, n).astype(np.int32),
    )


def first_batch():
    images, labels = examples(BATCH)
    places = jnp.arange(BATCH, dtype=jnp.int32)
    return Batch(jnp.asarray(images), jnp.asarray(labels), places, places)


def preprocess(keys, images):
    return images.astype(jnp.float32) / 127.5 - 1


def test_the_kl_reaches_the_backbones_classifier_and_the_feature_term_its_stages_alone():
    network = models.build("evolving:plane2", CLASSES, SHAPE)
    variables = random_variables(network.shapes)
    images, labels = examples(BATCH)

    @jax.jit
    @jax.grad
    def gradient_of(params, chosen):
        outputs, _ = network.apply(
            {**variables, "params": params}, preprocess(None, images), train=True
        )
        values = []
        for detach in (False, True):
            context = context_of(outputs, labels=labels)
            terms, _ = TESKD(detach_target=detach).terms({}, context)
            values += [terms["teskd_kl"].value.mean(), terms["teskd_feature"].value.mean()]
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


def step_of(network, method, axis_name=None):
    student = Student(network, (("teskd", method),), SGD, optim.schedule(SGD, 1, STEPS))
    return make_train_step(students=(student,), preprocess=preprocess, axis_name=axis_name)


@functools.cache
def trained(mode, devices):
    """The state after some steps of evolving:plane2 and the metrics' sums, as NumPy."""
    topology = sharding.Topology(mode, devices)
    network = models.build("evolving:plane2", CLASSES, SHAPE)
    state = start_of(network)
    arguments = {network.name: Hyper(weight_decay=1e-3)}, jax.random.key(0)
    counted = jax.eval_shape(step_of(network, SUMMED), state, (), first_batch(), *arguments)[1]
    order = np.arange(BATCH * STEPS, dtype=np.int32).reshape(STEPS, BATCH)
    loop = sharding.train_loop(step_of(network, SUMMED, topology.axis_name), topology)
    state, sums, dataset, arguments = topology.replicate(
        (state, metrics.zeros_like(counted), DeviceDataset(*examples()), arguments)
    )
    bounds = np.int32(0), np.int32(STEPS)
    state, sums = jax.device_get(loop(state, sums, (), dataset, order, *bounds, *arguments))
    return state, sums[network.name]


def start_of(network):
    start = random_variables(network.shapes)
    return init_state(network, SGD, jax.random.key(0), start=start)


@pytest.mark.parametrize(("mode", "devices"), [*slow(("pmap", 1)), ("pmap", 2), *slow(("pmap", 4))])
def test_every_mode_and_device_count_gives_the_same_loss_and_parameters(mode, devices):
    state, sums = trained(mode, devices)
    expected_state, expected = trained("jit", 1)
    assert expected.terms.keys() == {"teskd_ce", "teskd_kl", "teskd_feature"}
    assert len(expected.accuracy) == 2
    chex.assert_trees_all_close(sums, expected, rtol=2e-5)
    chex.assert_trees_all_close(state, expected_state, rtol=2e-4, atol=2e-5)
    ((name, params),) = state.params["networks"].items()
    start = random_variables(models.build(name, CLASSES, SHAPE).shapes)["params"]
    assert np.abs(params["fc_b1"]["kernel"] - start["fc_b1"]["kernel"]).max() > 1e-3


@pytest.mark.devices
def test_the_feature_sum_is_over_the_whole_batch_and_matters():
    _, sums = trained("jit", 1)
    _, halves = trained("pmap", 2)
    share = sums.weighted["teskd_feature"][0] / sums.loss[0]
    assert share > 0.01  # else half of it would not have been seen above
    whole, halved = (x.terms["teskd_feature"][0] for x in (sums, halves))
    assert halved == pytest.approx(whole, rel=2e-5)


# ----------------------------------------------------------------------------------- half precision
@pytest.mark.parametrize("name", ["plane2", *slow("resnet8", "evolving:plane2")])
def test_bfloat16_gives_nearly_the_loss_of_float32_and_keeps_float32_variables(name):
    wide = models.build(name, CLASSES, SHAPE)
    narrow = dataclasses.replace(wide, dtype="bfloat16")
    method = TESKD() if wide.branches else CrossEntropy()
    state, batch = start_of(wide), first_batch()

    @jax.jit
    def loss_of(variables):
        outputs, _ = wide.apply(variables, preprocess(None, batch.inputs), train=True)
        return base.total(method.terms({}, context_of(outputs, labels=batch.labels))[0])

    step = jax.jit(step_of(narrow, method))
    after, counted = step(state, (), batch, {name: Hyper()}, jax.random.key(0))
    counted = counted[name]
    loss, expected = float(counted.loss[0]) / BATCH, float(loss_of(state.variables(name)))
    assert counted.loss[0].dtype == jnp.float32
    # bfloat16 keeps eight bits; the layers' errors mostly cancel in the mean over the batch.
    assert loss == pytest.approx(expected, rel=2**-6)
    assert abs(loss - expected) > 1e-6 * expected  # else nothing was computed in it
    for tree in (after.params, after.collections, after.opt_state):
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
    deployed, deploy = [], models.deploy

    def spy(network, variables):
        deployed.append((network, variables))
        return deploy(network, variables)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "deploy", spy)
        results = distill_jax.run(TINY)
    ((whole, variables),) = [pair for pair in deployed if pair[0].branches]
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
    pairs = [(network, deployed), (whole, variables)]
    own, inside = (exits[0] for exits in inference.predict_logits(pairs, dataset.test, dataset))
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
        terms = ("teskd_ce", "teskd_kl", "teskd_feature")
        total = sum(record[f"train_weighted_{name}"] for name in terms)
        assert record["train_loss"] == pytest.approx(total, rel=1e-5)
        assert {"train_branch1_accuracy", "valid_branch1_accuracy"} <= record.keys()


def test_an_evolved_backbone_heads_a_dense_row(run):
    results, _, _ = run
    dataset = data.load(**TINY["dataset"])
    row = results.rows[1]
    assert (row["network"], row["teachers"]) == ("plane2", ["evolving:plane4"])
    pairs = [results.networks["dense", name, 0] for name in ("plane2", "evolving:plane4")]
    shown = inference.teacher_outputs(pairs, dataset.test, dataset, sharding.Topology())
    student, teacher = shown.logits.swapaxes(0, 1)
    assert row["agreement"] == {"evolving:plane4": classification.agreement(student, teacher)}
    assert row["kl"] == {"evolving:plane4": classification.kl(teacher, student)}
    assert all(record["train_kl"] > 0 for record in results.histories["dense", "plane2", 0])


def test_branch_weights_of_another_number_are_refused_before_anything_starts():
    class Loud(Reporter):
        def stage_started(self, stages, step, steps, histories):
            raise AssertionError("a stage started")

    wrong = {**TINY, "evolve": {"branch_weights": (1.0, 1.0)}}
    with pytest.raises(ConfigError, match="evolving:plane4 .*has 1 branches"):
        distill_jax.run(wrong, reporter=Loud())
