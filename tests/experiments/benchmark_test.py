"""The benchmark runs end to end in miniature, and its arithmetic is right. No test has a clock."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from distill_jax import models
from distill_jax.models.backend import traced_for
from experiments import devices, growth
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import cases, compared, flops, machine, measure, tables, worker
from experiments.benchmark.cases import Case, Unavailable
from experiments.benchmark.compared import DROP, EAGER, OURS, PEAK, TABLE, Ratio, Target
from experiments.benchmark.measure import Measured

STEP = Case("jax", "recomputing", "plane2", ("plane4",), 8)


def command(main, *arguments):
    """The exit code of a command with these flags."""
    with flagsaver.flagsaver():
        return main(flags.FLAGS(["command", "--smoke", *arguments]))


class Canned:
    """A worker without a process; what a step takes follows from its case alone."""

    turns: list[str] = []

    def __init__(self, case, cores, cache="", limit=0.0):
        missing = "not here" if case.variant == "table" else ""
        self.found = Measured(case, missing, start_seconds=5.0 - 3 * bool(cache), device="cpu cpu")
        self.found.flops = 1e6 * case.batch * (3 + len(case.teachers))
        self.found.losses = [2.0, 1.0 if case.framework == "jax" else 1.01]
        self.seconds = {"torch": 0.4, "jax": 0.1, "matmul": 0.01}[case.framework]
        self.seconds *= 0.8 if case.variant == "dropping" else case.batch / 8

    def run(self, steps):
        self.turns.append(self.found.case.variant)
        return self.seconds

    def end(self):
        self.found.step_bytes = 100 if self.found.case.framework == "jax" else 80
        return self.found


@pytest.fixture
def canned(monkeypatch):
    monkeypatch.setattr(measure, "Worker", Canned)
    monkeypatch.setattr(benchmark, "Worker", Canned)
    monkeypatch.setattr(Canned, "turns", [])


# --------------------------------------------------------------------------------------- end to end
def test_the_command_measures_in_processes_of_their_own(tmp_path, capsys):
    file = tmp_path / "found.json"
    only = f"--only={OURS},{PEAK}"
    assert not command(benchmark.main, only, "--starts=0", "--members=", f"--json={file}")
    written = json.loads(file.read_text())
    ours, peak = written["rows"]
    assert ours["case"]["teachers"] == list(cases.SMOKE["plain"][0])
    assert len(ours["rounds"]) == 2 and ours["seconds"] > 0
    for name in ("images_per_second", "flops_per_second", "peak_fraction", "start_seconds"):
        assert ours[name] > 0, name
    assert ours["process_bytes"] > 1e7 and ours["step_bytes"] > 1e7
    assert 0 < ours["compile_seconds"] < ours["start_seconds"]
    # It trains: the second step is on the same images.
    assert len(ours["losses"]) == 2 and np.all(np.isfinite(ours["losses"]))
    assert ours["losses"][0] != ours["losses"][1]
    assert ours["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert peak["flops"] == 2 * 64**3 and "ratio" not in peak
    assert written["machine"]["jax"] == jax.__version__
    assert OURS in capsys.readouterr().out


def test_the_commands_themselves_load_no_framework():
    # One that only imports JAX's arrays may take most of a GPU's memory from the workers.
    names = "experiments.benchmark.__main__, experiments.growth, experiments.gpu_row.__main__"
    code = f"import sys, {names}; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code], cwd=measure.ROOT).returncode


def test_a_worker_that_cannot_says_why():
    found = measure.Worker(Case("torch", "eager", "nobody"), []).end()
    assert found.missing == "torch is not installed" or "nobody" in found.missing
    assert not found.seconds


# ------------------------------------------------------------------------------------- the commands
def test_all_rows_of_the_benchmark(canned, tmp_path, capsys):
    file = tmp_path / "found.json"
    assert not command(benchmark.main, "--peer=torch", "--members=1,2", f"--json={file}")
    written, out = json.loads(file.read_text()), capsys.readouterr().out
    rows = {row["name"]: row for row in written["rows"]}
    assert rows[EAGER]["ratio"]["median"] == pytest.approx(4.0)
    assert rows[EAGER]["flops"] == rows[OURS]["flops"]
    assert rows[TABLE]["missing"] == "not here" and "not here" in out
    peak = 1e6 * 128 * 3 / (0.01 * 128 / 8)  # of the canned matrix product
    assert rows[OURS]["peak_fraction"] == pytest.approx(40e6 / 0.1 / peak)
    assert written["starts"] == [2.0] * 4
    assert "DIFFER FROM ours, 1e-02" in out
    assert "does not apply here" in out  # miniature sizes
    assert [row["case"]["members"] for row in written["members"]] == [1, 2]


@pytest.mark.parametrize(("flag", "mode"), [([], "jit"), (["--parallel=pmap"], "pmap")])
def test_several_devices_are_run_as_asked(flag, mode, canned, tmp_path):
    file = tmp_path / "found.json"
    assert not command(benchmark.main, *flag, "--members=", "--starts=0", f"--json={file}")
    found = [row["case"] for row in json.loads(file.read_text())["rows"]]
    assert [case["parallel"] for case in found if case["devices"] == 2] == [mode] * 2


def test_one_device_and_two(canned, tmp_path, capsys):
    file = tmp_path / "found.json"
    assert not command(devices.main, f"--json={file}")
    lines = json.loads(file.read_text())["lines"]
    assert [(line["teachers"], line["batch"]) for line in lines] == [(0, 8), (2, 8)]
    assert all(line["ratio"] == [1.0, 1.0, 1.0] for line in lines)
    assert "ratio" in capsys.readouterr().out


def test_growth(canned, tmp_path, capsys):
    file = tmp_path / "found.json"
    assert not command(growth.main, f"--json={file}")
    found = {line["what"]: line for line in json.loads(file.read_text())["lines"]}
    assert set(found) == {"teachers", "batch", "images", "devices"}
    assert found["batch"]["exponent"] == pytest.approx(1.0)
    assert found["images"]["exponent"] == pytest.approx(0.0)
    assert found["teachers"]["exponent"] is None  # it starts at none
    assert found["teachers"]["flops"] == [1e6 * 8 * n for n in (3, 4, 5)]
    assert "asked: 1 or less" in capsys.readouterr().out


@pytest.mark.parametrize("main", [benchmark.main, devices.main, growth.main])
@pytest.mark.parametrize("argument", ["stray", "--json=/nowhere/found.json"])
def test_a_wrong_command_is_refused_before_anything_is_measured(main, argument, capsys):
    assert command(main, argument) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_row_that_there_is_not(capsys):
    assert command(benchmark.main, "--only=jacks") == 1
    assert f"no jacks; there are {OURS}" in capsys.readouterr().err


def test_a_peer_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "experiments.benchmark.torch_steps", raising=False)
    with pytest.raises(Unavailable, match="torch is not installed"):
        worker.build(Case("torch", "eager", "plane2"), "")


# ----------------------------------------------------------------------------------- the arithmetic
def test_turns_alternate(canned):
    table = {"a": STEP, "gone": Case("jax", "table", "plane2"), "b": Case("jax", "alone", "plane2")}
    found = measure.measure(table, rounds=3, seconds=0.0, cores=[])
    assert Canned.turns == ["recomputing", "alone"] * 4  # the first turns do not count
    assert [len(found[name].seconds) for name in table] == [3, 0, 3]
    assert list(found) == list(table)


def test_ratios_are_those_of_rounds():
    over = Measured(STEP, seconds=[2.0, 6.0, 30.0, 4.0, 10.0])
    under = Measured(STEP, seconds=[1.0, 2.0, 10.0, 1.0, 2.0])
    assert compared.ratio(over, under) == Ratio(3.0, 3.0, 4.0)
    assert compared.ratio(Measured(STEP, seconds=[3.0]), Measured(STEP, seconds=[2.0])).low == 1.5


@pytest.mark.parametrize(
    ("limit", "at_least", "met"),
    [(2.0, True, True), (2.1, True, False), (2.0, False, True), (None, False, None)],
)
def test_targets_compare_the_best_of_each_side(limit, at_least, met):
    found = {
        "slow": Measured(STEP, seconds=[9.0]),
        "gone": Measured(STEP, missing="gone"),
        "fast": Measured(STEP, seconds=[4.0]),
        "theirs": Measured(STEP, seconds=[2.0]),
    }
    target = Target("", ("slow", "gone", "fast"), ("theirs",), limit, at_least)
    verdict = compared.judge(target, found)
    assert (verdict.over, verdict.ratio.median, verdict.met) == ("fast", 2.0, met)
    assert compared.judge(target._replace(under=("gone",)), found) is None


def test_targets_name_rows():
    for chain, row in cases.CHAINS.items():
        names = compared.rows(
            row, peer="torch", devices=2, dtype="float32", batch=8, matrix=8
        ).keys()
        for target in compared.targets(chain, 2):
            assert set(target.over) | set(target.under) <= names


def test_losses_are_compared_with_those_of_the_same_problem():
    def taught(framework, variant):
        return Case(framework, variant, "plane2", ("plane4",), 8)

    found = {
        OURS: Measured(STEP, losses=[2.0, 1.0]),
        DROP: Measured(taught("jax", "dropping"), losses=[9.0, 9.0]),
        TABLE: Measured(taught("jax", "table"), losses=[2.0, 1.0]),
        "gone": Measured(taught("jax", "recomputing"), missing="gone"),
        EAGER: Measured(taught("torch", "eager"), losses=[2.0, 1.0001]),
        "another step": Measured(Case("torch", "eager", "plane2"), losses=[1.0, 1.0]),
    }
    assert compared.fidelity(found) == {TABLE: 0.0, EAGER: pytest.approx(1e-4)}
    assert "DIFFER" in tables.fidelity_lines({EAGER: 1.1e-4})[0]
    assert "agree" in tables.fidelity_lines({EAGER: 0.9e-4})[0]


def test_operations_are_those_of_what_is_computed():
    found = {
        OURS: Measured(STEP, flops=7.0),
        EAGER: Measured(Case("torch", "eager", "plane2", ("plane4",), 8)),
        DROP: Measured(Case("jax", "dropping", "plane2", ("plane4",), 8), flops=5.0),
        TABLE: Measured(Case("jax", "table", "plane2", ("plane4",), 8), flops=3.0),
    }
    assert list(compared.operations(found).values()) == [7.0, 7.0, 5.0, 3.0]


def test_operations_of_a_network_by_hand():
    network, teacher = (models.build(name, 10, (32, 32, 3)) for name in ("plane2", "plane4"))
    by_hand = 2 * (32 * 32 * 16 * 9 * 3 + 16 * 16 * 16 * 9 * 16 + 8 * 8 * 16 * 10)
    assert flops.forward(network) == by_hand
    whole = 8 * (flops.forward(teacher) + 3 * by_hand)
    assert flops.step(network, (teacher,), 8) == whole
    assert flops.step(network, (teacher,), 8, kept=0.0) == flops.step(network, (), 8)


# The second has groups; in training, since outside it equal blocks are a loop, counted once.
@pytest.mark.parametrize(("name", "train"), [("plane2", False), ("cifar_resnext50", True)])
def test_operations_as_the_compiler_counts_them(name, train):
    network = models.build(name, 10, (32, 32, 3))
    variables = jax.eval_shape(network.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    # Lowered as for a GPU: on the CPU some convolutions are written with more products.
    run = traced_for("gpu", lambda v, x: network.apply(v, x, train=train)[0].logits)
    lowered = jax.jit(run).lower(variables, images)
    # It counts no products with the padding, and every addition besides.
    counted = lowered.cost_analysis()["flops"]
    assert counted == pytest.approx(flops.forward(network), rel=0.1)


def test_weights_and_images_are_the_same_everywhere():
    entries = [("bn2.weight", (3,)), ("bn1.weight", (3,))]
    drawn = cases.state_dict(entries, 0)
    assert np.all(np.abs(drawn["bn2.weight"]) < 0.4) and np.all(drawn["bn1.weight"] > 0.5)
    np.testing.assert_array_equal(cases.images(16), cases.images(16))
    assert cases.images(2050).shape == (2050, 32, 32, 3)
    np.testing.assert_array_equal(cases.labels(2050)[2048:], cases.labels(2048)[:2])
    order = cases.order(STEP, 9)
    assert order.max() == 63
    np.testing.assert_array_equal(order[8], order[0])


def test_slopes():
    assert growth.slope([32, 512], [1.0, 16.0]) == pytest.approx(1)
    assert growth.slope([1, 4], [3.0, 1.5]) == pytest.approx(-0.5)


def test_the_machine_is_described_without_its_name():
    about = machine.describe([0])
    assert about["cores used"] == 1 and about["jax"] == jax.__version__
    assert 0 <= about["cores busy before"] <= about["cores"]
    assert "1.5 cores" in machine.busy({**about, "cores busy before": 1.5})
    assert not machine.busy({**about, "cores busy before": 0.1})
    assert str(about["processor"]) in machine.one_line(about)
