"""The notebooks: each is what its script says, shows pictures, and runs from a fresh kernel."""

import base64
import re

import cli
import nbclient
import nbformat
import pytest

from experiments import notebooks
from experiments.notebooks import __main__ as runner

BYTES = 300_000
FOREIGN = re.compile(r"/(home|root|tmp|usr|work|Users)/|Warning|WARNING|Traceback|examples/s")


def kept(name):
    return nbformat.read(runner.FOLDER / f"{name}.ipynb", as_version=4)


def texts(notebook):
    """All that its cells have printed or shown as text."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            yield output.get("text", "")
            data = output.get("data", {})
            yield from (str(data[kind]) for kind in data if kind.startswith("text/"))


def test_every_notebook_is_listed():
    scripts = {path.stem for path in runner.FOLDER.glob("[!_]*.py")}
    assert scripts == {path.stem for path in runner.FOLDER.glob("*.ipynb")} == set(runner.NAMES)
    assert len(runner.NAMES) == len(scripts) == 5 and notebooks.__doc__


@pytest.mark.parametrize("name", runner.NAMES)
def test_a_notebook_has_the_cells_of_its_script(name):
    cells = [
        [(cell.cell_type, cell.source) for cell in notebook.cells]
        for notebook in (kept(name), runner.source(name))
    ]
    assert cells[0] == cells[1], f"python -m experiments.notebooks {name}"
    assert sum(kind == "code" for kind, _ in cells[0]) > 2


@pytest.mark.parametrize("name", runner.NAMES)
def test_a_notebook_keeps_its_pictures_and_nothing_of_the_machine(name):
    notebook = kept(name)
    nbformat.validate(notebook)
    assert (runner.FOLDER / f"{name}.ipynb").stat().st_size < BYTES
    assert notebook.metadata == runner.METADATA
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]  # top to bottom
    assert not any(cell.metadata for cell in notebook.cells)
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert not [text for text in texts(notebook) if FOREIGN.search(text)]
    pictures = [x.data["image/png"] for x in outputs if "image/png" in x.get("data", {})]
    shown = sum("plt.show()" in cell.source for cell in code)
    assert len(pictures) == shown >= 1
    assert all(base64.b64decode(x).startswith(b"\x89PNG") for x in pictures)


def test_a_cell_that_fails_fails_the_run(tmp_path, monkeypatch):
    (tmp_path / "wrong.py").write_text("# %%\n1 / 0\n")
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        runner.executed("wrong")


def test_a_notebook_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit):
        runner.main(["the_ideas"])
    assert "no notebook the_ideas: there are the_idea, " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", runner.NAMES)
def test_a_notebook_runs_from_a_fresh_kernel(name, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", cli.flags())  # a user's machine is not cut into four devices
    notebook = runner.executed(name)
    kinds = {output.output_type for cell in notebook.cells for output in cell.get("outputs", ())}
    assert "error" not in kinds and "display_data" in kinds
