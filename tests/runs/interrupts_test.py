"""Ctrl-C in a run that was called from Python."""

import signal
import threading

import pytest

import distill_jax
from distill_jax.report import Reporter
from distill_jax.train import fit

TINY = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ("plane4", "plane2"),
    "guidance": ("none", "chain"),
    "recipe": {"epochs": 2, "batch_size": 12},
}


class Interrupter(Reporter):
    """Sends SIGINT in the middle of the second stage, once or more often."""

    def __init__(self, times=1):
        self.times, self.started, self.lines = times, 0, []

    def stage_started(self, stages, step, steps, histories):
        self.started += 1

    def notice(self, lines):
        self.lines += lines

    def progress(self, step, examples_per_second):
        if self.started == 2:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def own_handler():
    """A handler that is to be there again afterwards."""
    before = signal.getsignal(signal.SIGINT)

    def mine(number, frame):
        raise AssertionError("the handler of before was called")

    signal.signal(signal.SIGINT, mine)
    yield
    assert signal.getsignal(signal.SIGINT) is mine
    signal.signal(signal.SIGINT, before)


def test_with_a_workdir_it_saves_and_the_same_call_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="the same call goes on") as caught:
        distill_jax.run(TINY, workdir=tmp_path, reporter=Interrupter())
    assert isinstance(caught.value, fit.Interrupted) and str(tmp_path) in str(caught.value)
    resumed = Interrupter(0)
    rows = distill_jax.run(TINY, workdir=tmp_path, reporter=resumed).rows
    assert resumed.started == 2  # the first stage was finished
    whole = distill_jax.run(TINY, progress=False).rows
    assert [row["state_digest"] for row in rows] == [row["state_digest"] for row in whole]


def test_without_a_workdir_it_gives_what_is_finished():
    interrupter = Interrupter()
    results = distill_jax.run(TINY, reporter=interrupter)
    assert results.interrupted and "interrupted" in repr(results)
    assert [row["guidance"] for row in results.rows] == ["none"]
    assert "1 of 3 stages are finished" in interrupter.lines[-1]
    assert not distill_jax.run({**TINY, "guidance": "none"}, progress=False).interrupted


def test_a_second_one_ends_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        distill_jax.run(TINY, workdir=tmp_path, reporter=Interrupter(2))
    assert not isinstance(caught.value, fit.Interrupted)


def test_one_that_comes_when_all_is_done_is_not_lost(tmp_path):
    class Late(Reporter):
        def run_ended(self, rows):
            signal.raise_signal(signal.SIGINT)

    config = {**TINY, "guidance": "none"}
    with pytest.raises(fit.Interrupted):
        distill_jax.run(config, workdir=tmp_path, reporter=Late())
    results = distill_jax.run(config, reporter=Late())
    assert results.interrupted and len(results.rows) == 1


def test_a_run_that_is_told_when_to_stop_leaves_the_signal_alone():
    with pytest.raises(AssertionError, match="of before"):
        distill_jax.run(TINY, reporter=Interrupter(), stop=lambda: False)


def test_a_run_in_another_thread_leaves_it_alone_too():
    done = []

    def work():
        done.append(distill_jax.run({**TINY, "guidance": "none"}, progress=False))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(done[0].rows) == 1


def test_who_ignores_it_goes_on(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        results = distill_jax.run(TINY, reporter=Interrupter())
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert not results.interrupted and len(results.rows) == 2


def test_progress_is_shown_unless_it_is_not_wanted(capsys):
    config = {**TINY, "guidance": "none"}
    distill_jax.run(config)
    assert "stage 1 of 1: plane2, seed 0" in capsys.readouterr().out
    distill_jax.run(config, progress=False)
    distill_jax.run(config, reporter=Reporter())
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == ""
