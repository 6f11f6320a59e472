"""How many devices share a batch where nobody says."""

import cli
import pytest

import distill_jax
from distill_jax.train import devices
from distill_jax.train.stage import Recipe

pytestmark = pytest.mark.cpu  # the rule goes by the platform

CONFIG = {
    "dataset": {"name": "synthetic:8x8x1:4:384:32", "valid_fraction": 0.25},
    "networks": ("plane4", "plane2"),
    "guidance": ("direct",),
    "recipe": {"epochs": 1, "batch_size": 128},
}


@pytest.fixture
def cores(monkeypatch):
    """Sets how many there are."""
    return lambda count: monkeypatch.setattr(devices, "cores", lambda: count)


@pytest.mark.parametrize(
    ("platform", "there", "batch", "expected"),
    [
        ("cpu", 1, 128, 1),
        ("cpu", 2, 128, 2),
        ("cpu", 64, 512, 2),  # of more it was not measured that they pay
        ("cpu", 2, 126, 2),
        ("cpu", 2, 129, 1),
        ("cpu", 2, 50, 2),
        ("cpu", 2, 30, 1),
        ("gpu", 8, 1024, 8),
        ("gpu", 8, 512, 1),
        ("tpu", 4, 1026, 1),
    ],
)
def test_the_rule(platform, there, batch, expected):
    assert devices.devices_for([Recipe(batch_size=batch)], platform, there) == expected


def decided(**changes):
    return distill_jax.resolve({**CONFIG, **changes}).topology.devices


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": {"batch_size": 30}},
        {"recipe": {"batch_size": 128, "last_batch": "keep"}},
        {"recipe": {"batch_size": 128, "sync_bn": False}},
        {"overrides": {"plane4": {"batch_size": 16}}},
        {"controls": {"small": {"batch_size": 16}}},
        {"phases": ({"batch_size": 16},)},
        {"sweep": {"batch_size": (128, 16)}},
    ],
)
def test_every_stage_has_to_gain(cores, changes):
    cores(2)
    assert decided() == decided(devices="auto") == 2
    assert decided(**changes) == 1


def test_code_of_somebody_has_one_device_unless_more_are_asked_for(cores):
    class Own(distill_jax.methods.KD):
        """Another."""

    cores(2)
    distill_jax.register_method("devices_own", Own())
    assert decided(methods={"devices_own": 1.0}) == 1
    assert decided(methods={"devices_own": 1.0}, devices=2) == 2
    assert decided(overrides={"plane2": {"methods": {"devices_own": 1.0}}}) == 1


def test_it_is_said_and_recorded_and_a_number_is_a_number_as_text_too(tmp_path):
    (tmp_path / "config.py").write_text(
        "import json\nfrom distill_jax.train import devices\n"
        "def get_config():\n    devices.cores = lambda: 2\n"
        f"    return {CONFIG!r}\n"
    )
    given = f"--config={tmp_path / 'config.py'}"
    for value, count in (("auto", 2), ("1", 1), ("2", 2)):
        folder = tmp_path / value
        done = cli.run(given, f"--workdir={folder}", f"--config.devices={value}", quickly=True)
        assert done.returncode == 0, done.stderr
        assert ("2 devices share each batch" in done.stdout) == (count == 2)
        saved = distill_jax.load_config(str(folder)).devices
        assert saved == ("auto" if value == "auto" else count)
        text = (folder / "config.json").read_text()
        assert f'"devices": {count}' in text.partition('"topology"')[2]
        assert distill_jax.load(folder).rows
    assert decided(devices="2") == 2


@pytest.mark.parametrize("value", ["some", "-1", 1.5, True, None, "2.0"])
def test_what_is_no_number_of_devices_is_refused(value):
    with pytest.raises(distill_jax.ConfigError, match="devices is a number .*, or 'auto', got"):
        decided(devices=value)
