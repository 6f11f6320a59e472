"""What a command line can say, and how it is refused: one line, before anything is compiled."""

import pytest

from distill_jax import main
from distill_jax.runs.config import FIELDS

QUICK = "--config=quickstart:smoke"
PROCESSES = ("--coordinator_address=localhost:1", "--num_processes=2")


def refused(capsys, *arguments):
    """Runs the command; its one line on standard error."""
    assert main.main(arguments) == 1
    output = capsys.readouterr()
    assert not output.out
    (line,) = output.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train"], ["train needs a config", "--config=FILE.py", "quickstart"]),
        (["train", "--config.recipe.epochs=3"], ["train needs a config"]),
        (["train", "--config"], ["--config is empty"]),
        (["train", QUICK, QUICK], ["one --config", "got 2"]),
        (["train", "--config=quickstrt"], ["no file quickstrt", "did you mean 'quickstart'?"]),
        (["train", "--config=none.py"], ["no file none.py", "quickstart"]),
        (["train", "--config=quickstart:smok"], ["'smok'", "did you mean 'smoke'?"]),
        (["train", QUICK, "word"], ["got 'word'", "--config.FIELD=VALUE"]),
        (["train", QUICK, "--config.recipe=5"], ["config.recipe is a section", "got '5'"]),
        (["train", QUICK, "--config.evolve={}"], ["config.evolve is a section"]),
        (["train", QUICK, "--config.recipe.epoch=3"], ["no such field", "epochs"]),
        (["train", QUICK, "--config.recipe.epochs=a"], ["config.recipe.epochs=a", "invalid"]),
        (["train", QUICK, "--wrkdir=x"], ["'wrkdir'", "workdir"]),
        (["train", QUICK, "--log=xml"], ["--log=xml", "auto|json"]),
        (["train", QUICK, "--num_processes=2"], ["go together", "None, 2 and None"]),
        (["train", QUICK, *PROCESSES, "--process_id=2"], ["below --num_processes", "got 2 of 2"]),
        (["train", QUICK, *PROCESSES, "--process_id=a"], ["--process_id is a whole", "got 'a'"]),
        (
            ["train", QUICK, "--coordinator_address=host", "--num_processes=2", "--process_id=0"],
            ["--coordinator_address is HOST:PORT", "got 'host'"],
        ),
        (
            ["train", QUICK, "--coordinator_address=auto", "--process_id=0"],
            ["--coordinator_address=auto stands alone"],
        ),
        (["train", QUICK, "--join_timeout=0"], ["--join_timeout is a whole number of 1 or more"]),
        (["trian"], ["no command 'trian'", "did you mean 'train'?", "show"]),
        (["show"], ["expected workdir, got none"]),
        (["show", "a", "b"], ["expected workdir, got 'a' 'b'"]),
        (["show", "nowhere"], ["no folder nowhere", "--workdir of a run"]),
        (["show", "."], ["not the folder of a run", "config.json"]),
        (["evaluate"], ["needs --weights"]),
        (["evaluate", "--weights=a.npz"], ["a.npz is a file", "--network"]),
        (["evaluate", "--weights=a.npz", "--network=plane2"], ["in no run", "--config"]),
        (
            ["evaluate", "--weights=a.npz", "--network=plain", QUICK],
            ["--network=plain", "plane"],
        ),
        (["evaluate", "--weights=a.npz", "--network=plane2", QUICK], ["a.npz"]),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line(arguments, parts, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *arguments)
    assert line.startswith("error: ") and all(part in line for part in parts), line
    assert not list(tmp_path.iterdir())


def files(folder):
    """Files that are no configs, by what is said of them."""
    texts = {
        "no_function.py": ("x = 1", "has no function get_config"),
        "number.py": ("get_config = lambda: 3", "gives a int: expected a ConfigDict"),
        "strict.py": ("def get_config(which): ...", "missing a required argument: 'which'"),
        "notes.txt": ("hello", "is no config: expected a .py file, or the folder of a run"),
        "package.json": ("{}", "is not the config.json of a run"),
        "broken.json": ("{", "cannot be read as the config of a run"),
        "misspelt.py": ("get_config = lambda: {'recepe': {}}", "did you mean 'recipe'?"),
    }
    for name, (text, _) in texts.items():
        (folder / name).write_text(text)
    return {folder / name: message for name, (_, message) in texts.items()}


def test_files_that_are_no_configs_are_refused(tmp_path, capsys):
    for path, message in files(tmp_path).items():
        line = refused(capsys, "train", f"--config={path}", f"--workdir={tmp_path / 'run'}")
        assert message in line and path.name in line or "recipe" in line, line
    line = refused(capsys, "plan", f"--config={tmp_path / 'package.json'}:smoke")
    assert "takes no arguments, got 'smoke'" in line


def test_the_help_has_every_field_within_eighty_columns(capsys):
    assert main.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for field in FIELDS:
        assert f"--config.{field.path} " in text
    for name, command in main.COMMANDS.items():
        assert main.main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"usage: distill_jax {name}" in text
        assert all(f"--{flag.name}" in text for flag in command.flags)


def test_the_commands_are_listed(capsys):
    for arguments in ([], ["--help"], ["help"], ["-h"]):
        assert main.main(arguments) == 0
        text = capsys.readouterr().out
        assert all(f"  {name}" in text for name in main.COMMANDS)
        assert max(map(len, text.splitlines())) <= 80
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("distill_jax ")
