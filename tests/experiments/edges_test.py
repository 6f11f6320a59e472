"""Methods along the edges of graphs: every one can be trained, and rows say which it was."""

import pytest

from distill_jax import resolve
from distill_jax.runs.prepare import prepare
from experiments import edges


@pytest.fixture(scope="module")
def plans():
    """What each graph comes to; its methods are checked against the networks on the way."""
    return [prepare(resolve(edges.config_of(one, 2, 8))).plan for one in edges.SHOWN]


def test_what_travels_is_what_the_graph_was_given(plans):
    for one, plan in zip(edges.SHOWN, plans, strict=True):
        taught = [stage for stage in plan.stages.values() if stage.teachers or stage.live]
        for stage in taught:
            assert {name for name, _ in stage.methods} - {"ce"} == set(one.methods) - {"ce"}
        assert bool(taught) == bool(one.methods)
        assert {network for _, network, _ in plan.results} == {"resnet8"}


def test_the_largest_network_is_trained_once_for_all_that_it_teaches(plans):
    ids = [
        {stage.id for stage in plan.stages.values() if stage.network.name == "resnet20"}
        for plan in plans
    ]
    needed = [own for own in ids if own]
    assert len(needed) == 6 and all(own == needed[0] for own in needed) and len(needed[0]) == 2


def test_labels_name_graph_and_methods():
    labels = [edges.label(one) for one in edges.SHOWN]
    assert labels[:3] == ["none", "direct: kd", "chain: crd"]
    assert len(set(labels)) == len(labels)
