"""Networks that one step trains: by hand, on any number of devices, with frozen teachers beside."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of, outputs_of
from marks import slow

from distill_jax import models
from distill_jax.methods import DML, KD, CrossEntropy, Hyper, LossOptions, heard, losses
from distill_jax.methods.base import Method, Term, total
from distill_jax.train import metrics, optim, sharding
from distill_jax.train.dropping import Dropping
from distill_jax.train.state import Batch, DeviceDataset, TrainState
from distill_jax.train.step import draw_from, init_state, make_train_step
from distill_jax.train.terms import Student

SHAPE, CLASSES, BATCH, STEPS = (8, 8, 3), 5, 8, 3
N = BATCH * STEPS
CE, DETACHED, ATTACHED = ("ce", CrossEntropy()), ("dml", DML()), ("dml", DML(detached=False))
RULES = {
    "plane2": (optim.OptimOptions(momentum=0.0), Hyper(lr_scale=0.1)),
    "plane2#2": (optim.OptimOptions(momentum=0.0), Hyper(lr_scale=0.02, methods={"dml": 2.0})),
}


def build(name):
    network = models.build(name.partition("#")[0], CLASSES, SHAPE)
    return dataclasses.replace(network, name=name)


def examples():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (N, *SHAPE), np.uint8)
    return images, draw.integers(0, CLASSES, N).astype(np.int32)


def preprocess(keys, images):
    return images.astype(jnp.float32) / 128 - 1


def peers(method):
    """Two networks that teach each other by a method, each with its own rule."""
    names = tuple(RULES)
    return tuple(
        Student(build(name), (CE, method), rule, lambda step: 1.0, live=(other,))
        for (name, (rule, _)), other in zip(RULES.items(), names[::-1], strict=True)
    )


def state_of(students):
    key = jax.random.key(0)
    return TrainState.join([init_state(s.network, s.optimizer, key) for s in students])


@functools.cache
def trained(method=DETACHED, mode="jit", devices=1, **options):
    """The state after an epoch of two peers, and the sums of their metrics."""
    topology, students = sharding.Topology(mode, devices), peers(method)

    def step(axis_name):
        return make_train_step(
            students=students, preprocess=preprocess, axis_name=axis_name, **options
        )

    hyper, key = {name: numbers for name, (_, numbers) in RULES.items()}, jax.random.key(0)
    images, labels = (jnp.asarray(x[:BATCH]) for x in examples())
    places = jnp.arange(BATCH, dtype=jnp.int32)
    state, batch = state_of(students), Batch(images, labels, places, places)
    counted = jax.eval_shape(step(None), state, (), batch, hyper, key)[1]
    arrays = state, metrics.zeros_like(counted)
    order = np.arange(N, dtype=np.int32).reshape(STEPS, BATCH)
    loop = sharding.train_loop(step(topology.axis_name), topology)
    rest = DeviceDataset(*examples()), order, np.int32(0), np.int32(STEPS), hyper
    key = topology.replicate(key)
    return jax.device_get(loop(*topology.replicate(arrays), (), *rest, key))


def by_hand(attached):
    """The parameters of both after an epoch, by plain gradients of losses that are written out."""
    (one, other), images = peers(DETACHED), preprocess(None, jnp.asarray(examples()[0]))
    labels, names = jnp.asarray(examples()[1]), tuple(RULES)
    state = jax.device_get(state_of((one, other)))
    variables = {name: state.variables(name) for name in names}
    params = {name: variables[name].pop("params") for name in names}

    def logits_of(name, params, x, collections):
        network = {"plane2": one, "plane2#2": other}[name].network
        outputs, after = network.apply({"params": params, **collections}, x, train=True)
        return outputs.logits, after

    def divergence(target, logits):
        p = jax.nn.softmax(target)
        return jnp.sum(p * (jnp.log(p) - jax.nn.log_softmax(logits)), -1).mean()

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients(params, collections, x, y):
        seen = {name: logits_of(name, params[name], x, collections[name]) for name in names}
        logits = [seen[name][0] for name in names]
        shown = logits if attached else [jax.lax.stop_gradient(x) for x in logits]
        ce = sum(-jax.nn.log_softmax(x)[jnp.arange(BATCH), y].mean() for x in logits)
        live = divergence(shown[1], logits[0]) + 2.0 * divergence(shown[0], logits[1])
        return ce + live, {name: seen[name][1] for name in names}

    rates = {name: numbers.lr_scale for name, (_, numbers) in RULES.items()}
    for t in range(STEPS):
        rows = slice(t * BATCH, (t + 1) * BATCH)
        slopes, variables = gradients(params, variables, images[rows], labels[rows])
        params = {
            name: jax.tree.map(lambda p, g, r=rates[name]: p - r * g, params[name], slopes[name])
            for name in names
        }
    return params


@pytest.mark.parametrize(("method", "attached"), [(DETACHED, False), (ATTACHED, True)])
def test_peers_move_as_the_gradients_written_out_say(method, attached):
    state, _ = trained(method)
    expected = by_hand(attached)
    chex.assert_trees_all_close(state.params["networks"], expected, rtol=2e-4, atol=2e-6)
    other = by_hand(not attached)["plane2"]
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params["networks"]["plane2"], other)
    assert max(jax.tree.leaves(gaps)) > 1e-4  # else the two would not have been told apart


def test_what_is_counted_of_each_is_its_own():
    _, sums = trained()
    assert sums.keys() == RULES.keys()
    for own in sums.values():
        parts = own.weighted["ce"][0] + own.weighted["dml"][0]
        assert own.loss[0] == pytest.approx(parts, rel=1e-6) and own.kept is None
    assert sums["plane2#2"].weighted["dml"][0] == 2 * sums["plane2#2"].terms["dml"][0]
    assert sums["plane2"].loss[0] != sums["plane2#2"].loss[0]


MODES = [("jit", 2), ("pmap", 2), *slow(("jit", 4), ("pmap", 1), ("pmap", 4))]


@pytest.mark.parametrize(("mode", "devices"), MODES)
def test_peers_train_alike_on_any_number_of_devices(mode, devices):
    state, sums = trained(ATTACHED, mode, devices)
    expected_state, expected = trained(ATTACHED)
    chex.assert_trees_all_close(sums, expected, rtol=2e-5)
    chex.assert_trees_all_close(state, expected_state, rtol=2e-4, atol=2e-6)


# ------------------------------------------------------------------- what a method hears, and shows
class Live(Method):
    edges = "live"


class Frozen(Method):
    edges = "frozen"


@pytest.mark.parametrize(
    ("method", "others", "expected"),
    [
        (Method(), (), (0, 1, 2, 3)),
        (Method(), (Live(),), (0, 1)),
        (Live(), (Method(),), (2, 3)),
        (Frozen(), (), (0, 1)),
        (DML(), (), (3,)),  # not itself
        (KD(), (), (0, 1, 3)),
        (KD(), (DML(),), (0, 1)),
        (CrossEntropy(LossOptions()), (KD(),), (0, 1, 3)),  # as KD, which it is balanced against
    ],
)
def test_what_a_method_hears(method, others, expected):
    assert heard(method, (method, *others), "me", 2, ("me", "you")) == expected


@dataclasses.dataclass(frozen=True)
class Spy(Method):
    """Reads everything of a live teacher, itself too."""

    needs = ("logits", "feature", "head", "apply")
    detached: bool = True

    def terms(self, variables, context):
        """The gap to each teacher by its head, by its logits, and by what it says of the inputs."""

        def gap(k, teacher):
            logits = context.teacher_heads[k](teacher.feature)
            again = context.teacher_apply(k, context.inputs).logits
            return (3 * logits - 2 * teacher.logits + 0 * again).sum(-1)

        return {"spy": Term(context.over_teachers(gap))}, variables


def test_heads_and_other_inputs_of_live_teachers_are_detached_where_their_outputs_are():
    """By a term without the student's own outputs, whose gradient is then that of its targets."""

    def slopes(detached):
        students = tuple(
            Student(build(name), (("spy", Spy(detached)),), rule, lambda step: 1.0, live=live)
            for (name, (rule, _)), live in zip(
                RULES.items(), (("plane2", "plane2#2"), ()), strict=True
            )
        )
        students = (students[0], students[1]._replace(methods=(CE,)))
        step = make_train_step(students=students, preprocess=preprocess)
        images, labels = (jnp.asarray(x[:BATCH]) for x in examples())
        places = jnp.arange(BATCH, dtype=jnp.int32)
        hyper = {name: Hyper(lr_scale=1.0, methods={"ce": 0.0}) for name in RULES}
        state = state_of(students)
        after, _ = jax.jit(step)(
            state, (), Batch(images, labels, places, places), hyper, jax.random.key(0)
        )
        before, after = state.params["networks"], after.params["networks"]
        return jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)

    assert not any(jax.tree.leaves(slopes(True)))
    moved = slopes(False)
    for name in RULES:
        assert max(jax.tree.leaves(moved[name])) > 1e-3


# ------------------------------------------------------------------------- frozen teachers beside
def test_each_peer_masks_its_own_frozen_teachers_and_those_nobody_keeps_are_not_run():
    teachers = tuple(dataclasses.replace(build("plane2"), name=f"t{k}") for k in range(3))
    mine = lambda mask: lambda key, step, hyper: jnp.asarray(mask)  # noqa: E731
    places = {"plane2": ((0, 1), (True, False)), "plane2#2": ((1, 2), (False, True))}
    options = LossOptions()
    students = tuple(
        Student(
            build(name),
            (("ce", CrossEntropy(options)), ("kd", KD(options)), DETACHED),
            RULES[name][0],
            lambda step: 1.0,
            frozen=places[name][0],
            live=tuple(set(RULES) - {name}),
            draw_mask=mine(places[name][1]),
        )
        for name in RULES
    )
    step = make_train_step(students=students, teachers=teachers, preprocess=preprocess)
    variables = tuple(t.init(jax.random.key(5 + k)) for k, t in enumerate(teachers))
    images, labels = (jnp.asarray(x[:BATCH]) for x in examples())
    index = jnp.arange(BATCH, dtype=jnp.int32)
    hyper = {name: Hyper(temperature=2.0, kd_weight=0.3) for name in RULES}
    state = state_of(students)
    # The middle one is dropped by both: were it run, its NaN would stop the step.
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), variables[1])
    given = (variables[0], broken, variables[2])
    after, sums = jax.jit(step)(
        state, given, Batch(images, labels, index, index), hyper, jax.random.key(0)
    )
    assert int(after.step) == 1 and int(after.skipped) == 0
    inputs = preprocess(None, images)
    for student, teacher in zip(students, (0, 2), strict=True):
        own = sums[student.name]
        assert tuple(map(int, own.kept)) == (1, 2)
        shown = teachers[teacher].apply(variables[teacher], inputs)[0].logits
        seen = student.network.apply(state.variables(student.name), inputs, train=True)[0].logits
        kl = losses.kl_divergence(shown, seen, 2.0).sum()
        np.testing.assert_allclose(own.terms["kl"][0], kl, rtol=1e-4)
        ce = losses.cross_entropy(seen, labels).sum()
        np.testing.assert_allclose(own.weighted["ce"][0], 0.7 * ce, rtol=1e-4)


def test_the_draw_for_a_peer_counts_its_frozen_teachers_alone():
    draw = draw_from(Dropping("fixed"), 2)
    masks = [np.asarray(draw(jax.random.key(0), t, Hyper())) for t in range(8)]
    assert all(mask.shape == (2,) and mask.sum() == 1 for mask in masks)


# --------------------------------------------------------------------------------------- the method
@pytest.mark.parametrize("targets", ["each", "mean_logits"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_dml_is_the_mean_divergence_from_the_others(targets, epsilon):
    draw = np.random.default_rng(3)
    own, others = draw.normal(size=(4, 6)), draw.normal(size=(3, 4, 6))
    temperature, targets_of = 3.0, others if targets == "each" else others.mean(0, keepdims=True)

    def softmax(x):
        e = np.exp(x / temperature - (x / temperature).max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p = softmax(targets_of) + epsilon
    expected = temperature**2 * np.mean((p * (np.log(p) - np.log(softmax(own)))).sum(-1))
    context = context_of(outputs_of(jnp.asarray(own)), [jnp.asarray(x) for x in others])
    terms, after = DML(temperature=3.0, targets=targets, epsilon=epsilon).terms({}, context)
    np.testing.assert_allclose(total(terms), expected, rtol=1e-5)
    assert after == {} and terms["dml"].value.shape == (4,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "dml's temperature is a number above 0, got 0.0"),
        ({"targets": "all"}, "dml's targets are one of .*mean_logits.*, got 'all'"),
        ({"detached": 1}, "dml's detached is True or False, got 1"),
        ({"epsilon": -1e-7}, "dml's epsilon is at least 0 and below 1, got -1e-07"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DML(**options)
