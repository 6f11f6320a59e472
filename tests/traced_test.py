"""What was traced is found by a later process, gives the same bytes, and is checked when read."""

import shutil

import cli
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distill_jax
from distill_jax import traced
from distill_jax.commands.train import use_compilation_cache

CONFIG = """
from distill_jax import default_config

def get_config():
    config = default_config()
    config.dataset.update(name="synthetic:8x8x1:4:48:32", valid_fraction=0.25)
    config.networks, config.guidance = ("plane2",), ("none",)
    config.recipe.update(epochs=1, batch_size=12, augment="crop_flip")
    return config
"""


@pytest.fixture
def folder(tmp_path):
    """Where what is traced is kept while a test lasts."""
    traced.keep_in(tmp_path / "traced")
    yield tmp_path / "traced"
    traced.keep_in(None)


class Traced:
    """A program of its own for every process that would call it, and how often it was traced."""

    def __init__(self, key="x + y", **options):
        self.key, self.options, self.times = key, options, 0

    def new(self):
        """The program as a process has it that has just started."""

        def add(x, y):
            self.times += 1
            return {"sum": x + y, "twice": (2 * y,)}

        return traced.Program(add, self.key, **self.options)


def x():
    return jnp.arange(3.0)


def flip(path):
    """Changes the last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_what_one_process_traced_another_does_not(folder):
    add = Traced()
    first, second = (add.new()(x(), np.float32(2)) for _ in range(2))
    assert add.times == 1
    assert second["sum"].tolist() == first["sum"].tolist() == [2, 3, 4]
    assert float(second["twice"][0]) == 4
    assert add.new()(jnp.arange(4.0), np.float32(2))["sum"].shape == (4,) and add.times == 2


def test_without_a_key_nothing_is_kept(folder):
    one, other = (traced.Program(f, None) for f in (lambda x: x + 1, lambda x: x - 1))
    assert one(x()).tolist() == [1, 2, 3] and other(x()).tolist() == [-1, 0, 1]
    assert not list(folder.iterdir())


def test_shapes_are_kept_too(folder):
    add = Traced()
    first, second = (add.new().shapes(x(), jax.random.key(0)[None].shape[0] * x()) for _ in "ab")
    assert add.times == 1 and first == second
    assert second["sum"] == jax.ShapeDtypeStruct((3,), jnp.float32)


@pytest.mark.parametrize("devices", [1, 2])
def test_keys_over_devices_stay_keys(folder, devices):
    mesh = jax.make_mesh((devices,), ("devices",))
    given = jax.random.key(3), jnp.arange(4.0)
    rows = jax.NamedSharding(mesh, jax.P("devices"))
    given = jax.device_put(given, (jax.NamedSharding(mesh, jax.P()), rows))
    times = []

    def drawn(key, x):
        times.append(key)
        return jax.random.fold_in(key, 1), x + jax.random.normal(key, x.shape)

    first, second = (traced.Program(drawn, "drawn")(*given) for _ in range(2))
    assert len(times) == 1
    expected = jax.jit(drawn)(*given)
    for key, noisy in (first, second):
        assert key.dtype == expected[0].dtype and noisy.sharding == rows
        assert jax.random.key_data(key).tolist() == jax.random.key_data(expected[0]).tolist()
        assert noisy.tolist() == expected[1].tolist()


def test_what_is_donated_is_given_up(folder):
    add = Traced(donated=1)
    for _ in range(2):
        given, kept = x(), x()
        add.new()(given, kept)
        assert given.is_deleted() and not kept.is_deleted()
    assert add.times == 1


@pytest.mark.parametrize("damage", ["flipped", "cut", "another's"])
def test_a_damaged_entry_is_warned_of_and_written_anew(folder, damage, caplog):
    add = Traced()
    add.new()(x(), x())
    (entry,) = folder.iterdir()
    if damage == "flipped":
        flip(entry)
    elif damage == "cut":
        entry.write_bytes(entry.read_bytes()[:10])
    else:
        Traced("other").new()(x(), x())
        (other,) = set(folder.iterdir()) - {entry}
        shutil.copy(other, entry)
    for _ in range(2):
        assert add.new()(x(), x())["sum"].tolist() == [0, 2, 4]
    assert add.times == 2
    assert caplog.text.count("is damaged, or is another's") == 1 and str(entry) in caplog.text


@pytest.mark.parametrize("changed", ["versions", "flags", "setting", "key", "options"])
def test_what_was_traced_elsewhere_is_passed_over(folder, changed, monkeypatch):
    add = Traced()
    add.new()(x(), x())
    if changed == "versions":
        monkeypatch.setattr(traced.importlib.metadata, "version", lambda name: "0.0")
    elif changed == "flags":
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    elif changed == "key":
        add.key = "other"
    elif changed == "options":
        add.options = {"donated": 1}
    traced._surroundings.cache_clear()
    precision = "float32" if changed == "setting" else None
    with jax.default_matmul_precision(precision):
        add.new()(x(), x())
    traced._surroundings.cache_clear()
    assert add.times == 2 and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("", []),  # as JAX takes it: nothing is kept
        ("gs://bucket/compiled", ["run/compiled/traced"]),
        ("elsewhere", ["elsewhere/traced"]),
    ],
)
def test_it_is_kept_beside_what_is_compiled(folder, given, kept, tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", given)
    traced.keep_in(None)
    folder.rmdir()
    try:
        jax.config.update("jax_compilation_cache_dir", given)
        use_compilation_cache(tmp_path / "run")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("traced")] == kept


def test_code_of_others_is_not_kept(folder):
    add = Traced(("step", lambda: 0))
    for _ in range(2):
        add.new()(x(), x())
    assert add.times == 2 and not list(folder.iterdir())


def test_a_folder_that_others_may_write_to_is_not_used(folder, caplog):
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    traced.keep_in(folder)
    assert "others may write to it" in caplog.text and "chmod 700" in caplog.text
    add = Traced()
    add.new()(x(), x())
    assert not list(folder.iterdir())


def test_a_full_disk_stops_nothing(folder, monkeypatch, caplog):
    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(traced.os, "replace", full)
    assert Traced().new()(x(), x())["sum"].tolist() == [0, 2, 4]
    assert "No space left" in caplog.text and not list(folder.iterdir())


def test_training_gives_the_same_bytes_with_it_and_without(folder):
    config = {
        "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
        "networks": ("plane4", "plane2"),
        "guidance": ("direct",),
        "recipe": {"epochs": 1, "batch_size": 12},
    }
    kept = [row["state_digest"] for row in distill_jax.run(config, progress=False).rows]
    assert list(folder.iterdir())
    traced.keep_in(None)
    assert kept == [row["state_digest"] for row in distill_jax.run(config, progress=False).rows]


def test_commands_share_what_was_traced_and_pass_over_what_is_damaged(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)

    def run(name):
        workdir, log = tmp_path / name, tmp_path / f"{name}.log"
        arguments = [f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}"]
        assert cli.ended(cli.start(arguments, log, quickly=True)) == 0, log.read_text()
        entries = {path.name: path.stat().st_mtime_ns for path in kept(name).iterdir()}
        return cli.outcome(workdir), entries, log.read_text()

    def kept(name):
        return tmp_path / name / "compiled" / "traced"

    outcome, entries, _ = run("first")
    assert entries
    for name, times in (("second", 0), ("damaged", len(entries))):
        shutil.copytree(tmp_path / "first" / "compiled", tmp_path / name / "compiled")
        for entry in kept(name).iterdir() if times else ():
            flip(entry)
        again, entries_again, log = run(name)
        assert again == outcome and log.count("is damaged") == times, log
        assert entries_again.keys() == entries.keys()
        assert times or entries_again == entries  # nothing was written
