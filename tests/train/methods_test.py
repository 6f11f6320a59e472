"""Methods in the step and the trainer: what they are given, what is kept of them, and where."""

import dataclasses
import functools
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from marks import slow
from saved import Saved

from distill_jax import data, models, rng
from distill_jax.methods import BSS, KD, TESKD, CrossEntropy, Hyper, LossOptions, Method, Term
from distill_jax.methods.base import OUTPUTS, taps
from distill_jax.methods.fitnet import FitNet
from distill_jax.methods.registry import EdgeMethod, build
from distill_jax.models import Outputs
from distill_jax.models.zoo.heads import one_layer
from distill_jax.train import fit, metrics, optim, programs, sharding
from distill_jax.train.checks import check
from distill_jax.train.dropping import Dropping
from distill_jax.train.evaluation import StageResult
from distill_jax.train.options import ReplicaInputs, StageInputs, TrainOptions, cache_shapes
from distill_jax.train.stage import Recipe, Stage, needs_of
from distill_jax.train.stage_methods import init_methods, method_shapes, with_needs
from distill_jax.train.state import Batch, DeviceDataset
from distill_jax.train.step import draw_from, init_state, make_train_step
from distill_jax.train.teachers import TeacherOutputs
from distill_jax.train.terms import Student, teacher_needs
from distill_jax.train.trainer import Trainer

SHAPE, CLASSES, BATCH, STEPS = (4, 4, 1), 3, 8, 4
N = BATCH * STEPS
SEVERAL = [("jit", 2), *slow(("pmap", 1)), ("pmap", 2)]


class Tiny(nn.Module):
    """One stage, its mean and a classifier: what methods ask for, compiled in little time."""

    width: int

    @nn.compact
    def __call__(self, images, mode):
        stage = nn.relu(nn.Dense(self.width, name="dense")(images))
        feature = stage.mean((1, 2))
        return Outputs(self.head().run(feature, mode), feature, (stage,), preacts=(-stage,))

    @nn.nowrap
    def head(self):
        return one_layer("fc", CLASSES)


def network(name, width=5):
    return models.Network(name, Tiny(width), CLASSES, SHAPE)


STUDENT, TEACHERS = network("student"), (network("large"), network("middle"))


@functools.cache
def teacher_variables():
    keys = (jax.random.key(20 + k) for k in range(len(TEACHERS)))
    return tuple(
        jax.tree.map(lambda x: 3 * x + 0.1, t.init(key))
        for t, key in zip(TEACHERS, keys, strict=True)
    )


def examples():
    draw = np.random.default_rng(1)
    images = draw.integers(0, 256, (N, *SHAPE), np.uint8)
    return images, draw.integers(0, CLASSES, N).astype(np.int32)


def preprocess(keys, images):
    return images.astype(jnp.float32) / 64 - 2


def stage_of(methods, teachers=TEACHERS, **recipe):
    values = {"epochs": 2, "batch_size": BATCH, "kd_weight": 0.5, "temperature": 2.0, **recipe}
    weights = (1.0,) * len(methods)
    return Stage(STUDENT, teachers, Recipe(**values), 0, tuple(methods), weights)


@functools.cache
def trained(methods, mode="jit", devices=1, dropping=Dropping(), sync_bn=True, rate=0.1):
    """State and metrics after an epoch of the step, as NumPy."""
    topology = sharding.Topology(mode, devices)
    rule = optim.OptimOptions(learning_rate=rate)

    def step(axis_name):
        draw = draw_from(dropping, len(TEACHERS))
        return make_train_step(
            students=(Student(STUDENT, methods, rule, lambda step: rate, (0, 1), (), draw),),
            teachers=TEACHERS,
            preprocess=preprocess,
            steps_per_epoch=STEPS,
            axis_name=axis_name,
            sync_bn=sync_bn,
        )

    key = jax.random.key(0)
    state = init_state(STUDENT, rule, key, init_methods(stage_of(methods), examples()[1], key))
    hyper = {"student": Hyper(temperature=2.0, kd_weight=0.5, survival=0.5)}
    images, labels = examples()
    places = jnp.arange(BATCH, dtype=jnp.int32)
    batch = Batch(jnp.asarray(images[:BATCH]), jnp.asarray(labels[:BATCH]), places, places)
    counted = jax.eval_shape(step(None), state, teacher_variables(), batch, hyper, key)[1]
    loop = sharding.train_loop(step(topology.axis_name), topology)
    arrays = (state, metrics.zeros_like(counted), teacher_variables(), DeviceDataset(*examples()))
    order = np.random.default_rng(2).permutation(N).astype(np.int32).reshape(STEPS, BATCH)
    rest = order, np.int32(0), np.int32(STEPS), hyper, topology.replicate(key)
    state, sums = jax.device_get(loop(*topology.replicate(arrays), *rest))
    return state, sums["student"]


def same_training(methods, mode, devices, **options):
    """Asserts that a topology gives the training of one device, and returns it."""
    state, sums = trained(methods, mode, devices, **options)
    expected_state, expected = trained(methods, **options)
    chex.assert_trees_all_close(sums, expected, rtol=2e-5, atol=1e-5)
    chex.assert_trees_all_close(state, expected_state, rtol=2e-4, atol=2e-5)
    return state, sums


# -------------------------------------------------------------------- what methods are given to see
@dataclasses.dataclass(frozen=True)
class Spy(Method):
    """Writes down which outputs of its teachers it is given."""

    needs: tuple[str, ...] = ()
    seen: ClassVar[list] = []

    def terms(self, variables, context):
        """A term that adds nothing."""
        fields = ("feature", "stem", "stages", "preacts")
        chex.assert_shape(context.teacher_logits, (2, len(context.labels), CLASSES))
        chex.assert_equal_shape([context.labels, context.index, context.position])
        shown = [
            {name for name in fields if jax.tree.leaves(getattr(teacher, name))}
            for teacher in context.teachers
        ]
        self.seen.append((shown, len(context.teacher_heads), context.teacher_apply is not None))
        return {"spy": Term(jnp.zeros(len(context.labels)))}, variables


@pytest.mark.parametrize(
    ("needs", "shown", "asks"),
    [
        ((), set(), False),
        (("logits",), set(), False),
        (("feature",), {"feature"}, False),
        (("stages", "logits", "stages"), {"stages"}, False),
        (("stem", "preacts"), {"preacts"}, False),  # there is no stem
        (("head",), set(), True),
        (("apply", "feature"), {"feature"}, True),
    ],
)
def test_teachers_show_what_a_method_needs_and_nothing_else(needs, shown, asks):
    Spy.seen.clear()
    methods = (("kd", KD()), ("spy", Spy(needs)))
    student = Student(STUDENT, methods, optim.OptimOptions(), lambda step: 0.1, (0, 1))
    step = make_train_step(students=(student,), teachers=TEACHERS, preprocess=preprocess)
    images, labels = examples()
    places = jnp.arange(BATCH, dtype=jnp.int32)
    batch = Batch(images[:BATCH], labels[:BATCH], places, places)
    state = init_state(STUDENT, optim.OptimOptions(), jax.random.key(0))
    hyper = {"student": Hyper()}
    jax.eval_shape(step, state, teacher_variables(), batch, hyper, jax.random.key(0))
    assert Spy.seen == [([shown, shown], 2 if asks else 0, asks)]


def test_needs_of_all_methods_are_asked_for_once():
    assert teacher_needs((("ce", CrossEntropy()), ("kd", KD()))) == ()
    assert teacher_needs((("fitnet", FitNet()), ("x", Spy(("stages", "apply", "head"))))) == (
        "stem",
        "stages",
    )
    assert needs_of([stage_of((("kd", KD()), ("fitnet", FitNet())))]) == ("stem", "stages")
    assert needs_of([stage_of((("x", Spy(("feature",))),), teachers=())]) == ()
    logits = cache_shapes([stage_of((("kd", KD()),))], N)
    assert logits.features == ({}, {})
    chex.assert_shape(logits.logits, (N, 2, CLASSES))
    cached = cache_shapes([stage_of((("x", Spy(("feature", "stages"))),))], N)
    for features in cached.features:
        chex.assert_shape(features["feature"], (N, 5))
        chex.assert_shape(features["stages"], (N, 4, 4, 5))


def test_two_methods_that_give_a_term_of_one_name_are_refused():
    with pytest.raises(ValueError, match="student: two methods give a term kl"):
        trained((("kd", KD()), ("other", KD(LossOptions("element_mean")))))


@pytest.mark.parametrize("dropping", [Dropping(), Dropping("fixed", 1)])
def test_a_method_counts_by_its_weight(dropping):
    """One that is not named in the numbers counts once."""
    _, sums = trained((("ce", CrossEntropy()), ("kd", KD())), dropping=dropping)
    assert sums.weighted["kl"][0] == pytest.approx(0.5 * 4 * sums.terms["kl"][0], rel=1e-5)
    total = sums.weighted["ce"][0] + sums.weighted["kl"][0]
    assert sums.loss[0] == pytest.approx(total, rel=1e-5)
    assert (sums.kept is None) == (dropping.kind == "none")


# -------------------------------------------------------------------------- teachers that are asked
@dataclasses.dataclass(frozen=True)
class Asking(Method):
    """Asks teachers' and the student's heads about features, and teachers about other images."""

    needs: ClassVar[tuple[str, ...]] = ("logits", "feature", "head", "apply")

    def terms(self, variables, context):
        """Each of the three as a term; means over the batch (B,)."""
        feature = context.student.feature

        def by_head(k, teacher):
            return jnp.square(context.teacher_heads[k](feature) - teacher.logits).mean(-1)

        def by_apply(k, teacher):
            other = context.teacher_apply(k, context.inputs[:, ::-1])
            chex.assert_equal_shape([other.feature, teacher.feature])
            return jnp.square(context.student.logits - other.logits).mean(-1)

        return {
            "by_head": Term(context.over_teachers(by_head)),
            "by_apply": Term(context.over_teachers(by_apply), 0.5),
            "own_head": Term(jnp.square(context.head(2 * feature)).mean(-1), 0.1),
        }, variables


ASKING = (("ce", CrossEntropy()), ("asking", Asking()))


@functools.cache
def asking_by_hand(kept):
    """Parameters after an epoch of ASKING, from the networks alone; kept (STEPS, K)."""
    variables = init_state(STUDENT, optim.OptimOptions(), jax.random.key(0)).variables("student")
    order = np.random.default_rng(2).permutation(N).reshape(STEPS, BATCH)
    images, labels = examples()

    def logits(network, variables, x):
        return network.apply(variables, x)[0].logits

    @jax.jit
    @jax.grad
    def gradient(params, x, labels, mask):
        out = STUDENT.apply({"params": params}, x, train=True)[0]
        loss = -jax.nn.log_softmax(out.logits)[jnp.arange(BATCH), labels].mean()
        loss += 0.1 * jnp.square(STUDENT.head({"params": params}, 2 * out.feature)).mean()
        for k, (teacher, own) in enumerate(zip(TEACHERS, teacher_variables(), strict=True)):
            other = logits(teacher, own, x[:, ::-1])
            gap = teacher.head(own, out.feature) - logits(teacher, own, x)
            loss += mask[k] * jnp.square(gap).mean()
            loss += mask[k] * 0.5 * jnp.square(out.logits - other).mean()
        return loss

    params, velocity = variables["params"], 0.0
    for rows, mask in zip(order, kept, strict=True):
        x = preprocess(None, jnp.asarray(images[rows]))
        grads = gradient(params, x, labels[rows], jnp.asarray(mask, jnp.float32))
        velocity = jax.tree.map(lambda g, v: g + 0.9 * v, grads, velocity) if velocity else grads
        params = jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity)
    return params


@pytest.mark.parametrize("dropping", [Dropping(), Dropping("fixed", 1)], ids=["all", "dropped"])
@pytest.mark.parametrize(("mode", "devices"), [("jit", 1), *SEVERAL])
def test_heads_and_teachers_can_be_asked_on_every_topology(mode, devices, dropping):
    state, sums = same_training(ASKING, mode, devices, dropping=dropping)
    draw = draw_from(dropping, 2) or (lambda *_: np.ones(2, bool))
    kept = [np.asarray(draw(jax.random.key(0), step, Hyper())) for step in range(STEPS)]
    want = asking_by_hand(tuple(tuple(map(bool, mask)) for mask in kept))
    chex.assert_trees_all_close(state.params["networks"]["student"], want, rtol=1e-4, atol=1e-5)
    assert min(sums.terms[name][0] for name in ("by_head", "by_apply", "own_head")) > 0.1


def test_attacked_images_are_those_of_one_device():
    methods = (("bss", BSS(steps=2, samples=3)),)
    state, sums = same_training(methods, "jit", 2, dropping=Dropping("fixed", 1))
    assert sums.terms["bss"][0] > 0.1
    first = init_state(STUDENT, optim.OptimOptions(), jax.random.key(0)).params["networks"]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params["networks"], first)
    assert min(jax.tree.leaves(moved)) > 1e-4  # the student is asked with its gradient


@dataclasses.dataclass(frozen=True)
class Mirrored(Method):
    """Reads the student on other images alone."""

    needs: ClassVar[tuple[str, ...]] = ()
    taught: ClassVar[bool] = False

    def terms(self, variables, context):
        """The squares of its logits."""
        logits = context.student_apply(-context.inputs).logits
        return {"mirrored": Term(jnp.square(logits).sum(-1), 0.5)}, variables


def test_what_the_student_is_asked_on_other_images_has_its_gradient_before_the_first_step():
    stage = stage_of((("ce", CrossEntropy()), ("mirrored", Mirrored())), teachers=())
    state = init_state(STUDENT, optim.OptimOptions(), jax.random.key(0))
    pixels, labels = examples()
    split = data.Split(pixels[:BATCH], labels[:BATCH])
    nobody = TeacherOutputs(np.zeros((BATCH, 0, CLASSES), np.float32))
    sizes, step = programs.first_terms([stage], state, (), split, nobody, dataset())["student"]
    inputs = dataset().preprocessing.evaluate(pixels[:BATCH])
    logits = STUDENT.apply(state.variables("student"), -inputs, train=True)[0].logits
    value, gradient = sizes["mirrored"]
    assert value == pytest.approx(0.5 * float(jnp.square(logits).sum()) / BATCH, rel=1e-5)
    assert gradient == pytest.approx(float(jnp.linalg.norm(logits)) / BATCH, rel=1e-5)
    own = sizes["ce"][1]
    assert step == pytest.approx(float(np.hypot(own, gradient) / own), rel=1e-5)


# ----------------------------------------------------------------------------- memory and adapters
@dataclasses.dataclass(frozen=True)
class Memory(Method):
    """Keeps the latest logits of every example, and draws the student's towards the former ones."""

    needs: ClassVar[tuple[str, ...]] = ()
    taught: ClassVar[bool] = False
    name: str = "memory"
    decay: float = 0.5

    def init(self, key, shapes):
        """A bank of logits, how often each was written, and a factor to train."""
        chex.assert_shape(shapes.student.logits, (BATCH, shapes.classes))
        return {
            "params": {"factor": jnp.ones(())},
            "bank": {
                "logits": jnp.zeros((shapes.examples, shapes.classes)),
                "written": jnp.zeros(shapes.examples, jnp.int32),
            },
            "noise": {"latest": jnp.zeros(())},
        }

    def terms(self, variables, context):
        """One term under the method's name."""
        bank = variables["bank"]
        former = bank["logits"][context.index]
        gap = variables["params"]["factor"] * context.student.logits - self.decay * former
        index = context.whole_batch(context.index)
        chex.assert_shape(index, (context.batch_size,))
        logits = context.whole_batch(jax.lax.stop_gradient(context.student.logits))
        after = {
            "params": {"factor": jnp.zeros(())},  # not taken over: it is trained
            "bank": {
                "logits": bank["logits"].at[index].set(logits),
                "written": bank["written"].at[index].add(1),
            },
            "noise": {"latest": jax.random.normal(context.key) + context.epoch},
        }
        return {self.name: Term(jnp.square(gap).mean(-1))}, after


MEMORY = (("ce", CrossEntropy()), ("memory", Memory()), ("fitnet", FitNet(1)))


@pytest.mark.parametrize("sync_bn", [True, False])
@pytest.mark.parametrize(("mode", "devices"), SEVERAL)
def test_memory_and_adapters_are_the_same_on_every_topology(mode, devices, sync_bn):
    state, sums = same_training(MEMORY, mode, devices, sync_bn=sync_bn)
    own = state.method_variables("student")
    assert own.keys() == {"memory", "fitnet"}
    np.testing.assert_array_equal(own["memory"]["bank"]["written"], np.ones(N))
    chex.assert_shape(own["memory"]["bank"]["logits"], (N, CLASSES))
    factor = own["memory"]["params"]["factor"]
    assert 0.01 < abs(factor - 1) < 1
    assert own["fitnet"].keys() == {"params", "batch_stats"}
    assert sums.terms["memory"][0] > 0


TERMS = {
    "dkd": ("tckd", "nckd"),
    "nkd": ("nkd_label", "nkd_others"),
    "dist": ("dist_inter", "dist_intra"),
    "tfkd_self": ("tfkd_self", "tfkd_self_ce"),
    "tfkd_reg": ("tfkd_reg", "tfkd_reg_ce"),
    "ca_mkd": ("ca_mkd", "ca_mkd_feature"),
    **{
        name: (name,)
        for name in (
            *("normkd", "ctkd", "wttm", "mse_logits", "label_smoothing", "aver", "ebkd", "ae_kd"),
        )
    },
}
TOGETHER = tuple((name, build(name)) for name in TERMS)


@pytest.mark.parametrize("name", TERMS)
def test_a_method_of_the_literature_gives_the_loss_of_one_device_on_two(name):
    """All of them teach one student at once, so that two programs serve all."""
    options = {"dropping": Dropping("fixed", 1), "rate": 1e-3}
    _, one = trained(TOGETHER, **options)
    _, two = trained(TOGETHER, "jit", 2, **options)
    for term in TERMS[name]:
        assert one.terms[term][0] > 0
        np.testing.assert_allclose(two.terms[term], one.terms[term], rtol=2e-5, err_msg=term)


def test_what_methods_of_the_literature_train_is_that_of_one_device_on_two():
    options = {"dropping": Dropping("fixed", 1), "rate": 1e-3}
    same_training(TOGETHER, "jit", 2, **options)


def test_a_method_draws_from_a_stream_of_its_own_and_knows_the_epoch():
    state, _ = trained(MEMORY)
    last = STEPS - 1
    drawn = jax.random.normal(rng.stream(jax.random.key(0), "method memory", last))
    latest = state.collections["methods"]["student"]["memory"]["noise"]["latest"]
    np.testing.assert_allclose(latest, drawn + last / STEPS, rtol=1e-6)


# --------------------------------------------------------------------------- through whole stages
@functools.cache
def dataset():
    draw = np.random.default_rng(3)
    images = draw.integers(0, 256, (N + 8, *SHAPE), np.uint8)
    labels = np.arange(N + 8, dtype=np.int32) % CLASSES
    pair = images, labels
    return data.from_arrays(pair, pair, classes=CLASSES, valid_fraction=0.2)


def inputs_of(stage, checkpoints=None):
    results = (StageResult(variables, [], {}) for variables in teacher_variables())
    return ReplicaInputs((StageInputs(stage, tuple(results)),), checkpoints)


def fit_one(stage, **options):
    ((result,),) = fit.train([inputs_of(stage)], dataset(), TrainOptions(**options))
    return result


TAUGHT = (("ce", CrossEntropy(LossOptions())), ("kd", KD()), ("fitnet", FitNet(1)))


@pytest.mark.parametrize("kind", ["none", "fixed"])
def test_cached_features_give_the_training_of_the_graph(kind):
    stage = stage_of(TAUGHT, dropping=Dropping(kind))
    graph, table = (fit_one(stage, teacher_logits=how) for how in ("graph", "table"))
    for mine, theirs in zip(table.history, graph.history, strict=True):
        assert mine.keys() == theirs.keys() and "train_fitnet" in mine
        for name in theirs.keys() - {"images_per_second"}:
            assert mine[name] == pytest.approx(theirs[name], rel=2e-4), name
    chex.assert_trees_all_close(table.variables, graph.variables, atol=1e-4)


@pytest.mark.parametrize("how", ["graph", "table"])
def test_what_asks_teachers_has_their_variables_beside_a_cache_too(how):
    stage = stage_of(ASKING, dropping=Dropping("fixed"))
    history = fit_one(stage, teacher_logits=how).history
    other = fit_one(stage, teacher_logits="auto").history
    for name in ("train_by_head", "train_by_apply", "train_own_head"):
        assert history[-1][name] == pytest.approx(other[-1][name], rel=2e-4)


def test_what_methods_keep_is_saved_with_the_stage_and_never_deployed():
    stage, saved = stage_of(MEMORY), Saved()
    result = fit_one(stage)
    stops = iter([False, False, True])
    with pytest.raises(fit.Interrupted):
        options = TrainOptions(stop=lambda: next(stops))
        fit.train([inputs_of(stage, saved)], dataset(), options)
    ((step, (arrays, _)),) = saved.all.items()
    shapes = method_shapes(stage, dataset().train.labels)
    own = arrays["state"].method_variables("student")
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, shapes)
    assert own["memory"]["bank"]["written"].sum() == BATCH * step
    ((resumed,),) = fit.train([inputs_of(stage, saved)], dataset())
    assert resumed.record["state_digest"] == result.record["state_digest"]
    assert result.variables.keys() == {"params"}
    assert result.variables["params"].keys() == {"dense", "fc"}
    assert result.whole == {}  # which only a phase has


@pytest.mark.devices
def test_replicas_with_methods_of_their_own_are_what_they_are_alone():
    stages = [dataclasses.replace(stage_of(MEMORY), seed=seed) for seed in (0, 1)]
    options = TrainOptions(topology=sharding.Topology("jit", 2))
    together = fit.train([inputs_of(stage) for stage in stages], dataset(), options)
    for stage, (result,) in zip(stages, together, strict=True):
        assert fit_one(stage).record["state_digest"] == result.record["state_digest"]


def test_a_phase_hands_on_what_fits_and_the_next_begins_with_it():
    first = dataclasses.replace(stage_of(MEMORY, selection="last"), phase=True)
    whole = fit_one(first).whole
    assert whole.keys() == {"network", "methods"}
    second = stage_of((*MEMORY[:2], ("fitnet", FitNet(1, 1)), ("more", Memory("more"))))
    ((inputs,), _) = inputs_of(second)
    inputs = ReplicaInputs((inputs._replace(start=whole),))
    state = Trainer([inputs], dataset(), TrainOptions()).replicas[0].first_state()
    chex.assert_trees_all_equal(state.variables("student"), whole["network"])
    own = state.method_variables("student")
    for name in ("memory", "fitnet"):
        chex.assert_trees_all_equal(own[name], whole["methods"][name])
    assert not np.any(own["more"]["bank"]["written"])
    assert np.any(own["memory"]["bank"]["written"])
    assert int(state.step) == 0


# ------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("method", "message"),
    [
        (FitNet(2), "'m' for student taught by large.middle: fitnet: the student has feature maps"),
        (TESKD(), "'m' for student taught by large.middle: teskd needs a network with branches"),
        (
            EdgeMethod(name="m", loss=lambda student, teacher, labels, hyper: labels.mean()),
            r"'m' for student taught by .*gives \(\) for a batch of 8: expected one number an",
        ),
        (
            EdgeMethod(name="m", loss=lambda s, t, labels, hyper: s.stages[3].mean((1, 2, 3))),
            "'m' for student taught by .*: tuple index out of range",
        ),
    ],
)
def test_a_method_that_cannot_teach_a_stage_is_refused_before_it_starts(method, message):
    with pytest.raises(ValueError, match=message):
        check(stage_of((("m", method),)), dataset(), sharding.Topology())


@pytest.mark.parametrize(
    ("loss", "needs"),
    [
        (lambda s, t, labels, hyper: s.feature[:, 0] * t.feature[:, 0], ("feature",)),
        (lambda s, t, labels, hyper: taps(t)[1].mean((1, 2, 3)), ("feature", "stem", "stages")),
        (lambda s, t, labels, hyper: t[1][:, 0], OUTPUTS),
        (lambda s, t, labels, hyper: [*t][0][:, 0], OUTPUTS),
        (lambda s, t, labels, hyper: s.feature[:, 0], ()),
    ],
)
def test_a_function_needs_what_it_is_seen_to_read(loss, needs):
    edge = EdgeMethod(name="m", loss=loss)
    stage = with_needs(stage_of((("ce", CrossEntropy()), ("m", edge))), examples()[1])
    assert stage.methods[0] == ("ce", CrossEntropy())
    assert stage.methods[1][1].needs == needs
    assert needs_of([stage]) == tuple(name for name in needs if name != "logits")
    check(stage, dataset(), sharding.Topology())


def test_a_function_that_cannot_be_watched_is_refused():
    broken = EdgeMethod(name="m", loss=lambda s, t, labels, hyper: t.stages[3])
    with pytest.raises(ValueError, match="'m' for student taught by large.middle: tuple index"):
        with_needs(stage_of((("m", broken),)), examples()[1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainable": ("layer9.*",)}, "student has no parameter that matches 'layer9.*'; there"),
        ({"frozen": ("fc",)}, "no parameter that matches 'fc'; there are dense.bias"),
        ({"frozen": (".*",)}, "leave nothing to train in student"),
    ],
)
def test_patterns_that_move_nothing_are_refused(values, message):
    stage = stage_of((("ce", CrossEntropy()),), optim=optim.OptimOptions(**values))
    with pytest.raises(ValueError, match=message):
        check(stage, dataset(), sharding.Topology())


def test_frozen_layers_keep_their_bytes_through_a_stage_while_adapters_train():
    options = optim.OptimOptions(trainable=("fc.*",), weight_decay=0.1)
    stage = stage_of(TAUGHT, optim=options, selection="last")
    start = jax.device_get(STUDENT.init(rng.stream(jax.random.key(0), "init")))
    phase = dataclasses.replace(stage, phase=True)
    result = fit_one(phase)
    chex.assert_trees_all_equal(result.variables["params"]["dense"], start["params"]["dense"])
    moved = np.abs(result.variables["params"]["fc"]["kernel"] - start["params"]["fc"]["kernel"])
    assert moved.max() > 1e-3
    fresh = init_methods(stage, dataset().train.labels, jax.random.key(0))["fitnet"]["params"]
    adapters = result.whole["methods"]["fitnet"]["params"]
    for k in "01":
        gap = np.abs(adapters[k]["conv"]["kernel"] - fresh[k]["conv"]["kernel"])
        assert gap.min() > 0
