"""Several processes on this machine give what one with as many devices does, and end together."""

import collections
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import cli
import pytest
from marks import slow

from distill_jax import processes

CONFIG = """
from distill_jax import default_config

def get_config():
    config = default_config()
    config.dataset.update(name="synthetic:8x8x1:4:48:32", valid_fraction=0.25)
    config.networks, config.guidance = ("plane4", "plane2"), ("chain",)
    config.recipe.update(epochs=2, batch_size=12, augment="crop_flip")
    config.checkpoint_every, config.devices = "1 step", 0
"""
CASES = {
    "alone": """
    config.networks, config.guidance = ("plane2",), ("none",)
""",
    "takd": "",
    "dgkd": """
    config.networks, config.guidance = ("plane6", "plane4", "plane2"), ("dense+drop",)
    config.dropping.update(kind="bernoulli", survival=0.5)
""",
    "cycle": """
    config.guidance = ("mutual",)
""",
    "teskd": """
    config.networks, config.guidance = ("evolving:plane4",), ("none",)
""",
    "memory": """
    config.methods = {"kd": 1.0, "crd": 0.8}
    config.method_options = {"crd": {"negatives": 8}}
""",
    "population": """
    config.seeds, config.recipe.augment = (0, 1), "none"
""",
}
STREAMING = str(pathlib.Path(__file__).with_name("streaming.py"))
WORDS = "[Gloo]"  # begins a line that the library of the CPU's collectives prints


class Run:
    """A command, alone or in two processes, in a working directory."""

    def __init__(self, folder, case, *arguments):
        self.folder, self.arguments = folder, arguments
        self.workdir, self.config = folder / "run", folder / "config.py"
        self.config.write_text(f"{CONFIG}{CASES[case]}    return config\n")

    def _arguments(self):
        return [f"--config={self.config}", f"--workdir={self.workdir}", *self.arguments]

    def alone(self, devices=2):
        """Runs in one process; what it gives."""
        log = self.folder / "log"
        process = cli.start(self._arguments(), log, shared=True, devices=devices)
        assert cli.ended(process) == 0, log.read_text()
        return cli.outcome(self.workdir)

    def start(self, devices=1, own=((), ())):
        """Starts two processes, each with arguments of its own besides; their logs are new."""
        address = f"--coordinator_address=localhost:{free_port()}"
        given = [*self._arguments(), address, "--num_processes=2"]
        self.logs = [self.folder / f"log{i}" for i in (0, 1)]
        for log in self.logs:
            log.unlink(missing_ok=True)
        return [
            cli.start(
                [*given, f"--process_id={i}", *own[i]], self.logs[i], shared=True, devices=devices
            )
            for i in (0, 1)
        ]

    def together(self, **options):
        """Runs in two processes; what they give."""
        assert self.codes(self.start(**options)) == [0, 0], self.logs[0].read_text()
        return cli.outcome(self.workdir)

    def codes(self, started):
        """The exit codes of processes that end."""
        return [cli.ended(process) for process in started]

    def said(self, i):
        """The lines that process `i` printed."""
        lines = self.logs[i].read_text().splitlines()
        return [line for line in lines if not line.startswith(WORDS)]

    def wait_for_a_checkpoint(self, started):
        """Waits until something was saved."""
        while not list(self.workdir.glob("stages/*/progress/*/arrays")):
            assert all(process.is_alive() for process in started), self.said(0)
            time.sleep(0.02)


def free_port():
    """A port that nobody uses."""
    with contextlib.closing(socket.socket()) as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def last_words(log):
    """The line that says what ended a process; where JAX ended it, it comes a moment later."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if lines := [x for x in log.read_text().splitlines() if x.startswith("error: ")]:
            return lines[-1]
        time.sleep(0.05)
    pytest.fail(log.read_text())


@pytest.fixture
def run_of(tmp_path):
    """Makes a `Run` in a folder of its own."""

    def make(case, name="several", *arguments):
        folder = tmp_path / name
        folder.mkdir()
        return Run(folder, case, *arguments)

    return make


def test_two_processes_that_a_signal_to_one_stops_go_on_to_what_one_process_gives(run_of):
    run = run_of("alone")
    started = run.start()
    run.wait_for_a_checkpoint(started)
    os.kill(started[1].pid, signal.SIGTERM)
    assert run.codes(started) == [128 + signal.SIGTERM] * 2, run.said(0)
    text = " ".join(" ".join(run.said(0)).split())  # lines are broken at 80 columns
    assert "goes on from there" in text and not run.said(1)
    assert run.together() == run_of("alone", "in_one").alone()
    assert not run.said(1)


def test_what_two_processes_cannot_do_is_a_line(run_of):
    run = run_of("alone", "pmap", "--config.parallel=pmap")
    assert run.codes(run.start()) == [1, 1]
    expected = "error: parallel is 'pmap' with 2 processes: expected 'jit'"
    assert [len(run.said(i)) for i in (0, 1)] == [1, 1], run.said(0)
    assert all(run.said(i)[0].startswith(expected) for i in (0, 1))
    assert not run.workdir.exists() or not list(run.workdir.glob("*.json"))


@pytest.mark.parametrize(
    ("case", "devices"), slow(*((case, 1) for case in CASES), ("dgkd", 2), ("population", 2))
)
def test_two_processes_give_what_one_with_as_many_devices_does(run_of, case, devices):
    expected = run_of(case, "alone").alone(2 * devices)
    found = run_of(case).together(devices=devices)
    if devices == 1:
        assert found == expected
    else:  # sums over devices are taken in each process first
        assert_alike(found, expected)


def assert_alike(found, expected, name=""):
    """The same but for rounding, and for the digests of what was rounded."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key in expected.keys() - {"state_digest"}:
            assert_alike(found[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), name
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_alike(*pair, f"{name}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), name
    else:
        assert found == expected, name


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_other_and_the_same_command_goes_on(run_of, lost):
    run = run_of("dgkd")
    started = run.start()
    run.wait_for_a_checkpoint(started)
    os.kill(started[lost].pid, signal.SIGKILL)
    begun = time.monotonic()
    codes = run.codes(started)
    assert time.monotonic() - begun < 60
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] not in (0, None)
    text = last_words(run.logs[1 - lost])
    assert "has lost another one" in text or "a process was lost" in text
    assert run.together() == run_of("dgkd", "alone").alone()


@pytest.mark.slow
def test_another_number_of_processes_goes_on(run_of):
    longer = "--config.recipe.epochs=8"  # so that the signal comes before the end
    run = run_of("takd", "several", longer)
    started = run.start()
    run.wait_for_a_checkpoint(started)
    os.kill(started[0].pid, signal.SIGINT)
    assert run.codes(started) == [128 + signal.SIGINT] * 2
    rows, epochs = run.alone(devices=2)
    assert (rows, epochs) == run_of("takd", "alone", longer).alone()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "own", "part"),
    [
        ((), ((), ("--config.recipe.batch_size=6",)), "recipe.batch_size is 12 there and 6 here"),
        ((), ((), ("--config.dataset.name=folder:/none",)), "/none"),
        (("--config.recipe.batch_size=9",), ((), ()), "a batch of 9 is not divisible by 2 devices"),
        ((), ((), ("--workdir=/elsewhere",)), "elsewhere is not that of process 0"),
        (("--config.devices=1",), ((), ()), "config.devices is 1, which is 1 here"),
    ],
)
def test_processes_that_are_not_alike_are_refused_by_all(run_of, arguments, own, part):
    run = run_of("takd", "several", *arguments)
    assert run.codes(run.start(own=own)) == [1, 1], run.said(0)
    assert all(part in "\n".join(run.said(i)) for i in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("alone", [0, 1])
def test_a_process_without_the_others_ends_in_words(run_of, alone):
    run = run_of("takd")
    address = f"--coordinator_address=localhost:{free_port()}"
    arguments = [f"--config={run.config}", address, "--num_processes=2", "--join_timeout=3"]
    log = run.folder / "log"
    code = cli.ended(cli.start([*arguments, f"--process_id={alone}"], log, shared=True))
    assert code not in (0, None)
    line = last_words(log)
    assert log.read_text().count("\nerror: ") + log.read_text().startswith("error: ") == 1
    assert "did not find each other" in line and "within 3 seconds" in line


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_each_process_reads_its_share_of_streamed_images(workers):
    if workers != "0":
        pytest.importorskip("grain")

    def started(devices, workers, *joined):
        command = [sys.executable, STREAMING, str(devices), workers, *joined]
        environment = {**os.environ, "XLA_FLAGS": cli.flags()}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def given(process):
        line = process.communicate(timeout=600)[0].splitlines()[-1]
        return json.loads(line.removeprefix("RESULT "))

    address = f"localhost:{free_port()}"
    both = [started(1, workers, address, "2", str(i)) for i in (0, 1)]
    first, second = map(given, both)
    whole = given(started(2, "0"))
    assert first["rows"] == second["rows"] == whole["rows"]
    if workers != "0":  # which do not tell what they read
        return
    # Two epochs of 40 images come last; before them, each looks at the first batch of all.
    train = [collections.Counter(one["read"][-40:]) for one in (first, second)]
    assert set((train[0] + train[1]).values()) == {2} and (train[0] + train[1]).keys() == set(
        range(40)
    )
    assert len(second["read"]) < len(whole["read"])


SLURM = dict.fromkeys(processes.SLURM, "0")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({**SLURM, "SLURM_NTASKS": "2"}, True),
        ({**SLURM, "SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}, False),  # a script that starts no tasks
        ({processes.OPEN_MPI: "2"}, True),
        ({processes.OPEN_MPI: "1"}, False),
        ({processes.TPU_HOSTS: "t1k-0,t1k-1"}, True),
        ({processes.TPU_HOSTS: "localhost"}, False),
    ],
)
def test_a_launcher_is_known_by_its_environment(monkeypatch, environment, expected):
    for name in (*processes.SLURM, processes.OPEN_MPI, processes.TPU_HOSTS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.is_launched() == expected
