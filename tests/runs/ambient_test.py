"""Settings of JAX that others made: the same numbers under the same id, whatever they are."""

import contextlib
import json
from typing import ClassVar

import cli
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import distill_jax
from distill_jax import models
from distill_jax.train.reporter import Reporter

CONFIG = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ("plane2",),
    "guidance": ("none",),
    "recipe": {"epochs": 1, "batch_size": 12, "augment": "crop_flip"},
}


def trained(*contexts, **changes):
    """The row of a run under some settings, and the types of its weights."""
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        results = distill_jax.run({**CONFIG, **changes})
    _, variables = results.networks["none", "plane2", 0]
    return results.rows[0], {str(leaf.dtype) for leaf in jax.tree.leaves(variables)}


@pytest.fixture(scope="module")
def plain():
    return trained()


@pytest.mark.parametrize(
    "setting",
    [
        lambda: jax.enable_x64(True),
        lambda: jax.default_prng_impl("rbg"),
        lambda: jax.threefry_partitionable(False),
        lambda: jax.numpy_dtype_promotion("strict"),
    ],
    ids=["x64", "rbg", "threefry", "strict"],
)
def test_what_others_set_changes_neither_the_id_nor_a_bit(plain, setting):
    row, types = trained(setting())
    for name in ("stage", "state_digest"):
        assert row[name] == plain[0][name]
    assert types == {"float32"}


def test_a_precision_that_was_chosen_is_another_stage(plain):
    row, _ = trained(jax.default_matmul_precision("highest"))
    assert row["stage"] != plain[0]["stage"]


class Precision(nn.Module):
    """Notes the precision that it is computed in."""

    seen: ClassVar[set[str | None]] = set()

    @nn.compact
    def __call__(self, x):
        self.seen.add(jax.config.jax_default_matmul_precision)
        return nn.Dense(4)(x.mean((1, 2)))


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_the_precision_of_a_config_is_that_of_all_it_computes_and_of_the_id(plain, precision):
    row, _ = trained(precision=precision)
    assert row["stage"] == trained(jax.default_matmul_precision(precision))[0]["stage"]
    assert row["stage"] != plain[0]["stage"]
    models.register_network("ambient_precision", lambda classes, inputs: Precision())
    Precision.seen.clear()
    config = {**CONFIG, "networks": ("ambient_precision",), "precision": precision}
    results = distill_jax.run(config)
    assert Precision.seen == {precision}
    Precision.seen.clear()
    results.logits(np.zeros((3, 8, 8, 1), np.uint8))
    assert Precision.seen == {precision}
    assert jax.config.jax_default_matmul_precision is None


def test_a_folder_from_before_there_was_a_precision_goes_on_at_the_default_alone(tmp_path):
    distill_jax.run(CONFIG, workdir=tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    for fields in (saved, saved["resolved"]):
        del fields["precision"], fields["deterministic"]
    path.write_text(json.dumps(saved))
    with pytest.raises(distill_jax.WorkdirError, match="precision is 'default' there and 'high'"):
        distill_jax.run({**CONFIG, "precision": "high"}, workdir=tmp_path)
    assert distill_jax.run({**CONFIG, "deterministic": True}, workdir=tmp_path).rows
    saved = json.loads(path.read_text())
    assert saved["deterministic"] is saved["resolved"]["deterministic"] is True


FLAG = "--xla_gpu_exclude_nondeterministic_ops=true"


def test_the_same_bytes_are_asked_for_before_jax_starts(tmp_path):
    (tmp_path / "config.py").write_text(
        "import os\nimport distill_jax\n"
        "def load():\n"
        "    print(os.environ['XLA_FLAGS'])\n"
        f"    return distill_jax.data.load({CONFIG['dataset']['name']!r})\n"
        "distill_jax.register_dataset('flags', load)\n"
        "def get_config():\n"
        "    row = {'networks': ('plane2',), 'guidance': ('none',)}\n"
        "    return {'dataset': {'name': 'flags'}, **row}\n"
    )
    given = [f"--config={tmp_path / 'config.py'}", "--measure=no", "--config.recipe.batch_size=12"]
    said = cli.run("plan", *given, "--config.deterministic=True")
    assert said.returncode == 0, said.stderr
    assert said.stdout.split("\n")[0].split()[-1] == FLAG


def test_the_same_bytes_cannot_be_asked_of_a_gpu_that_jax_has_started_on(monkeypatch):
    config = {**CONFIG, "deterministic": True}
    jax.devices()
    assert not distill_jax.resolve({**CONFIG}).deterministic
    assert distill_jax.resolve(config).deterministic  # of a CPU it is nothing to ask
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(distill_jax.ConfigError, match=f"already started on a GPU: .*{FLAG} in the"):
        distill_jax.resolve(config)
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to= {FLAG}")
    assert distill_jax.resolve(config).deterministic


def test_float64_computes_in_it_and_leaves_the_setting_as_it_was(plain):
    row, types = trained(dtype="float64")
    assert not jax.config.jax_enable_x64
    assert row["stage"] != plain[0]["stage"] and row["state_digest"] != plain[0]["state_digest"]
    assert np.isfinite(row["test_accuracy"])
    assert types == {"float64"}


def test_numbers_of_a_recipe_are_no_narrower_than_the_network():
    def digest(rate, dtype):
        recipe = {**CONFIG["recipe"], "learning_rate": rate}
        return trained(dtype=dtype, recipe=recipe)[0]["state_digest"]

    near = float(np.float32(0.1))
    assert digest(0.1, "float64") != digest(near, "float64")
    assert digest(0.1, "float32") == digest(near, "float32")


def test_a_network_draws_its_own_type_whatever_is_set():
    network = models.build("resnet8", 4, (8, 8, 1))
    with jax.enable_x64(True):
        drawn = network.init(jax.random.key(0))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(drawn)} == {"float32"}


def test_float64_where_jax_has_it_not_is_refused():
    network = models.build("plane2", 4, (8, 8, 1), "float64")
    with jax.enable_x64(True):
        variables = network.init(jax.random.key(0))
        assert network.apply(variables, jnp.ones((2, 8, 8, 1)))[0].logits.dtype == jnp.float64
    for call in (
        lambda: network.init(jax.random.key(0)),
        lambda: network.apply(variables, jnp.ones((2, 8, 8, 1))),
    ):
        with pytest.raises(ValueError, match="plane2 is to compute in float64 and JAX's .* off"):
            call()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_registered_network_that_computes_in_its_own_types_is_named(dtype):
    class Small(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(x.mean((1, 2)))

    class Lines(Reporter):
        def __init__(self):
            self.lines = []

        def notice(self, lines):
            self.lines += lines

    models.register_network("ambient_small", lambda classes, inputs: Small())
    told = Lines()
    config = {**CONFIG, "dtype": dtype, "networks": ("plane2", "ambient_small")}
    distill_jax.run({**config, "students": ("plane2", "ambient_small")}, reporter=told)
    named = [line for line in told.lines if "dtype" in line]
    expected = "  warning: ambient_small is registered and chooses its own types: "
    assert named == ([] if dtype == "float32" else [f"{expected}dtype bfloat16 is not its"])
