"""Methods of the exits of one network: their parts, whole trainings, and DCM in a cycle."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of, outputs_of
from float64 import close, kl_of
from marks import slow

import distill_jax
from distill_jax import data, methods, models
from distill_jax.methods import BYOT, DCM, DKS, ONE, OKDDip, Shapes
from distill_jax.methods.peers import rampup
from distill_jax.train import inference

RANDOM = np.random.RandomState(0)
B, C, F = 5, 4, 6
LOGITS = (2 * RANDOM.standard_normal((4, B, C))).astype(np.float32)
FEATURES = RANDOM.standard_normal((4, B, F)).astype(np.float32)
STAGES = tuple(RANDOM.standard_normal((B, 3, 3, c)).astype(np.float32) for c in (3, F))
LABELS = RANDOM.randint(0, C, B)
ALL = [ONE(), OKDDip(), BYOT(), BYOT(form="conference"), DKS(), DCM()]


def network(logits=LOGITS, features=FEATURES):
    """Outputs of a network and its branches."""
    exits = [outputs_of(z, f, stages=STAGES) for z, f in zip(logits, features, strict=True)]
    return exits[0]._replace(branches=tuple(exits[1:]))


def terms_of(method, student, **context):
    shapes = Shapes(student, tuple(context.get("teachers", ())), C, B)
    variables = method.init(jax.random.key(0), shapes)
    given = context_of(student, labels=LABELS, **context)
    return jax.jit(lambda: method.terms(variables, given)[0])()


# ---------------------------------------------------------------------------------------- the parts
@pytest.mark.parametrize(
    ("epoch", "epochs", "expected"),
    [
        (0.0, 80.0, np.exp(-5)),
        (10.99, 80.0, np.exp(-5 * (7 / 8) ** 2)),
        (80.0, 80.0, 1.0),
        (99.5, 80.0, 1.0),
        (0.0, 0.0, 1.0),
    ],
)
def test_the_ramp_rises_by_epochs_counted_from_0(epoch, epochs, expected):
    assert float(rampup(epoch, epochs)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("epoch", [3.0, 200.0])
@pytest.mark.parametrize("method", [ONE(), OKDDip()])
def test_the_ramp_weighs_the_divergences_alone(method, epoch):
    early, late = (terms_of(method, network(), epoch=e) for e in (epoch, 80.0))
    factor = float(rampup(epoch, 80.0))
    for name, term in early.items():
        expected = factor if name.endswith("kl") else 1.0
        assert float(term.weight) == pytest.approx(expected * float(late[name].weight))


@pytest.mark.parametrize(
    "method", ALL, ids=lambda m: f"{type(m).__name__} {getattr(m, 'form', '')}"
)
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_any_number_of_branches_and_equal_exits_give_what_is_finite(method, branches):
    same = [np.stack([x[0]] * (branches + 1)) for x in (LOGITS, FEATURES)]

    def loss(logits, features):
        student = network(logits, features)
        terms = terms_of(method, student, teachers=(student,))
        return sum(term.weight * jnp.mean(term.value) for term in terms.values())

    for given in (same, [x[: branches + 1] for x in (LOGITS, FEATURES)]):
        chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(loss, (0, 1)))(*given))


def test_exits_of_different_networks_alone_are_compared_by_dcm_and_of_one_alone_by_dks():
    one, other = network(LOGITS[:2], FEATURES[:2]), network(LOGITS[2:], FEATURES[2:])
    found = terms_of(DCM(kd_weight=0.5), one, teachers=(other,))
    pairs = [kl_of(t, s, 1.0) for t in LOGITS[2:] for s in LOGITS[:2]]
    close(found["dcm_kl"].value, sum(pairs))
    assert float(found["dcm_kl"].weight) == 0.5
    own = [kl_of(LOGITS[0], LOGITS[1], 1.0), kl_of(LOGITS[1], LOGITS[0], 1.0)]
    close(terms_of(DKS(), one)["dks_kl"].value, sum(own))


def test_the_norm_and_the_squares_of_byot_are_of_the_whole_batch():
    half, journal = B // 2, BYOT(form="journal")
    student = network()
    variables = journal.init(jax.random.key(0), Shapes(student, (), C, B))
    assert set(variables["params"]) == {"2", "3"}  # the deepest branch has none

    def feature(rows, method):
        student = network(LOGITS[:, rows], FEATURES[:, rows])
        context = context_of(student, labels=LABELS[rows])
        terms = jax.jit(lambda: method.terms(variables, context)[0])()
        return float(jnp.mean(terms["byot_feature"].value))

    parts = [feature(rows, journal) for rows in (slice(half), slice(half, None))]
    whole = feature(slice(None), journal)
    assert max(parts) < whole < sum(parts)
    squares = BYOT(form="conference")
    parts = [feature(rows, squares) for rows in (slice(half), slice(half, None))]
    assert feature(slice(None), squares) == pytest.approx(sum(parts), rel=1e-5)


def test_the_weights_of_byots_forms_are_their_codes():
    assert BYOT().weights == (0.3, 0.03) and BYOT(form="conference").weights == (0.1, 1e-6)
    assert BYOT(kd_weight=0.5, form="conference").weights == (0.5, 1e-6)


# --------------------------------------------------------------------------------- whole trainings
TINY = {
    "dataset": {"name": "synthetic:8x8x3:4:32:16", "valid_fraction": 0.25},
    "guidance": ("none",),
    "recipe": {"epochs": 2, "batch_size": 8, "learning_rate": 0.02},
    "selection": "last",
}
TERMS = {
    "one": {"one_ce", "one_ensemble", "one_kl"},
    "okddip": {"okddip_ce", "okddip_leader_ce", "okddip_kl", "okddip_leader_kl"},
    "byot": {"byot_ce", "byot_branches_ce", "byot_kd", "byot_feature"},
    "dks": {"dks_ce", "dks_kl"},
}


def terms_in(record):
    weighted = "train_weighted_"
    return {k.removeprefix(weighted): v for k, v in record.items() if k.startswith(weighted)}


def trained(name):
    """The results, and the whole network with the variables that it was left with."""
    whole, deploy = [], models.deploy

    def spy(network, variables):
        whole.append((network, variables))
        return deploy(network, variables)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "deploy", spy)
        results = distill_jax.run({**TINY, "networks": (name,)})
    return results, *whole[-1]


@pytest.mark.parametrize(
    ("prefix", "branches"), [("one", 2), ("okddip", 3), *slow(("byot", 1), ("dks", 1), ("one4", 4))]
)
def test_a_network_trains_by_its_name_and_its_backbone_is_what_is_left(prefix, branches):
    results, whole, variables = trained(f"{prefix}:plane2")
    (row,), ((network, deployed),) = results.rows, results.networks.values()
    assert network == models.build("plane2", 4, (8, 8, 3)) and whole.branches == branches
    for kind, modules in deployed.items():
        chex.assert_trees_all_equal(modules, {x: variables[kind][x] for x in modules})
    dataset = data.load(**TINY["dataset"])
    pairs = [(network, deployed), (whole, variables)]
    alone, inside = (exits for exits in inference.predict_logits(pairs, dataset.test, dataset))
    np.testing.assert_allclose(alone[0], inside[0], rtol=1e-5, atol=1e-6)
    assert len(inside) == branches + 1
    assert row["parameters"] == models.count_parameters(network)
    assert f"test_branch{branches}_accuracy" in row
    (history,) = results.histories.values()
    for record in history:
        terms = terms_in(record)
        assert terms.keys() == TERMS[whole.method]
        assert record["train_loss"] == pytest.approx(sum(terms.values()), rel=1e-5)


def chosen(name, live=(), **config):
    """The methods of a network with their weights, as a config has them."""
    networks = (name, *live)
    guidance = "mutual" if live else "none"
    experiment = distill_jax.resolve({**TINY, "networks": networks, "guidance": guidance, **config})
    own = experiment.methods_of(models.build(name, 4, (8, 8, 3)), (), live, {})
    return {method: (made, weight) for method, made, weight in own}


def test_a_name_brings_its_method_with_the_options_and_the_weight_that_are_named():
    assert chosen("byot:plane2") == {"byot": (BYOT(), 1.0)}
    options = {"method_options": {"byot": {"form": "conference"}}}
    conference = BYOT(form="conference")
    assert chosen("byot:plane2", **options) == {"byot": (conference, 1.0)}
    halved = chosen("byot:plane2", methods={"byot": 0.5}, **options)
    assert halved == {"byot": (conference, 0.5)}
    assert chosen("plane2", **options).keys() == {"ce"}


def test_another_method_that_trains_branches_takes_the_place_of_the_networks_own():
    assert chosen("dks:plane2", methods={"byot": 1.0}).keys() == {"byot"}
    assert chosen("dks:plane2", methods={"byot": 1.0, "dks": 0.5}).keys() == {"byot", "dks"}
    peer = ("dks:plane4",)
    assert chosen("dks:plane2", peer, methods={"dcm": 1.0}).keys() == {"dcm"}
    # Nobody is there for it.
    assert chosen("dks:plane2", methods={"dcm": 1.0}).keys() == {"dks"}
    assert chosen("dks:plane2", peer).keys() == {"dks", "dml"}


def test_dcm_trains_two_networks_whose_exits_teach_each_other():
    networks = ("dks:plane4", "dks:plane2")
    changes = {"networks": networks, "guidance": ("mutual",), "methods": {"dcm": 1.0}}
    results = distill_jax.run({**TINY, **changes})
    for row, name in zip(results.rows, networks, strict=True):
        assert row["network"] == name
        for record in results.histories["mutual", name, 0]:
            assert terms_in(record).keys() == {"dcm_ce", "dcm_kl"}
            assert record["train_dcm_kl"] > 0
        backbone = models.build(name.partition(":")[2], 4, (8, 8, 3))
        assert results.networks["mutual", name, 0][0] == backbone


def test_methods_that_train_branches_are_those_that_networks_bring_and_dcm():
    training = {name for name, kind in methods.METHODS.items() if kind.trains_branches}
    assert training == {*(kind.method for kind in models.BRANCHED.values()), "dcm"}
