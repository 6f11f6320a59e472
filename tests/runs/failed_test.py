"""Stages that cannot be trained to the end: the others are, and every file says what is known."""

import json

import cli
import pytest

import distill_jax
from distill_jax import main
from distill_jax.report import Reporter, summarise
from distill_jax.runs.results import StagesFailed
from distill_jax.runs.run_record import read_record

BASE = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ("plane2",),
    "guidance": ("none",),
    "recipe": {"epochs": 1, "batch_size": 12},
}
SWEEP = {"sweep": {"learning_rate": (1e30, 0.02)}}


class Heard(Reporter):
    """What is told."""

    def __init__(self, folder=None):
        self.lines, self.files, self.folder = [], [], folder

    def notice(self, lines):
        """Kept."""
        self.lines += lines

    def stage_ended(self, stage, record):
        """What results.json holds then."""
        if self.folder is not None:
            self.files.append(json.loads((self.folder / "results.json").read_text()))


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_value_that_diverges_is_a_marked_row_and_the_other_is_trained(tmp_path, at_once):
    heard = Heard(tmp_path)
    with pytest.raises(StagesFailed, match=r"none, learning_rate=1e\+30: plane2, seed 0") as caught:
        distill_jax.run({**BASE, **SWEEP, "population": at_once}, workdir=tmp_path, reporter=heard)
    alone = distill_jax.run({**BASE, "recipe": {**BASE["recipe"], "learning_rate": 0.02}}).rows[0]
    failed, trained = caught.value.results.rows
    assert trained["state_digest"] == alone["state_digest"] and "failed" not in trained
    assert "not finite" in failed["failed"] and failed["changes"] == {"learning_rate": 1e30}
    assert "test_accuracy" not in failed
    assert any("failed: none, learning_rate=1e+30" in line for line in heard.lines)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [row.get("failed", "") for row in saved] == [failed["failed"], ""]
    lines = {line["guidance"]: line for line in summarise(caught.value.results.rows)}
    assert lines["none, learning_rate=1e+30"]["accuracy"] is None
    assert lines["none, learning_rate=1e+30"]["failed"] == 1
    assert lines["none, learning_rate=0.02"]["failed"] == 0


def test_those_whom_a_failed_stage_teaches_fail_with_it_and_no_others(tmp_path, capsys):
    heard = Heard(tmp_path)
    config = {
        **BASE,
        "networks": ("plane4", "plane2"),
        "guidance": ("none", "direct"),
        "overrides": {"plane4": {"learning_rate": 1e30}},
    }
    with pytest.raises(StagesFailed) as caught:
        distill_jax.run(config, workdir=tmp_path, reporter=heard)
    rows = {row["guidance"]: row for row in caught.value.results.rows}
    assert rows["direct"]["failed"].startswith("plane4, seed 0") and "failed" not in rows["none"]
    plans = json.loads((tmp_path / "run.json").read_text())["stages"]
    lost = {x["network"]: x["stage"] for x in plans if "direct" in x["guidance"]}
    assert sorted(rows["direct"]["failed_stages"]) == sorted(lost.values()) and len(lost) == 2
    assert read_record(tmp_path).lost == set(lost.values())
    assert main.main(["show", str(tmp_path)]) == 0
    *_, done, why, started = capsys.readouterr().out.splitlines()  # each in one line
    assert done == "1 of 3 stages are done, 2 failed; no run is at work here"
    assert why.startswith("  failed: plane4, seed 0: step ") and started.startswith("started ")
    # After each stage the file is whole: first what is known of one, then of both.
    assert [[row["guidance"] for row in rows] for rows in heard.files] == [["none"]]
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2


def test_the_command_shows_the_table_and_ends_with_one(tmp_path):
    (tmp_path / "config.py").write_text(
        "from distill_jax import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.dataset.update(**{BASE['dataset']})\n"
        "    config.networks, config.guidance = ('plane2',), ('none',)\n"
        "    config.recipe.update(epochs=1, batch_size=12)\n"
        f"    config.sweep = {SWEEP['sweep']}\n"
        "    return config\n"
    )
    done = cli.run(f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "failed" in done.stdout and "none, learning_rate=0.02" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: none, learning_rate=1e+30: plane2")
