"""The page on protocols: its tables are the computed ones, its options are options."""

import ast
import re

import numpy as np
import pytest

from distill_jax.methods import Hyper
from distill_jax.runs import config
from experiments import protocols
from experiments.protocols import Setting

TEXT = protocols.PAGE.read_text("utf-8")


def by_hand(setting, protocol):
    """(weight of CE, weight of all KLs), from the words of the page."""
    weight, temperature, classes, teachers, kept = setting[1:]
    ce = (teachers if protocol == "paper" else 1) * (1 - weight)
    kept = min(kept, 1) if protocol == "standard" else kept  # their mean
    return ce, kept * weight * temperature**2 / (classes if protocol == "official" else 1)


def test_command(tmp_path, capsys, monkeypatch):
    # The tables once for all: they are what takes time.
    computed = protocols.tables()
    monkeypatch.setattr(protocols, "tables", lambda: computed)
    assert protocols.main(["--check"]) == 0, capsys.readouterr().err
    assert protocols.main([]) == 0
    assert computed in capsys.readouterr().out

    page = tmp_path / "page.md"
    page.write_text(TEXT.replace("1.25 : 0.95 = 1.316", "1.25 : 0.95 = 1.3"), "utf-8")
    assert protocols.main(["--check", f"--page={page}"]) == 1
    assert "-| TAKD, CIFAR-10, λ the lowest searched | 0.05" in capsys.readouterr().err
    assert protocols.main(["--write", f"--page={page}"]) == 0
    assert page.read_text("utf-8") == TEXT


@pytest.mark.parametrize("text", ["no markers", "<!-- end --> <!-- table -->", TEXT + TEXT])
def test_page_without_its_markers(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(protocols, "tables", lambda: "")
    page = tmp_path / "page.md"
    page.write_text(text, "utf-8")
    for option in ("--check", "--write"):
        assert protocols.main([option, f"--page={page}"]) == 1
        assert "needs one <!-- table -->" in capsys.readouterr().err
    assert page.read_text("utf-8") == text


def test_no_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(protocols, "tables", lambda: "")
    assert protocols.main(["--check", f"--page={tmp_path / 'none.md'}"]) == 1
    assert "none.md" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting",
    [
        Setting("one teacher", 0.15, 5.0, 100),
        Setting("several", 0.5, 4.0, 10, 4, 4),
        Setting("one dropped", 0.5, 5.0, 10, 4, 3),
        Setting("no labels", 1.0, 5.0, 10, 4, 4),
    ],
    ids=lambda setting: setting.what,
)
def test_effective_weights(setting):
    found = protocols.effective_weights(setting)
    assert set(found) == set(protocols.PROTOCOLS)
    for protocol, weights in found.items():
        np.testing.assert_allclose(weights, by_hand(setting, protocol), rtol=1e-9, atol=1e-9)


def test_ratio_of_one_teacher():
    weight, temperature, classes = 0.2, 2.0, 100
    found = protocols.effective_weights(Setting("", weight, temperature, classes))
    ratio = weight * temperature**2 / (1 - weight)
    assert found["standard"].kl / found["standard"].ce == pytest.approx(ratio)
    assert found["official"].kl / found["official"].ce == pytest.approx(ratio / classes)


def test_all_dropped_is_plain_training():
    for protocol, weights in protocols.effective_weights(Setting("", 0.7, 5.0, 10, 4, 0)).items():
        # The paper never drops all, and counts the labels for each teacher whatever is dropped.
        expected = (4 * 0.3, 0) if protocol == "paper" else (1, 0)
        np.testing.assert_allclose(weights, expected, atol=1e-9)


@pytest.mark.parametrize("kept", [(1, 1, 1), (1, 0, 1), (1, 0, 0)])
def test_the_paper_s_loss_with_stochastic_teaching(kept):
    """K (1-λ) CE + λ T² (KL_T + Σ b_i KL_Ai), in NumPy."""
    rng, weight, temperature = np.random.default_rng(0), 0.3, 4.0
    student, teachers = rng.normal(size=(6, 5)), rng.normal(size=(3, 6, 5))
    labels = np.arange(6) % 5

    def log_softmax(logits):
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    ce = -log_softmax(student)[np.arange(6), labels]
    own = log_softmax(student / temperature)
    theirs = log_softmax(teachers / temperature)
    kl = (np.exp(theirs) * (theirs - own)).sum(-1)
    expected = 3 * (1 - weight) * ce
    expected += weight * temperature**2 * (kl[0] + kept[1] * kl[1] + kept[2] * kl[2])
    options = config.resolve({"protocol": "paper"}).loss
    hyper = Hyper(temperature=temperature, kd_weight=weight)
    found = protocols.loss(options, student, labels, teachers, np.array(kept, bool), hyper)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_same_balance_under_the_other_reduction():
    weight, classes = 0.5, 100
    other = weight / (weight + (1 - weight) * classes)
    scale = classes / (weight + (1 - weight) * classes)
    assert f"{other:.4f}" in TEXT and f"{scale:.2f} in this example" in TEXT
    standard = protocols.effective_weights(Setting("", other, 5.0, classes))["standard"]
    official = protocols.effective_weights(Setting("", weight, 5.0, classes))["official"]
    np.testing.assert_allclose(standard, scale * np.array(official), rtol=1e-9)


def test_rates_by_epoch():
    rates = {what: protocols.learning_rates(recipe) for what, recipe in protocols.RECIPES}
    expected = {
        "TAKD, ResNet, paper": [0.1] * 80 + [0.01] * 40 + [0.001] * 30,
        "TAKD, ResNet, code": [0.01] * 120 + [0.001] * 40,
        "DGKD, ResNet, code": [0.1] * 80 + [0.01] * 40 + [0.001] * 40,
        "TAKD, plain CNN, paper": [0.1] * 150,
        "TAKD and DGKD, plain CNN, code": [0.01] * 160,
    }
    assert rates.keys() == expected.keys()
    for what, values in expected.items():
        np.testing.assert_allclose(rates[what], values, rtol=1e-6)


def test_what_a_protocol_sets():
    for name in protocols.PROTOCOLS:
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{name}` |"))
        found = config.resolve({"protocol": name})
        assert re.findall("`(.*?)`", row)[1:] == [
            found.loss.kl_reduction,
            found.loss.cross_entropy,
            found.loss.teachers,
            found.dropping.kind,
            str(found.dropping.teacher_droppable),
            found.selection,
        ]


def test_named_options_exist():
    named = re.findall(r"`--config\.([a-z_.]+)=([^`]+)`", TEXT)
    assert len(named) > 40
    for path, value in named:
        section, _, field = path.partition(".")
        try:
            parsed = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed = value
        config.resolve({section: {field: parsed} if field else parsed})
