"""A file of logits as a teacher: it teaches as the network does of which they are."""

import jax
import numpy as np
import pytest

import distill_jax
from distill_jax import data, models

DATA = {"name": "synthetic:8x8x1:4:96:32", "valid_fraction": 0.25}
CONFIG = {
    "dataset": DATA,
    "networks": ("logits_large", "logits_small"),
    "guidance": ("direct",),
    "recipe": {"epochs": 2, "batch_size": 12, "learning_rate": 0.05, "train_limit": 6},
    "overrides": {"logits_large": {"train_limit": 0}},
}


def pair(width):
    def build(classes, inputs):
        size = inputs.size // inputs.shape[0]

        def init(key):
            one, two = jax.random.split(key)
            a = 0.1 * jax.random.normal(one, (size, width))
            return {"params": {"a": a, "b": 0.1 * jax.random.normal(two, (width, classes))}}

        def apply(variables, x):
            return x.reshape(len(x), -1) @ variables["params"]["a"] @ variables["params"]["b"]

        return init, apply

    return build


@pytest.fixture(scope="module", autouse=True)
def networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.registry, "_REGISTERED", dict(models.registry._REGISTERED))
        models.register_network("logits_large", pair(16))
        models.register_network("logits_small", pair(4))
        yield


@pytest.fixture(scope="module")
def taught(tmp_path_factory, networks):
    """The results by the network itself, and a file of its logits in the order of the source."""
    config = {**CONFIG, "students": ("logits_large", "logits_small")}
    results = distill_jax.run(config, progress=False)
    pool = data.load(**{**DATA, "valid_fraction": 0.0})
    file = tmp_path_factory.mktemp("logits") / "teacher.npz"
    own = {
        part: results.logits(getattr(pool, part).images, network="logits_large")
        for part in ("train", "test")
    }
    np.savez(file, **own)
    return results, file, own


def by_file(file, **changes):
    networks = ("bert", "logits_small")
    config = {**CONFIG, "networks": networks, "overrides": {}, "teacher_weights": f"logits:{file}"}
    return distill_jax.run({**config, **changes}, progress=False)


def test_it_teaches_as_the_network_does(taught):
    results, file, _ = taught
    network, variables = results.networks["direct", "logits_small", 0]
    found = by_file(file)
    (row,) = found.rows
    expected = next(row for row in results.rows if row["network"] == "logits_small")
    assert row["teachers"] == ["bert"] and row["test_accuracy"] == expected["test_accuracy"]
    np.testing.assert_allclose(
        list(row["kl"].values()), list(expected["kl"].values()), rtol=1e-4, atol=1e-6
    )
    for own, others in zip(
        found.histories["direct", "logits_small", 0],
        results.histories["direct", "logits_small", 0],
        strict=True,
    ):
        assert own["train_kl"] == pytest.approx(others["train_kl"], rel=1e-4)
    given = found.networks["direct", "logits_small", 0][1]["params"]
    for name, leaf in variables["params"].items():
        np.testing.assert_allclose(given[name], leaf, rtol=1e-4, atol=1e-6)


def test_it_is_known_by_its_content(taught, tmp_path):
    _, file, own = taught
    copy, other = tmp_path / "copy.npz", tmp_path / "other.npz"
    np.savez(copy, **own)
    np.savez(other, train=own["train"] + 1.0, test=own["test"])
    ids = [by_file(x).rows[0]["stage"] for x in (file, other)]
    assert ids[0] != ids[1]


def test_it_stands_beside_networks(taught):
    _, file, _ = taught
    config = {"networks": ("bert", "logits_large", "logits_small"), "guidance": ("dense",)}
    (row,) = by_file(file, **config).rows
    assert row["teachers"] == ["bert", "logits_large"] and set(row["kl"]) == set(row["teachers"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"recipe": {"epochs": 1, "batch_size": 12, "augment": "crop_flip"}},
            "augment is 'crop_fl",
        ),
        ({"teacher_logits": "graph"}, "bert is a file of logits, .*teacher_logits is 'graph'"),
        ({"methods": {"kd": 1.0, "srrl": 1.0}}, "method 'srrl'"),
        ({"methods": {"bss": 1.0}}, "'bss'.* needs? .*bert"),
        ({"dataset": {**DATA, "valid_fraction": 0.0}, "selection": "last"}, None),
        ({"dataset": {**DATA, "name": "synthetic:8x8x1:4:90:32"}}, r"has float32 \(96, 4\) as 'tr"),
        ({"dataset": {**DATA, "name": "synthetic:8x8x1:3:96:32"}}, r"expected floats \(96, 3\)"),
    ],
)
def test_what_a_file_of_logits_cannot_do(taught, change, message):
    file = taught[1]
    if message is None:
        assert by_file(file, **change).rows[0]["teachers"] == ["bert"]
        return
    with pytest.raises(distill_jax.ConfigError, match=message) as caught:
        by_file(file, **change)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(taught, tmp_path):
    own = taught[2]
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"PK no zip")
    np.savez(tmp_path / "short.npz", train=own["train"])
    np.savez(tmp_path / "nan.npz", train=np.full_like(own["train"], np.nan), test=own["test"])
    np.save(tmp_path / "array.npy", own["train"])
    for name, message in (
        ("bad.npz", "bad.npz cannot be read"),
        ("gone.npz", "teacher_weights cannot be read"),
        ("short.npz", r"has none as 'test': expected floats \(32, 4\)"),
        ("nan.npz", "has logits in 'train' that are not finite"),
        ("array.npy", "array.npy cannot be read .*expected an .npz file"),
    ):
        with pytest.raises(distill_jax.ConfigError, match=message) as caught:
            by_file(tmp_path / name)
        assert "\n" not in str(caught.value)
