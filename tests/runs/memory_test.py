"""Memory that a device has not: one line that names the stage and what needs less."""

import json

import cli
import jax
import pytest

import distill_jax
from distill_jax.train import sharding
from distill_jax.train.reporter import Reporter
from distill_jax.train.trainer import Trainer

CONFIG = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ("plane4", "plane2"),
    "guidance": ("direct",),
    "recipe": {"epochs": 2, "batch_size": 12},
}
XLA = "RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes.\nBufferAssignment: ..."


@pytest.fixture
def full(monkeypatch):
    """From the student's first step on, XLA says so."""

    def dispatch(self, *arguments, _of=Trainer._dispatch):
        if self.stages[0].teachers:
            raise jax.errors.JaxRuntimeError(XLA)
        return _of(self, *arguments)

    monkeypatch.setattr(Trainer, "_dispatch", dispatch)


def test_it_names_the_stage_and_what_needs_less_and_keeps_what_was_saved(full, tmp_path):
    changes = {"seeds": (0, 1), "population": 2, "teacher_logits": "table"}
    with pytest.raises(distill_jax.OutOfMemoryError) as caught:
        distill_jax.run({**CONFIG, **changes}, workdir=tmp_path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("plane2 taught by plane4, seeds 0, 1: out of memory (RESOURCE_EXHAUSTED")
    for part in ("recipe.batch_size", "recipe.accumulate_steps", "population (2 ", "=graph"):
        assert part in line
    assert str(tmp_path) in line
    assert len(list(tmp_path.glob("stages/plane4-*/weights"))) == 2


def test_fewer_are_trained_at_once_where_nobody_said_how_many(monkeypatch, tmp_path):
    started, sizes = [], []
    full = 2  # members that the device's memory suffices for

    def dispatch(self, *arguments, _of=Trainer._dispatch):
        sizes.append(len(self.replicas))
        if len(self.replicas) > full:
            raise jax.errors.JaxRuntimeError(XLA)
        return _of(self, *arguments)

    class Recorder(Reporter):
        def notice(self, lines):
            started.extend(line.strip() for line in lines if "at once" in line)

    monkeypatch.setattr(Trainer, "_dispatch", dispatch)
    monkeypatch.setattr(sharding.Topology, "backend", "gpu")
    monkeypatch.setitem(sharding.VMAP_FROM, "gpu", 3)  # so that two are as two alone
    config = {**CONFIG, "seeds": (0, 1, 2, 3, 4), "networks": ("plane2",), "guidance": ("none",)}
    results = distill_jax.run(
        {**config, "recipe": {"epochs": 1, "batch_size": 12}}, workdir=tmp_path, reporter=Recorder()
    )
    assert [row["seed"] for row in results.rows] == [0, 1, 2, 3, 4]
    assert list(dict.fromkeys(sizes)) == [5, 2, 1]
    (line,) = started
    assert line.startswith(
        "trains 2 at once instead of 5: plane2, seeds 0, 1, 2, 3, 4: out of memory"
    )


def test_what_does_not_help_is_not_said(full):
    with pytest.raises(distill_jax.OutOfMemoryError) as caught:
        distill_jax.run({**CONFIG, "teacher_logits": "graph"})
    assert "population" not in str(caught.value) and "teacher_logits" not in str(caught.value)


def test_the_command_ends_with_one_line(tmp_path):
    (tmp_path / "config.py").write_text(
        "import json\nimport jax\nfrom distill_jax.train.trainer import Trainer\n"
        f"def dispatch(*arguments):\n    raise jax.errors.JaxRuntimeError({XLA!r})\n"
        "def get_config():\n    Trainer._dispatch = dispatch\n"
        f"    return json.loads({json.dumps(CONFIG)!r})\n"
    )
    done = cli.run(f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: plane4, seed 0: out of memory (RESO")


def test_other_errors_of_xla_stay_what_they_are(monkeypatch):
    def dispatch(self, *arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: no kernel image")

    monkeypatch.setattr(Trainer, "_dispatch", dispatch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no kernel image"):
        distill_jax.run(CONFIG)
