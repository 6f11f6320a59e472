"""What is said while a run goes on: which stage of how many, and the time left of the whole run."""

import io
import types

import pytest
from rich.console import Console

import distill_jax
from distill_jax import models, report
from distill_jax.report.estimate import Estimate
from distill_jax.train import fit
from distill_jax.train.reporter import Planned, Several

TINY = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ("plane4", "plane2"),
    "guidance": ("none", "chain"),
    "recipe": {"epochs": 2, "batch_size": 12},
}


def said(reporter_of=report.console_reporter, terminal=False, width=80, config=TINY, **arguments):
    """What a run prints, line by line."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, markup=False)
    reporter = reporter_of(console)
    distill_jax.run(config, reporter=reporter, **arguments)
    reporter.close()
    return file.getvalue().splitlines()


# --------------------------------------------------------------------------------------- the counts
def test_a_log_counts_the_stages_of_the_run():
    lines = [line for line in said() if line.startswith("stage")]
    assert [line.partition(":")[0] for line in lines] == [
        f"stage {n} of 3" for n in (1, 1, 2, 2, 3, 3)
    ]
    assert lines[4].startswith("stage 3 of 3: plane2 taught by plane4, seed 0: 2 epochs, 6 steps")
    assert "test" in lines[5] and len(lines[0].split(": ")) == 3


def test_stages_that_train_at_once_are_counted_each():
    lines = said(config={**TINY, "guidance": ("none",), "seeds": (0, 1, 2), "population": 3})
    assert lines[0].startswith("stages 1-3 of 3: plane2, seeds 0, 1, 2: ")
    assert lines[-1].startswith("stage 3 of 3: plane2, seed 2: ")


def test_networks_that_teach_each_other_are_stages_of_their_own():
    lines = said(config={**TINY, "guidance": ("mutual",)})
    assert lines[0].startswith("stages 1-2 of 2: plane4+plane2 teaching each other, seed 0: ")


def test_stages_that_were_finished_before_are_counted_first(tmp_path):
    distill_jax.run({**TINY, "guidance": ("none",)}, workdir=tmp_path, progress=False)
    stopped = []

    def stop():
        return len(stopped) > 1

    class Stopper(report.Reporter):
        def progress(self, step, examples_per_second):
            stopped.append(step)

    with pytest.raises(fit.Interrupted):
        distill_jax.run(
            {**TINY, "guidance": ("chain", "none")}, workdir=tmp_path, reporter=Stopper(), stop=stop
        )
    lines = said(config={**TINY, "guidance": ("chain", "none")}, workdir=tmp_path)
    assert lines[0].startswith("stage 2 of 3: plane4, seed 0: 2 epochs, 6 steps, going on at step ")
    assert lines[-1].startswith("stage 3 of 3: plane2 taught by plane4, seed 0: ")


@pytest.mark.parametrize("width", [80, 140])
def test_a_terminal_shows_the_place_and_the_speed_in_lines_of_its_width(width):
    lines = said(terminal=True, width=width)
    text = "\n".join(lines)
    assert "stage 3 of 3: plane2 taught by plane4, seed 0" in text and "examples/s" in text
    assert "images/s" not in text and "epoch 2/2" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_console_cannot_show_ends_no_run(terminal):
    bytes_ = io.BytesIO()
    file = io.TextIOWrapper(bytes_, encoding="ascii", errors="strict")
    reporter = report.console_reporter(Console(file=file, force_terminal=terminal, width=80))
    reporter.notice(["the weight is \u03bbT\u00b2"])
    reporter.close()
    assert b"the weight is ?T?" in bytes_.getvalue()


# ------------------------------------------------------------------------------------ the time left
class Clock:
    """Seconds that a test says."""

    now = 0.0

    def __call__(self):
        return self.now


def group(name, stage_id, steps=10, epochs=1, teachers=(), cached=False, batch=8):
    """A stage as planned, of a network that is there."""
    network = models.build(name, 4, (8, 8, 1))
    stage = types.SimpleNamespace(
        id=stage_id,
        network=network,
        teachers=tuple(models.build(x, 4, (8, 8, 1)) for x in teachers),
        recipe=types.SimpleNamespace(epochs=epochs, batch_size=batch),
        structure=(name, teachers),
    )
    return Planned((stage,), (("none",),), steps, cached, done=False)


def train(estimate, clock, planned, seconds, start=5.0):
    """All steps of a stage, the first one after `start` seconds, each other after `seconds`."""
    stages = [stage for one in planned for stage in one.stages]
    estimate.stage_started(stages, 0)
    clock.now += start
    estimate.progress(1)
    for step in range(2, planned[0].steps * stages[0].recipe.epochs + 1):
        clock.now += seconds
        estimate.progress(step)


def test_stages_of_a_kind_that_was_timed_take_as_long():
    clock = Clock()
    estimate = Estimate(clock)
    planned = [group("plane2", str(i), steps=11) for i in range(4)]
    estimate.run_started(planned)
    estimate.stage_started(planned[0].stages, 0)
    assert estimate.seconds_left() is None
    train(estimate, clock, planned[:1], seconds=3.0, start=100.0)
    estimate.settle(planned[0].stages)
    assert estimate.seconds_left() == pytest.approx(3 * 11 * 3.0)
    estimate.stage_started(planned[1].stages, 4)  # goes on there
    assert estimate.seconds_left() == pytest.approx((7 + 2 * 11) * 3.0)
    assert estimate.words() == "about 1 min left of the run"
    estimate.settle([stage for one in planned[1:] for stage in one.stages])
    assert estimate.seconds_left() == 0


def test_stages_that_train_at_once_take_their_time_together():
    clock = Clock()
    estimate = Estimate(clock)
    planned = [group("plane2", str(i), steps=11) for i in range(6)]
    estimate.run_started(planned)
    train(estimate, clock, planned[:3], seconds=6.0)
    estimate.settle([stage for one in planned[:3] for stage in one.stages])
    assert estimate.seconds_left() == pytest.approx(11 * 6.0)


def test_stages_of_another_kind_take_their_flops_and_a_start():
    clock = Clock()
    estimate = Estimate(clock)
    small, large = group("plane2", "a", steps=11), group("plane6", "b", steps=11)
    taught = group("plane2", "c", steps=11, teachers=("plane6",))
    cached = group("plane2", "d", steps=11, teachers=("plane6",), cached=True)
    left = {}
    for name, other in (("large", large), ("taught", taught), ("cached", cached)):
        estimate = Estimate(clock)
        estimate.run_started([small, other])
        train(estimate, clock, [small], seconds=2.0, start=7.0)
        estimate.settle(small.stages)
        left[name] = estimate.seconds_left() - 7.0
    assert left["cached"] == pytest.approx(10 * 2.0)  # its first step is in the start
    # plane6 once and plane2 three times, against plane2 three times.
    assert left["taught"] == pytest.approx(left["large"] / 3 + left["cached"])
    assert left["large"] > 5 * left["cached"]


def test_nothing_is_foretold_of_far_more_work_than_was_timed():
    clock = Clock()
    small, large = group("plane2", "a", steps=11), group("plane2", "b", steps=11, batch=8 * 31)
    for planned, known in (([small, large], False), ([large, small], True)):
        estimate = Estimate(clock)
        for one in planned:
            one.stages[0].structure = one.stages[0].id
        estimate.run_started(planned)
        train(estimate, clock, planned[:1], seconds=2.0, start=7.0)
        estimate.settle(planned[0].stages)
        assert (estimate.seconds_left() is not None) == known
    estimate = Estimate(clock)
    estimate.run_started([small, large])
    train(estimate, clock, [small], seconds=2.0, start=7.0)
    estimate.settle(small.stages)
    estimate.stage_started(large.stages, 0)
    for step in (1, 2):
        clock.now += 60.0
        estimate.progress(step)
    assert estimate.seconds_left() == pytest.approx(9 * 60.0)  # timed itself


def test_nothing_is_said_of_the_time_before_it_is_known():
    clock = Clock()
    estimate = Estimate(clock)
    estimate.run_started([group("plane2", "a"), group("plane4", "b")])
    train(estimate, clock, estimate.planned[:1], seconds=0.1, start=1.0)
    assert estimate.words() == ""  # in the first ten seconds
    alone = Estimate(clock)
    alone.stage_started(estimate.planned[0].stages, 0)  # trained outside any run
    clock.now += 60
    alone.progress(1)
    assert alone.place(estimate.planned[0].stages) == ""
    assert alone.words() in ("", "about 1 s left of the run")


def test_a_stage_that_starts_again_keeps_its_number():
    estimate = Estimate(Clock())
    planned = [group("plane2", str(i)) for i in range(5)]
    estimate.run_started(planned)
    stages = [one.stages[0] for one in planned]
    estimate.stage_started(stages[:4], 0)
    assert estimate.place(stages[:4]) == "stages 1-4 of 5: "
    estimate.settle([stages[1]])
    estimate.stage_started([stages[0], *stages[2:4]], 3)
    assert estimate.place([stages[0], *stages[2:4]]) == "stages 1, 3-4 of 5: "


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"),
        (42, "42 s"),
        (710, "12 min"),
        (3 * 3600 + 1230, "3 h 20 min"),
        (30 * 3600, "30 h"),
        (5 * 86400, "5 days"),
    ],
)
def test_the_time_left_in_words(seconds, words):
    clock = Clock()
    estimate = Estimate(clock)
    planned = [group("plane2", "a", steps=3), group("plane2", "b", steps=3)]
    estimate.run_started(planned)
    train(estimate, clock, planned[:1], seconds=seconds / 3, start=10.0)
    estimate.settle(planned[0].stages)
    assert estimate.words() == f"about {words} left of the run"


def test_several_reporters_are_all_told_of_everything():
    told = []

    class Note(report.Reporter):
        def __getattribute__(self, name):
            return lambda *arguments: told.append((name, len(arguments)))

    every = Several(Note(), Note())
    hooks = [name for name in vars(report.Reporter) if not name.startswith("_")]
    counts = {name: getattr(report.Reporter, name).__code__.co_argcount - 1 for name in hooks}
    for name, count in counts.items():
        getattr(every, name)(*range(count))
    assert told == [(name, counts[name]) for name in hooks for _ in range(2)]
