"""A run as JSON objects, one a line."""

import io
import json

import pytest

import distill_jax
from distill_jax import report
from distill_jax.runs.results import StagesFailed

TINY = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ("plane4", "plane2"),
    "guidance": ("none", "chain"),
    "recipe": {"epochs": 2, "batch_size": 12},
}


class Stream(io.StringIO):
    """Keeps what it held each time that it was flushed."""

    def __init__(self):
        super().__init__()
        self.flushed = []

    def flush(self):
        self.flushed.append(self.getvalue())


def events_of(config, **arguments):
    stream, rows = Stream(), None
    try:
        rows = distill_jax.run(config, reporter=report.json_reporter(stream), **arguments).rows
    except StagesFailed as error:
        rows = error.results.rows
    lines = stream.getvalue().splitlines()
    assert [text.count("\n") for text in stream.flushed] == list(range(1, len(lines) + 1))

    def refuse(name):
        raise AssertionError(name)

    return [json.loads(line, parse_constant=refuse) for line in lines], rows


def test_every_event_says_what_and_when_and_of_which_stage(tmp_path):
    events, rows = events_of(TINY)
    names = [event["event"] for event in events]
    told = [name for name in names if name != "notice"]
    one = ["stage_started", "epoch", "epoch", "stage_ended"]
    assert told == ["run_started", *one * 3, "results"]
    assert events[-1]["rows"] == json.loads(json.dumps(rows))
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert all(event["time"].endswith("+00:00") for event in events)
    planned = {stage["stage"]: stage for stage in events[0]["stages"]}
    assert [stage["steps"] for stage in planned.values()] == [6] * 3
    assert {stage["done"] for stage in planned.values()} == {False}
    about = ("stage", "network", "teachers", "guidance", "seed")
    for event in events:
        if "stage" in event:
            assert all(event[name] == planned[event["stage"]][name] for name in about)
    by = {tuple(stage["teachers"]): stage for stage in planned.values() if stage["guidance"]}
    assert by["plane4",]["guidance"] == ["chain"]
    guidance = {(x["network"], *x["teachers"]): x["guidance"] for x in planned.values()}
    assert guidance == {
        ("plane2",): ["none"],
        ("plane4",): ["chain"],  # as a teacher
        ("plane2", "plane4"): ["chain"],
    }
    (last,) = [e for e in events if e["event"] == "stage_ended" and e["teachers"]]
    assert last["test_accuracy"] == rows[1]["test_accuracy"]


def test_what_fails_is_told_with_what_needed_it_and_numbers_are_json():
    config = {**TINY, "overrides": {"plane4": {"learning_rate": 1e30}}}
    events, _ = events_of(config)
    failed = [event for event in events if event["event"] == "failed"]
    assert [event["network"] for event in failed] == ["plane4", "plane2"]
    assert all("plane4, seed 0" in event["why"] for event in failed)
    assert [("failed" in row) for row in events[-1]["rows"]] == [False, True]


def test_a_number_that_is_not_finite_is_null():
    stream = io.StringIO()
    reporter = report.json_reporter(stream)
    reporter.run_ended([{"test_accuracy": float("nan"), "valid": {"loss": float("inf")}}])
    (row,) = json.loads(stream.getvalue())["rows"]
    assert row == {"test_accuracy": None, "valid": {"loss": None}}


def test_standard_output_is_where_it_goes(capsys):
    report.json_reporter().notice(["  a warning"])
    event = json.loads(capsys.readouterr().out)
    assert (event["event"], event["lines"]) == ("notice", ["a warning"])


@pytest.mark.parametrize("again", [False, True])
def test_what_was_finished_before_is_marked(tmp_path, again):
    if again:
        distill_jax.run(TINY, workdir=tmp_path, progress=False)
    events, _ = events_of(TINY, workdir=tmp_path)
    assert {stage["done"] for stage in events[0]["stages"]} == {again}
    assert ("epoch" in {event["event"] for event in events}) is not again
