"""What networks see: second views, partners and mixtures, on any number of devices."""

import dataclasses
import functools
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from distill_jax import models, rng
from distill_jax.data.mixing import mixture
from distill_jax.methods import KD, KDCL, CrossEntropy, Hyper, losses
from distill_jax.methods.base import Method, Term
from distill_jax.models import Outputs
from distill_jax.train import metrics, optim, sharding
from distill_jax.train.seen import look
from distill_jax.train.state import Batch, DeviceDataset, Order, TrainState
from distill_jax.train.step import init_state, make_train_step
from distill_jax.train.terms import Student

SHAPE, CLASSES, BATCH, STEPS = (6, 5, 3), 4, 8, 2
N = BATCH * STEPS
SGD = optim.OptimOptions(momentum=0.0)
HYPER = Hyper(0.1, 0.0, 3.0, 1.0)


class Net(nn.Module):
    """A layer, a BatchNorm, dropout and a classifier."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(4)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)).mean((1, 2))
        x = nn.Dropout(0.3, deterministic=not train)(x)
        return nn.Dense(CLASSES)(x)


class Ones(nn.Module):
    """Dropout on ones, whatever it sees."""

    @nn.compact
    def __call__(self, images, train=False):
        zeros = nn.Dense(CLASSES)(images.reshape(len(images), -1))
        x = nn.Dropout(0.5, deterministic=not train)(jnp.ones((len(images), 64)) + 0 * zeros[:, :1])
        return x.reshape(-1, 64 // CLASSES, CLASSES).sum(1) + x[:, :CLASSES] / 8


models.register_network("seen_net", lambda classes, inputs: Net())
models.register_network("seen_ones", lambda classes, inputs: Ones())


def build(name="seen_net"):
    return dataclasses.replace(models.build("seen_net", CLASSES, SHAPE), name=name)


@dataclasses.dataclass(frozen=True)
class Spy(Method):
    """Shows what it is shown, without weight."""

    needs = ()
    data_needs: ClassVar[tuple[str, ...]] = ("partner", "view")  # in whatever order

    def terms(self, variables, context):
        shown = {"own": context.student, "view": context.view, "partner": context.partner}
        return {k: Term(x.logits[:, 0] ** 2, 0.0) for k, x in shown.items()}, variables


SPY, CE, KL = ("spy", Spy()), ("ce", CrossEntropy()), ("kd", KD())
METHODS = {"ce": (CE,), "spy": (CE, SPY), "kd": (CE, KL), "kdcl": (("kdcl", KDCL()),)}


def preprocess(keys, images):
    shift = jax.vmap(jax.random.normal)(keys)[:, None, None, None]  # augmentation by example
    return images.astype(jnp.float32) / 128 - 1 + 0.5 * shift


def examples():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (N, *SHAPE), np.uint8)
    return images, draw.integers(0, CLASSES, N).astype(np.int32)


def students(methods, names=("seen_net",), frozen=()):
    return tuple(
        Student(build(x), METHODS[methods], SGD, lambda step: 1.0, frozen, tuple({*names} - {x}))
        for x in names
    )


def state_of(given):
    key = jax.random.key(0)
    return TrainState.join([init_state(s.network, SGD, key) for s in given])


ORDER = Order(
    np.random.default_rng(1).permutation(N).astype(np.int32).reshape(STEPS, BATCH),
    np.random.default_rng(2).integers(0, N, (STEPS, BATCH), np.int32),
)


@functools.cache
def trained(methods, mode="jit", devices=1, names=("seen_net",), teachers=0, **options):
    """The state after an epoch, and the sums of the metrics."""
    topology = sharding.Topology(mode, devices)
    given = students(methods, names, tuple(range(teachers)))
    frozen = (build("teacher"),) * teachers

    def step(axis_name):
        return make_train_step(
            students=given, teachers=frozen, preprocess=preprocess, axis_name=axis_name, **options
        )

    images, labels = (jnp.asarray(x[:BATCH]) for x in examples())
    places = jnp.arange(BATCH, dtype=jnp.int32)
    batch = Batch(images, labels, places, places, partners=images if methods == "spy" else None)
    hyper, key = dict.fromkeys(names, HYPER), jax.random.key(0)
    variables = tuple(network.init(jax.random.key(5)) for network in frozen)
    state = state_of(given)
    counted = jax.eval_shape(step(None), state, variables, batch, hyper, key)[1]
    order = ORDER if methods == "spy" else ORDER.rows  # without partners as it always was
    loop = sharding.train_loop(step(topology.axis_name), topology)
    arrays = topology.replicate((state, metrics.zeros_like(counted)))
    bounds = np.int32(0), np.int32(STEPS)
    data, frozen = DeviceDataset(*examples()), topology.replicate(variables)
    key = topology.replicate(key)
    return jax.device_get(loop(*arrays, frozen, data, order, *bounds, hyper, key))


def batches():
    """The batches of the epoch, with their partners."""
    images, labels = examples()
    places = jnp.arange(BATCH, dtype=jnp.int32)
    for rows, others in zip(*ORDER, strict=True):
        yield Batch(images[rows], labels[rows], rows, places, None, images[others])


@dataclasses.dataclass(frozen=True)
class Masks(Method):
    """Keeps what the whole batch gave."""

    needs: ClassVar[tuple[str, ...]] = ()
    taught: ClassVar[bool] = False

    def terms(self, variables, context):
        """A term that adds nothing."""
        kept = context.whole_batch(context.student.logits)
        return {"masks": Term(0.0 * context.student.logits[:, 0])}, {"kept": {"logits": kept}}


@pytest.mark.parametrize("sync_bn", [True, False])
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_devices_drop_units_of_their_own(mode, sync_bn):
    """Also where each normalises its share by itself, and so does not know of the others."""
    topology, key = sharding.Topology(mode, 2), jax.random.key(0)
    network = models.build("seen_ones", CLASSES, SHAPE)
    images = np.zeros((BATCH, *SHAPE), np.uint8)
    given = (Student(network, (("masks", Masks()),), SGD, lambda step: 1.0),)

    def step(axis_name):
        return make_train_step(
            students=given,
            preprocess=lambda keys, images: images.astype(jnp.float32),
            axis_name=axis_name,
            sync_bn=sync_bn,
        )

    own = {"masks": {"kept": {"logits": jnp.zeros((BATCH, CLASSES))}}}
    state, places = init_state(network, SGD, key, own), jnp.arange(BATCH, dtype=jnp.int32)
    hyper = {network.name: HYPER}
    batch = Batch(images, 0 * places, places, places)
    counted = jax.eval_shape(step(None), state, (), batch, hyper, key)[1]
    loop = sharding.train_loop(step(topology.axis_name), topology)
    arrays = topology.replicate((state, metrics.zeros_like(counted)))
    bounds, order = (np.int32(0), np.int32(1)), np.arange(BATCH, dtype=np.int32)[None]
    data, key = DeviceDataset(images, np.zeros(BATCH, np.int32)), topology.replicate(key)
    state, _ = jax.device_get(loop(*arrays, (), data, order, *bounds, hyper, key))
    logits = state.method_variables(network.name)["masks"]["kept"]["logits"]
    assert len(np.unique(logits.round(4), axis=0)) == BATCH


# ---------------------------------------------------------------------------- views and partners
def test_a_step_runs_the_network_on_the_view_and_then_on_the_partner():
    """Running statistics are those after the batch, the view and the partner, in this order."""
    state, sums = trained("spy")
    network, key = build(), jax.random.key(0)
    params = None
    expected = dict.fromkeys(("own", "view", "partner"), 0.0)
    after = state_of(students("spy")).variables("seen_net")
    for step, batch in enumerate(batches()):
        keys = {
            "own": ("augment", "network"),
            "view": ("augment view", "network view"),
            "partner": ("augment partner", "network partner"),
        }
        params = after["params"]
        for need, (augment, rngs) in keys.items():
            streams = rng.per_example(rng.stream(key, augment, step), batch.position)
            raw = batch.partners if need == "partner" else batch.inputs
            rngs = rng.stream(key, rngs, step)
            outputs, collections = network.apply(
                after, preprocess(streams, raw), train=True, rngs=rngs
            )
            after = {"params": params, **collections}
            expected[need] += float(jnp.sum(outputs.logits[:, 0] ** 2))
        if step == 0:  # what moved the parameters is the batch's cross-entropy alone
            moved = trained_by_labels(network, batch, key)
            after = {**after, "params": moved}
    for need, value in expected.items():
        np.testing.assert_allclose(sums["seen_net"].terms[need][0], value, rtol=1e-4)
    chex.assert_trees_all_close(
        state.collections["networks"]["seen_net"],
        {kind: x for kind, x in after.items() if kind != "params"},
        rtol=1e-4,
    )
    assert len({round(x, 3) for x in expected.values()}) == 3


def trained_by_labels(network, batch, key):
    variables = state_of(students("ce")).variables("seen_net")
    streams = rng.per_example(rng.stream(key, "augment", 0), batch.position)
    seen = preprocess(streams, batch.inputs)

    def loss(params):
        given = {**variables, "params": params}
        outputs, _ = network.apply(given, seen, train=True, rngs=rng.stream(key, "network", 0))
        return losses.cross_entropy(outputs.logits, batch.labels).mean()

    params = variables["params"]
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))


def test_what_nobody_asks_for_is_not_seen():
    needs, batch = {"a": (), "b": ("view",)}, next(batches())
    seen = look(preprocess, needs, dataclasses.replace(batch, partners=None), jax.random.key(0), 3)
    assert seen.others == {"a": {}, "b": seen.others["b"]} and list(seen.others["b"]) == ["view"]
    assert seen.own["a"] is seen.inputs is seen.own["b"] and seen.mixed is None


def test_networks_of_a_cycle_see_views_of_their_own_where_a_method_needs_that():
    names, batch = ("seen_net", "seen_net#2"), next(batches())
    needs = dict.fromkeys(names, ("own_view",)) | {"other": ()}
    seen = look(preprocess, needs, batch, jax.random.key(0), 3)
    views = [np.asarray(seen.own[name]) for name in (*names, "other")]
    gaps = [np.abs(a - b).max((1, 2, 3)).min() for a, b in zip(views, views[1:], strict=False)]
    assert min(gaps) > 1e-4
    shifts = views[0] - np.asarray(seen.inputs)  # of the same images
    assert np.ptp(shifts, axis=(1, 2, 3)).max() < 1e-5
    _, sums = trained("kdcl", names=names)
    assert sums["seen_net"].terms["kdcl"][0] != sums["seen_net#2"].terms["kdcl"][0]


ALL = [
    ("spy", {}),
    ("kdcl", {"names": ("seen_net", "seen_net#2")}),
    ("kd", {"teachers": 1, "mixup": 0.4}),
    ("kd", {"teachers": 1, "cutmix": 1.0}),
    ("ce", {"mixup": 1.0, "cutmix": 1.0}),
]


@pytest.mark.parametrize(("methods", "options"), ALL)
@pytest.mark.parametrize(("mode", "devices"), [("jit", 2), ("jit", 4), ("pmap", 2)])
def test_any_number_of_devices_sees_the_same(methods, options, mode, devices):
    state, sums = trained(methods, mode, devices, **options)
    expected_state, expected = trained(methods, **options)
    chex.assert_trees_all_close(sums, expected, rtol=2e-4, atol=1e-6)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------- mixtures
def mixed(step, **options):
    """What is seen of the batch of a step, mixed and not."""
    batch, key = list(batches())[step], jax.random.key(0)
    needs = {"seen_net": ("view",)}
    return (
        batch,
        look(preprocess, needs, batch, key, step),
        look(preprocess, needs, batch, key, step, **options),
    )


def numpy_mixture(step, images, mixup=0.0, cutmix=0.0):
    """(mixtures, share) of images (B, H, W, C), in float64, from the draws that JAX makes."""
    key, (height, width) = jax.random.key(0), images.shape[1:3]
    other = np.roll(images, -1, 0)
    if mixup and (not cutmix or jax.random.bernoulli(rng.stream(key, "mixing", step))):
        share = float(jax.random.beta(rng.stream(key, "mixup", step), mixup, mixup))
        return share * images + (1 - share) * other, share
    of_share, of_row, of_column = jax.random.split(rng.stream(key, "cutmix", step), 3)
    side = np.sqrt(1 - float(jax.random.beta(of_share, cutmix, cutmix)))
    row, column = (
        int(jax.random.randint(k, (), 0, length))
        for k, length in ((of_row, height), (of_column, width))
    )
    tall, wide = int(height * side) // 2, int(width * side) // 2
    rows = slice(max(row - tall, 0), min(row + tall, height))
    columns = slice(max(column - wide, 0), min(column + wide, width))
    box = images.copy()
    box[:, rows, columns] = other[:, rows, columns]
    cut = max(rows.stop - rows.start, 0) * max(columns.stop - columns.start, 0)
    return box, 1 - cut / (height * width)


@pytest.mark.parametrize(
    "options", [{"mixup": 0.3}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 0.7}], ids=str
)
def test_mixtures_are_those_of_numpy(options):
    shares = set()
    for step in range(2):
        batch, plain, seen = mixed(step, **options)
        for x, ours in (
            (plain.inputs, seen.inputs),
            (plain.others["seen_net"]["view"], seen.others["seen_net"]["view"]),
        ):
            expected, share = numpy_mixture(step, np.asarray(x, np.float64), **options)
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
        assert float(seen.mixed.share) == pytest.approx(share, abs=1e-6)
        np.testing.assert_array_equal(seen.mixed.labels, np.roll(batch.labels, -1))
        shares.add(round(share, 4))
    assert len(shares) == 2


def test_shares_are_spread_as_beta_says_and_boxes_have_what_they_say():
    def draw(step, **options):
        return mixture(jax.random.key(1), step, (32, 32), **options)

    steps = jnp.arange(2000)
    _, shares = jax.jit(jax.vmap(lambda t: draw(t, mixup=0.4, cutmix=0.0)))(steps)
    assert abs(float(jnp.mean(shares)) - 0.5) < 0.03
    assert abs(float(jnp.var(shares)) - 0.25 / 1.8) < 0.01  # αα / ((2α)² (2α + 1))
    weights, shares = jax.jit(jax.vmap(lambda t: draw(t, mixup=0.0, cutmix=1.0)))(steps[:200])
    assert set(np.unique(weights)) == {0.0, 1.0}
    np.testing.assert_allclose(weights.mean((1, 2)), shares, rtol=1e-6)
    both, _ = jax.jit(jax.vmap(lambda t: draw(t, mixup=1.0, cutmix=1.0)))(steps[:200])
    boxes = np.mean([set(np.unique(x)) <= {0.0, 1.0} for x in np.asarray(both)])
    assert 0.4 < boxes < 0.6


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}], ids=str)
def test_student_and_teacher_see_one_mixture_and_both_labels_count(options):
    step = make_train_step(
        students=students("kd", frozen=(0,)),
        teachers=(build("teacher"),),
        preprocess=preprocess,
        **options,
    )
    batch, _, seen = mixed(0, **options)
    state, key, share = state_of(students("kd")), jax.random.key(0), seen.mixed.share
    teacher = build("teacher").init(jax.random.key(5))
    batch = dataclasses.replace(batch, partners=None)
    _, sums = jax.jit(step)(state, (teacher,), batch, {"seen_net": HYPER}, key)
    variables, rngs = state.variables("seen_net"), rng.stream(key, "network", 0)
    own = build().apply(variables, seen.inputs, train=True, rngs=rngs)[0].logits
    theirs = build().apply(teacher, seen.inputs)[0].logits
    both = [losses.cross_entropy(own, y) for y in (batch.labels, np.roll(batch.labels, -1))]
    found = sums["seen_net"]
    expected = float((share * both[0] + (1 - share) * both[1]).sum())
    np.testing.assert_allclose(found.terms["ce"][0], expected, rtol=1e-4)
    kl = float(losses.kl_divergence(theirs, own, 3.0).sum())
    np.testing.assert_allclose(found.terms["kl"][0], kl, rtol=1e-3)
    best = own.argmax(-1)
    right = share * (best == batch.labels) + (1 - share) * (best == np.roll(batch.labels, -1))
    np.testing.assert_allclose(found.accuracy[0][0], right.sum(), rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Reads(Method):
    """Reads labels in one way or another."""

    how: str = "=="
    needs = ()

    def terms(self, variables, context):
        """A term by the labels, or by their number alone."""
        labels, logits = context.labels, context.student.logits
        ways = {
            "==": lambda: labels == 0,
            "[]": lambda: labels[:] * 1.0,
            "jnp": lambda: jnp.take(logits[0], labels),
            "nn": lambda: jax.nn.one_hot(labels, CLASSES).sum(-1),
            "losses": lambda: losses.cross_entropy(logits, labels),
            "astype": lambda: labels.astype(float),
            "+": lambda: labels + 1.0,
            "len": lambda: logits[:, 0] * (len(labels) / labels.shape[0]),
        }
        return {"reads": Term(jnp.asarray(ways[self.how](), jnp.float32))}, variables


@pytest.mark.parametrize("how", ["==", "[]", "jnp", "nn", "losses", "astype", "+", "len"])
def test_a_method_that_reads_one_label_of_a_mixture_is_refused(how):
    (student,) = students("ce")
    student = student._replace(methods=(CE, ("mine", Reads(how))))
    step = make_train_step(students=(student,), preprocess=preprocess, mixup=0.5)
    arguments = (state_of((student,)), (), dataclasses.replace(next(batches()), partners=None))
    run = functools.partial(
        jax.eval_shape, step, *arguments, {"seen_net": HYPER}, jax.random.key(0)
    )
    if how == "len":
        run()
        return
    with pytest.raises(ValueError, match="method 'mine' reads the label of an example, and mixup"):
        run()


def test_outputs_that_are_shown_have_all_that_the_student_has():
    shown = []

    @dataclasses.dataclass(frozen=True)
    class Looks(Method):
        needs = ()
        data_needs: ClassVar[tuple[str, ...]] = ("view",)

        def terms(self, variables, context):
            """Nothing; notes what is shown."""
            shown.append((context.student, context.view, context.partner))
            return {}, variables

    (student,) = students("ce")
    student = student._replace(methods=(CE, ("looks", Looks())))
    step = make_train_step(students=(student,), preprocess=preprocess)
    batch = dataclasses.replace(next(batches()), partners=None)
    jax.eval_shape(step, state_of((student,)), (), batch, {"seen_net": HYPER}, jax.random.key(0))
    own, view, partner = shown[-1]
    assert isinstance(view, Outputs) and partner is None
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, view)
