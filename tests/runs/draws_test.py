"""Several draws of one architecture: `plane2#2` is plane2 with other fresh weights."""

import jax
import numpy as np
import pytest

from distill_jax import data, graph
from distill_jax.runs.config import ConfigError, resolve
from distill_jax.runs.ids import digest_of
from distill_jax.runs.plan import build_network, make_plan
from distill_jax.train.optim import OptimOptions
from distill_jax.train.step import init_state

NETWORKS = ("plane2", "plane2#2", "plane2#3")
DATASET = data.load("synthetic:8x8x1:10:200:50", valid_fraction=0.5)


def plan(guidance, networks=NETWORKS):
    config = {"networks": networks, "guidance": guidance, "students": networks}
    return make_plan(resolve(config), DATASET, digest_of(DATASET))


def fresh(name):
    experiment = resolve({"networks": NETWORKS, "guidance": "none"})
    network = build_network(experiment, DATASET, name)
    return jax.tree.leaves(init_state(network, OptimOptions(), jax.random.key(3)).params)


def test_each_draw_is_another_and_the_first_is_the_architectures_own():
    first, second, third = (fresh(name) for name in NETWORKS)
    for one, other in ((first, second), (first, third), (second, third)):
        assert [x.shape for x in one] == [x.shape for x in other]
        assert max(np.abs(x - y).max() for x, y in zip(one, other, strict=True)) > 1e-2


def test_born_again_networks_are_a_chain():
    found = plan("plane2>plane2#2>plane2#3")
    ids = [found.results["plane2>plane2#2>plane2#3", name, 0] for name in NETWORKS]
    assert [found.teachers[i] for i in ids] == [(), (ids[0],), (ids[1],)]
    alone = plan("none")
    assert alone.results["none", "plane2", 0] == ids[0]
    assert len({alone.results["none", name, 0] for name in NETWORKS}) == 3


@pytest.mark.parametrize("name", ["plane2#1", "plane2#0", "plane2#", "plane2#02", "plane2#two"])
def test_draws_count_from_two(name):
    with pytest.raises(ConfigError, match="plane2#2, plane2#3"):
        resolve({"networks": ("plane2", name), "guidance": "none"})
    with pytest.raises(graph.GraphError):
        graph.architecture(name)


def test_an_architecture_twice_is_told_how_another_draw_is_called():
    with pytest.raises(ConfigError, match="plane2#2"):
        resolve({"networks": ("plane2", "plane2"), "guidance": "none"})
