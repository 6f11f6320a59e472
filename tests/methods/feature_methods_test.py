"""Methods on features: devices, dropped teachers, what is zero, adapters, refusals."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of, outputs_of
from jax.sharding import PartitionSpec

from distill_jax import methods
from distill_jax.methods import (
    AB,
    AT,
    CC,
    FSP,
    FT,
    KDSVD,
    NST,
    PKT,
    RKD,
    SP,
    SRRL,
    VID,
    ReviewKD,
    SemCKD,
    Shapes,
)
from distill_jax.methods.correlation import Embedding

B, C = 8, 3
METHODS = {
    "at": AT(),
    "nst": NST(),
    "vid": VID(),
    "fsp": FSP(),
    "kdsvd": KDSVD(),
    "sp": SP(),
    "pkt": PKT(),
    "rkd": RKD(),
    "cc": CC(embedding_size=6),
    "cc_gaussian": CC(kernel="gaussian"),
    "ab": AB(),
    "srrl": SRRL(),
    "srrl_map": SRRL(form="map"),
    "ft": FT(),
    "ft_factor": FT(form="factor"),
    "reviewkd": ReviewKD(),
    "semckd": SemCKD(),
}
ALL = pytest.mark.parametrize("name", METHODS)


def shown(seed, *maps, feature=5):
    """Outputs with a stem like the first map, stages, and a vector."""
    draw = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(draw.standard_normal((B, *shape)) + 0.4, jnp.float32)

    stem, *preacts = (array(*shape) for shape in (maps[0], *maps))
    return outputs_of(
        array(C),
        jnp.maximum(array(feature), 0),
        stages=tuple(jnp.maximum(x, 0) for x in preacts),
        stem=jnp.maximum(stem, 0),
        preacts=tuple(preacts),
    )


MAPS = (4, 4, 3), (2, 2, 5)
STUDENT = shown(0, *MAPS)
TEACHERS = shown(1, *MAPS, feature=7), shown(2, *MAPS, feature=4)
WIDER = (4, 4, 6), (2, 2, 7)  # for what leads from one number of channels to another


def teachers_of(method):
    """Teachers that the method takes, one of them wider than the student where it may be."""
    wider = isinstance(method, AB) or method == METHODS["srrl_map"]
    return (shown(1, *WIDER, feature=7), shown(2, *MAPS, feature=5)) if wider else TEACHERS


def given(student, teachers, mask, **others):
    """The context of a step, with a classifier of each teacher."""
    context = context_of(student, teachers, mask, **others)
    sizes = [0 if t.feature is None else t.feature.shape[-1] for t in teachers]
    weights = [jnp.cos(jnp.arange(n * C, dtype=jnp.float32)).reshape(n, C) for n in sizes]
    heads = tuple((lambda x, w=w: x @ w) for w in weights)
    return dataclasses.replace(context, teacher_heads=heads, batch_size=B)


def variables_of(method):
    shapes = jax.eval_shape(lambda: Shapes(STUDENT, teachers_of(method), C, 16))
    method.check(shapes)
    return method.init(jax.random.key(0), shapes)


@functools.partial(jax.jit, static_argnums=0)
def computed(method, variables, student, teachers, mask):
    """((loss, value), gradients by the variables and by what the student shows)."""

    def loss(variables, student):
        terms, _ = method.terms(variables, given(student, teachers, mask))
        (term,) = terms.values()
        return term.weight * jnp.mean(term.value), term.value

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, student)


@functools.cache
def on_one_device(name, mask=(True, True)):
    method = METHODS[name]
    return computed(method, variables_of(method), STUDENT, teachers_of(method), jnp.array(mask))


# ------------------------------------------------------------------------------------ on devices
@ALL
@pytest.mark.parametrize("devices", [2, 4])
def test_any_number_of_devices_gives_the_loss_and_gradients_of_one(name, devices):
    method, mesh = (
        METHODS[name],
        jax.make_mesh((devices,), ("data",), (jax.sharding.AxisType.Auto,)),
    )
    rows, same = PartitionSpec("data"), PartitionSpec()

    def on_each(variables, student, teachers):
        def loss(variables, student):
            context = given(student, teachers, jnp.array([True, True]), axis_name="data")
            (term,) = method.terms(variables, context)[0].values()
            return term.weight * jnp.mean(term.value)

        value, (by_variables, by_student) = jax.value_and_grad(loss, (0, 1))(variables, student)
        mean = functools.partial(jax.lax.pmean, axis_name="data")
        by_student = jax.tree.map(lambda x: x / devices, by_student)
        return mean(value), (mean(by_variables), by_student)

    specs = {"in_specs": (same, rows, rows), "out_specs": (same, (same, rows))}
    sharded = jax.jit(jax.shard_map(on_each, mesh=mesh, check_vma=False, **specs))
    value, gradients = sharded(variables_of(method), STUDENT, teachers_of(method))
    (expected, _), wanted = on_one_device(name)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chex.assert_trees_all_close(gradients, wanted, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------- teachers
@ALL
def test_kept_teachers_add_up_and_a_dropped_one_leaves_no_trace(name):
    (both, per_example), gradients = on_one_device(name)
    assert per_example.shape == (B,)
    assert both > 0 and any(np.any(x) for x in jax.tree.leaves(gradients[1]))
    method, parts = METHODS[name], []
    shown_by = teachers_of(method)
    for kept in ([True, False], [False, True], [False, False]):
        zeros = jax.tree.map(jnp.zeros_like, shown_by)  # what a dropped teacher shows
        teachers = [t if k else z for t, z, k in zip(shown_by, zeros, kept, strict=True)]
        found = computed(method, variables_of(method), STUDENT, tuple(teachers), jnp.array(kept))
        chex.assert_tree_all_finite(found)
        parts.append((found[0][0], found[1][1]))
    chex.assert_trees_all_equal(parts.pop(), jax.tree.map(jnp.zeros_like, parts[0]))
    added = jax.tree.map(jnp.add, *parts)
    chex.assert_trees_all_close(added, (both, gradients[1]), rtol=1e-4, atol=1e-6)


@ALL
def test_it_is_made_by_its_name_and_reads_nothing_that_it_does_not_ask_for(name):
    method, other = METHODS[name], methods.build(name.partition("_")[0])
    assert type(method) is type(other)
    hidden = {"feature": None, "stages": (), "stem": None, "preacts": ()}
    hidden = {name: x for name, x in hidden.items() if name not in method.needs}
    teachers = tuple(t._replace(**hidden) for t in teachers_of(method))
    mask = jnp.array([True, True])
    found = computed(method, variables_of(method), STUDENT, teachers, mask)
    np.testing.assert_array_equal(found[0][0], on_one_device(name)[0][0])


# ------------------------------------------------------------------------------- what is degenerate
@ALL
@pytest.mark.parametrize("whose", ["an example", "all", "a teacher's", "the same"])
def test_zeros_and_duplicates_give_finite_losses_and_gradients(name, whose):
    """A vector without a length, a map without a direction, examples that coincide."""
    student, teachers = STUDENT, teachers_of(METHODS[name])
    if whose == "an example":
        student = jax.tree.map(lambda x: x.at[1].set(0.0), student)
    elif whose == "all":
        student = jax.tree.map(jnp.zeros_like, student)
    elif whose == "a teacher's":
        teachers = jax.tree.map(lambda x: x.at[2].set(0.0), teachers)
    else:
        student = jax.tree.map(lambda x: x.at[3].set(x[0]), student)
    method = METHODS[name]
    found = computed(method, variables_of(method), student, teachers, jnp.array([True, True]))
    chex.assert_tree_all_finite(found)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(found[1]))
    # The codes of the field give 1e10 and more, or what is not a number. FT has three BatchNorms in
    # a row, each of which divides what does not vary by a small number.
    assert largest < (1e8 if name == "ft" else 1e6)
    chex.assert_shape(found[0][1], (B,))


def test_equal_singular_values_pass_no_gradient_between_their_vectors():
    flat = jnp.tile(jnp.eye(4)[None, :, None], (B, 1, 1, 1)).reshape(B, 2, 2, 4)
    student = STUDENT._replace(stages=(flat, flat))
    teachers = (TEACHERS[0]._replace(stages=(flat + 0.1, 2 * flat)),)
    chex.assert_tree_all_finite(computed(KDSVD(), {}, student, teachers, jnp.array([True])))


# ------------------------------------------------------------------------------------ adapters
def test_each_teacher_has_embeddings_of_its_own_and_both_sides_learn():
    fresh = variables_of(METHODS["cc"])["params"]
    sizes = [
        fresh[k][who]["linear"]["kernel"].shape for k in "01" for who in ("student", "teacher")
    ]
    assert sizes == [(5, 6), (7, 6), (5, 6), (4, 6)]
    assert not np.array_equal(*(fresh[k]["student"]["linear"]["kernel"] for k in "01"))
    _, (by_variables, _) = on_one_device("cc")
    assert all(np.any(x) for x in jax.tree.leaves(by_variables))
    assert variables_of(METHODS["cc_gaussian"]) == {}


def test_vid_begins_with_its_variance_and_trains_it():
    fresh = variables_of(VID(variance=2.0))["params"]
    assert fresh.keys() == {"0", "1"} and fresh["0"].keys() == {"0", "1"}
    scale = fresh["0"]["1"]["log_scale"]
    np.testing.assert_allclose(jax.nn.softplus(scale) + 1e-5, np.full(5, 2.0), rtol=1e-6)
    _, (by_variables, _) = on_one_device("vid")
    assert all(np.any(x) for x in jax.tree.leaves(by_variables))


@pytest.mark.parametrize("variance", [1.1e-5, 1e-3, 1e4])
def test_vid_begins_with_any_variance(variance):
    method = VID(variance=variance)
    scale = variables_of(method)["params"]["0"]["0"]["log_scale"]
    np.testing.assert_allclose(jax.nn.softplus(scale) + 1e-5, np.full(3, variance), rtol=1e-4)


def test_normalised_embeddings_have_unit_length():
    module = Embedding(6, normalised=True)
    embedded = module.apply(module.init(jax.random.key(0), STUDENT.feature), STUDENT.feature)
    np.testing.assert_allclose(jnp.linalg.norm(embedded, axis=-1), np.ones(B), rtol=1e-6)


def test_connectors_lead_only_where_channels_differ_and_keep_their_statistics():
    fresh = variables_of(METHODS["ab"])
    assert fresh["params"].keys() == {"0 of 0", "1 of 0"}
    chex.assert_shape(fresh["params"]["1 of 0"]["conv"]["kernel"], (1, 1, 5, 7))
    for name, shape in (("srrl", (1, 1, 5, 7)), ("srrl_map", (1, 1, 5, 7))):
        method = METHODS[name]
        fresh = variables_of(method)
        chex.assert_shape(fresh["params"]["0"]["conv"]["kernel"], shape)
        context = given(STUDENT, teachers_of(method), jnp.array([True, True]))
        _, after = method.terms(fresh, context)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, fresh)
        assert all(np.any(x["bn"]["mean"]) for x in after["batch_stats"].values())


# -------------------------------------------------------------------------------------- refusals
def against(student, teacher, method):
    shapes = jax.eval_shape(lambda: Shapes(student, (teacher,), C, 16))
    method.check(shapes)


@pytest.mark.parametrize("name", ["at", "nst", "vid", "fsp", "kdsvd", "ab"])
def test_other_numbers_of_stages_are_refused(name):
    other = shown(3, (4, 4, 3), (4, 4, 4), (2, 2, 5))
    with pytest.raises(ValueError, match=r"student's maps are .*4×4×3, 2×2×5, .* as many of both"):
        against(STUDENT, other, METHODS[name])


@pytest.mark.parametrize("name", ["at", "nst", "vid"])
def test_maps_of_which_none_covers_the_other_are_refused(name):
    other = shown(3, (5, 3, 3), (2, 2, 5))
    message = "student's maps are 4×4×3, 2×2×5, the teacher's 5×3×3, 2×2×5: expected a map at least"
    with pytest.raises(ValueError, match=message):
        against(STUDENT, other, METHODS[name])
    against(STUDENT, shown(3, (7, 6, 2), (1, 1, 9)), METHODS[name])


@pytest.mark.parametrize(
    ("method", "maps", "message"),
    [
        (FSP(), [(4, 4, 3), (2, 2, 6)], "expected 5 channels beside .2, 2, 5., got 6"),
        (FSP(), [(4, 4, 3), (5, 3, 5)], r"\(4, 4, 3\) is followed by one of \(5, 3, 5\)"),
        (KDSVD(), [(4, 4, 3), (2, 2, 6)], "map is .2, 2, 5., the teacher's .2, 2, 6., expected as"),
        (KDSVD(along="width"), [(4, 4, 3), (2, 3, 5)], "expected as many width of both"),
        (
            AB(),
            [(4, 4, 3), (1, 2, 5)],
            r"map is \(2, 2, 5\), the teacher's \(1, 2, 5",
        ),
        (AB(stage_weights=(1.0,)), MAPS, "networks have 2 stages, stage_weights are .1.0,."),
        (SRRL(form="map"), MAPS, r"last map \(2, 2, 5\) is not what its classifier takes, .* of 6"),
        (
            FT(),
            [(1, 3, 5)],
            "student's maps are 2×2×5, the teacher's 1×3×5: expected a map at least",
        ),
        (FT(rate=0.1), MAPS, r"rate 0.1 of the channels of the teacher's map \(2, 2, 5\) leaves"),
        (KDSVD(rank=4), MAPS, r"rank is at most 3 for maps \(4, 4, 3\), got 4"),
    ],
)
def test_maps_whose_channels_or_widths_do_not_fit_are_refused(method, maps, message):
    with pytest.raises(ValueError, match=message):
        against(STUDENT, shown(3, *maps, feature=6), method)


@pytest.mark.parametrize("method", [FSP(), KDSVD()])
def test_pairs_of_maps_take_two(method):
    one = shown(3, (4, 4, 3))._replace(stem=None)
    with pytest.raises(ValueError, match="pairs of maps that follow: the networks have one map"):
        against(one, one, method)


@pytest.mark.parametrize("name", ["at", "nst", "vid", "fsp", "kdsvd"])
def test_stages_that_are_no_maps_are_refused(name):
    tokens = STUDENT._replace(stages=(jnp.zeros((B, 4, 3)), jnp.zeros((B, 4, 3))))
    with pytest.raises(ValueError, match="4×3: expected height, width and channels of each"):
        against(tokens, tokens, METHODS[name])


@pytest.mark.parametrize("name", ["pkt", "rkd", "cc", "srrl", "srrl_map"])
def test_networks_without_a_vector_are_refused(name):
    for student, teacher, whose in (
        (STUDENT._replace(feature=None), TEACHERS[0], "the student"),
        (STUDENT, TEACHERS[0]._replace(feature=None), "teacher 1"),
    ):
        with pytest.raises(ValueError, match=f"before the classifier: {whose} has none"):
            against(student, teacher, METHODS[name])


def test_a_network_without_stages_is_refused():
    with pytest.raises(ValueError, match="sp compares feature maps .*: teacher 1 has none"):
        against(STUDENT, TEACHERS[0]._replace(stages=()), SP())


@pytest.mark.parametrize("name", ["rkd", "cc"])
def test_a_batch_of_one_is_refused(name):
    student, teacher = jax.tree.map(lambda x: x[:1], (STUDENT, TEACHERS[0]))
    with pytest.raises(ValueError, match=f"{name} compares the examples of a batch: expected at"):
        against(student, teacher, METHODS[name])


@pytest.mark.parametrize("name", ["srrl", "reviewkd"])
def test_a_batch_of_one_whose_vectors_are_normalised_is_refused(name):
    """A BatchNorm gives its bias for one vector, so that the student would learn nothing."""
    student, teacher = jax.tree.map(lambda x: x[:1], (STUDENT, TEACHERS[0]))
    with pytest.raises(ValueError, match=f"{name} normalises vectors over the batch: expected at"):
        against(student, teacher, METHODS[name])
    against(student, shown(1, *MAPS, feature=5), METHODS["srrl_map"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("at", {"power": 3}, "at's power is an even number, got 3"),
        ("at", {"power": 2.0}, "at's power is a whole number above 0, got 2.0"),
        ("pkt", {"epsilon": 0.0}, "pkt's epsilon is a number above 0, got 0.0"),
        ("rkd", {"angle_weight": -1}, "rkd's angle_weight is a number of 0 or more, got -1"),
        ("cc", {"kernel": "rbf"}, "cc's kernel is one of .'linear', 'gaussian'., got 'rbf'"),
        ("cc", {"order": True}, "cc's order is a whole number above 0, got True"),
        ("cc", {"gamma": "x"}, "cc's gamma is a number above 0, got 'x'"),
        ("kdsvd", {"rank": 0}, "kdsvd's rank is a whole number above 0, got 0"),
        ("kdsvd", {"along": "height"}, "kdsvd's along is one of"),
        ("vid", {"variance": 1e-6}, "vid's variance is above its epsilon 1e-05, got 1e-06"),
        ("ab", {"stage_weights": (1.0, -1.0)}, "ab's stage_weights is a number of 0 or more"),
        ("srrl", {"form": "both"}, "srrl's form is one of .'vector', 'map'., got 'both'"),
        ("ft", {"rate": 1.5}, "ft's rate is a number between 0 and 1, got 1.5"),
        ("ft", {"form": "both"}, "ft's form is one of .'attention', 'factor'., got 'both'"),
        ("ft", {"order": 0}, "ft's order is a whole number above 0, got 0"),
        ("sp", {"layer": 1}, "method 'sp' has no option 'layer': it has none"),
    ],
)
def test_numbers_out_of_their_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        methods.build(name, options)
