"""The step body and its loops: frozen teachers, devices that agree, numbers that never retrace."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import models, rng
from distill_jax.methods import KD, CrossEntropy, Hyper, LossOptions, losses
from distill_jax.train import metrics, optim, sharding
from distill_jax.train.dropping import Dropping, keep_mask
from distill_jax.train.state import Batch, DeviceDataset, Rows
from distill_jax.train.step import draw_from, epoch_at, init_state, make_train_step
from distill_jax.train.teachers import FrozenTeachers
from distill_jax.train.terms import Student

SHAPE, CLASSES, BATCH, STEPS = (8, 8, 3), 5, 8, 6
SGD = optim.OptimOptions(learning_rate=0.1)
HYPER = Hyper(1.0, 1e-4, 3.0, 0.6, 0.5, {"ce": 1.0, "kd": 1.0})
METHODS = (("ce", CrossEntropy(LossOptions())), ("kd", KD()))


def build(name="plane2"):
    return models.build(name, CLASSES, SHAPE)


def examples(n=48, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 256, (n, *SHAPE), np.uint8),
        rng.integers(0, CLASSES, n).astype(np.int32),
    )


def preprocess(keys, images):
    shift = jax.vmap(jax.random.uniform)(keys)[:, None, None, None]  # augmentation by example
    return images.astype(jnp.float32) / 255 - 0.5 * shift


def make_step(*, dropping=Dropping("fixed"), teachers=2, **options):
    student = Student(
        network=build(),
        methods=METHODS,
        optimizer=SGD,
        schedule=optim.schedule(SGD, 2, STEPS),
        frozen=tuple(range(teachers)),
        draw_mask=draw_from(dropping, teachers),
    )
    return make_train_step(
        students=(student,),
        teachers=(build("plane4"),) * teachers,
        preprocess=preprocess,
        **options,
    )


def teachers(n=2):
    return tuple(build("plane4").init(jax.random.key(10 + k)) for k in range(n))


def batch_of(n=BATCH):
    images, labels = examples(n)
    positions = jnp.arange(n, dtype=jnp.int32)
    return Batch(jnp.asarray(images), jnp.asarray(labels), positions, positions)


@functools.cache
def start(topology=sharding.Topology(), **options):
    step = make_step(axis_name=topology.axis_name, **options)
    state = init_state(build(), SGD, jax.random.key(0))
    arguments = (state, teachers(), batch_of(), {"plane2": HYPER}, jax.random.key(0))
    counted = jax.eval_shape(make_step(**options), *arguments)[1]
    return sharding.train_loop(step, topology), state, metrics.zeros_like(counted)


def train(topology=sharding.Topology(), cuts=(0, STEPS), hyper=HYPER, **options):
    loop, *donated = start(topology, **options)
    state, sums = topology.replicate(donated)
    order = np.random.default_rng(1).permutation(48).astype(np.int32).reshape(STEPS, BATCH)
    frozen = topology.replicate(teachers())
    key = topology.replicate(jax.random.key(0))
    data = topology.replicate(topology.hold(DeviceDataset(*examples())))
    for first, last in zip(cuts, cuts[1:], strict=False):
        bounds = np.int32(first), np.int32(last)
        numbers = {"plane2": hyper}
        state, sums = loop(state, sums, frozen, data, order, *bounds, numbers, key)
    return jax.device_get((state, sums["plane2"]))


@dataclasses.dataclass(frozen=True)
class HeldAsRows(sharding.Topology):
    """Holds inputs as a TPU does."""

    def hold(self, data):
        images = Rows.of(data.inputs)
        assert images.values.ndim == 2 and images.shape == (8, 8, 3), images
        return data._replace(inputs=images)


@pytest.mark.parametrize("devices", [1, 2])
def test_images_held_as_rows_train_to_the_same_bytes(devices):
    chex.assert_trees_all_equal(
        train(HeldAsRows(devices=devices)), train(sharding.Topology(devices=devices))
    )


def test_teachers_are_bitwise_what_they_were():
    loop, *donated = start()
    state, sums = sharding.Topology().replicate(donated)
    frozen = teachers()
    before = jax.device_get(frozen)
    order = np.arange(48, dtype=np.int32).reshape(STEPS, BATCH)
    loop(
        state,
        sums,
        frozen,
        DeviceDataset(*examples()),
        order,
        np.int32(0),
        np.int32(STEPS),
        {"plane2": HYPER},
        jax.random.key(0),
    )
    chex.assert_trees_all_equal(jax.device_get(frozen), before)


def test_a_teacher_that_nobody_hears_is_not_looked_at():
    student = Student(build(), METHODS[:1], SGD, optim.schedule(SGD, 2, STEPS), (0,))
    teacher = build("plane4")
    step = make_train_step(students=(student,), teachers=(teacher,), preprocess=preprocess)
    spoilt = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), teachers(1))
    state = init_state(build(), SGD, jax.random.key(0))
    after, _ = jax.jit(step)(state, spoilt, batch_of(), {"plane2": HYPER}, jax.random.key(0))
    assert (int(after.step), int(after.skipped)) == (1, 0)


def test_no_gradient_reaches_a_teacher():
    frozen = FrozenTeachers((build("plane4"),))
    images = jnp.asarray(examples(4)[0], jnp.float32) / 255
    variables = teachers(1)

    def total(params):
        outputs = frozen.outputs(({**variables[0], "params": params},), images, None)
        return jnp.sum(outputs.logits**2)

    gradients = jax.jit(jax.grad(total))(variables[0]["params"])
    assert all(not np.any(g) for g in jax.tree.leaves(gradients))


def test_kept_teachers_give_their_own_logits_and_dropped_ones_zeros():
    frozen, variables = FrozenTeachers((build("plane4"),) * 2), teachers(2)
    images = jnp.asarray(examples(4)[0], jnp.float32) / 255
    kept = jax.jit(frozen.outputs)(variables, images, jnp.array([False, True])).logits
    # Compiled, as what is kept is: one operation after another rounds otherwise.
    alone = jax.jit(build("plane4").apply)(variables[1], images)[0].logits
    np.testing.assert_allclose(kept[1], alone, rtol=1e-6)
    assert not np.any(kept[0])


def test_a_number_of_variables_other_than_of_teachers_is_an_error():
    with pytest.raises(ValueError, match="2 teachers, but 1"):
        FrozenTeachers((build("plane4"),) * 2).outputs(teachers(1), jnp.zeros((1, *SHAPE)), None)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_every_mode_and_device_count_gives_the_same_training(mode, devices):
    state, sums = train(sharding.Topology(mode, devices))
    expected_state, expected = train()
    assert int(state.step) == STEPS
    chex.assert_trees_all_close(sums, expected, rtol=2e-5)
    chex.assert_trees_all_close(state, expected_state, rtol=2e-4, atol=2e-5)


@pytest.mark.devices
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_unsynchronised_batchnorm_is_another_training_and_stays_replicated(mode):
    (synced, _), (alone, _) = (
        train(sharding.Topology(mode, 2), sync_bn=sync) for sync in (True, False)
    )
    gap = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), synced.params, alone.params)
    assert max(jax.tree.leaves(gap)) > 1e-3
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(alone))


@pytest.mark.parametrize("cuts", [(0, 1, 2, 3, 4, 5, 6), (0, 4, 6)])
def test_any_division_into_dispatches_gives_the_same_bytes(cuts):
    chex.assert_trees_all_equal(train(cuts=cuts), train())


def test_numbers_change_without_a_retrace():
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(make_step(dropping=Dropping("bernoulli")), 1))
    state, frozen, batch = init_state(build(), SGD, jax.random.key(0)), teachers(), batch_of()
    for hyper in (HYPER, Hyper(0.5, 1e-2, 9.0, 0.1, 0.9, {"ce": 0.3, "kd": 7.0})):
        hyper = jax.tree.map(np.float32, hyper)
        state, _ = traced(state, frozen, batch, {"plane2": hyper}, jax.random.key(0))


def test_each_number_matters():
    reference = train(dropping=Dropping("bernoulli"))[0].params
    others = Hyper(0.5, 0.1, 9.0, 0.1, 0.1, label_smoothing=0.1)._asdict()
    del others["methods"], others["average_decay"]  # of which this state keeps none
    weights = [("methods", HYPER.methods | {name: 0.5}) for name in HYPER.methods]
    for field, value in [*others.items(), *weights]:
        changed = train(dropping=Dropping("bernoulli"), hyper=HYPER._replace(**{field: value}))
        same = jax.tree.map(np.array_equal, changed[0].params, reference)
        assert not all(jax.tree.leaves(same)), field


@pytest.mark.parametrize("steps", [45, 97, 194, 391, 10009])
def test_an_epoch_begins_at_a_whole_number(steps):
    """The quotient of two numbers, compiled, may fall short of it."""
    epochs = np.arange(300)
    at = jax.jit(
        jax.vmap(lambda step: jnp.stack([epoch_at(step, steps), epoch_at(step - 1, steps)]))
    )
    first, last = np.asarray(at(jnp.asarray(1 + epochs, jnp.int32) * steps)).T
    np.testing.assert_array_equal(first, 1 + epochs)
    np.testing.assert_array_equal(np.floor(last), epochs)


def test_a_registered_optimizer_may_keep_numbers_of_the_recipe_in_its_state(monkeypatch):
    """As optax's `inject_hyperparams` does, which reads them where it begins."""
    monkeypatch.setattr(optim, "_registered", {})
    numbers = HYPER._replace(weight_decay=jnp.float32(0.3))
    found = []
    for wrap in (lambda rule: rule, optax.inject_hyperparams):
        optim.register_optimizer(
            "mine", lambda s, h, wrap=wrap: wrap(optax.adamw)(s, weight_decay=h.weight_decay)
        )
        rule = optim.OptimOptions("mine", learning_rate=0.1)
        student = Student(build(), METHODS[:1], rule, lambda step: jnp.float32(0.1))
        step = make_train_step(students=(student,), preprocess=preprocess)
        state = init_state(build(), rule, jax.random.key(0), hyper=numbers)
        arguments = (), batch_of(), {"plane2": numbers}, jax.random.key(0)
        found.append(jax.jit(step)(state, *arguments)[0].params)
    chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-5)


def test_the_mask_is_that_of_the_stream_at_the_step():
    draw, key = draw_from(Dropping("fixed"), 4), jax.random.key(3)
    drawn = [np.asarray(draw(key, step, HYPER)) for step in range(20)]
    for step, mask in enumerate(drawn):
        at_step = rng.stream(jax.random.key(3), "teacher_drop", step)
        np.testing.assert_array_equal(mask, keep_mask(Dropping("fixed"), at_step, 4, 1.0))
    assert len({mask.tobytes() for mask in drawn}) == 4  # every teacher is dropped sometimes


def test_the_metrics_say_how_many_teachers_were_kept():
    _, sums = train(dropping=Dropping("fixed"))
    assert tuple(map(int, sums.kept)) == (STEPS, 2 * STEPS)
    assert train(dropping=Dropping())[1].kept is None


def test_the_student_without_teachers_learns_by_cross_entropy_alone():
    images, labels = examples(BATCH)
    network, state = build(), init_state(build(), SGD, jax.random.key(0))
    step = make_train_step(
        students=(Student(network, METHODS[:1], SGD, lambda step: 0.1),),
        preprocess=lambda keys, images: images.astype(jnp.float32) / 255,
    )
    numbers = {"plane2": HYPER._replace(weight_decay=0.0)}
    after, sums = jax.jit(step)(state, (), batch_of(), numbers, jax.random.key(0))

    def ce(params):
        variables = {**state.variables("plane2"), "params": params}
        outputs, _ = network.apply(variables, jnp.asarray(images, jnp.float32) / 255, train=True)
        return losses.cross_entropy(outputs.logits, labels).mean()

    start = state.params["networks"]["plane2"]
    value, gradients = jax.jit(jax.value_and_grad(ce))(start)
    np.testing.assert_allclose(sums["plane2"].loss[0] / BATCH, value, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, start, gradients)
    chex.assert_trees_all_close(after.params["networks"]["plane2"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.devices
def test_topologies_that_cannot_be():
    with pytest.raises(ValueError, match="5 devices asked for, there are 4"):
        sharding.Topology("jit", 5)
    with pytest.raises(ValueError, match="jit.*pmap.*'tpu'"):
        sharding.Topology("tpu")
    with pytest.raises(ValueError, match="a batch of 6 is not divisible by 4"):
        sharding.Topology("pmap", 4).check_batch(6)
    assert sharding.Topology("pmap", 0).count == 4
