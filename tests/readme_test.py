"""The README's examples of things of one's own, exactly as they stand there."""

import pathlib
import re

import numpy as np
import pytest

from distill_jax import data, default_config

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
SECTION = README.partition("## Bring your own\n")[2].partition("\n## ")[0]
EXAMPLES = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


def run(example, monkeypatch, **options):
    """Runs an example; the results of its runs, which are given these options."""
    import distill_jax

    results, plain = [], distill_jax.run

    def kept(config, **own):
        results.append(plain(config, progress=False, **own, **options))
        return results[-1]

    monkeypatch.setattr(distill_jax, "run", kept)
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    return results


def test_there_are_seven_of_at_most_twenty_lines():
    lengths = [sum(bool(line.strip()) for line in x.splitlines()) for x in EXAMPLES]
    assert len(lengths) == 7 and max(lengths) <= 20, lengths


def test_a_network_gives_the_same_numbers_on_one_device_and_on_two(monkeypatch, capsys):
    # Fewer images: linen's convolutions are slow here.
    few = data.load(**default_config().dataset).limited(32, seed=0)
    two, one = run(EXAMPLES[0], monkeypatch, dataset=few)
    assert len(capsys.readouterr().out.splitlines()) == 2
    for many, alone in zip(two.rows, one.rows, strict=True):
        assert many["test_accuracy"] == pytest.approx(alone["test_accuracy"], abs=0.01)
    label = ("direct", "plane2", 0)
    for many, alone in zip(two.histories[label], one.histories[label], strict=True):
        assert many["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)


@pytest.mark.parametrize(("number", "term"), [(1, "dkd_mine"), (2, "attention")])
def test_a_method_teaches(number, term, monkeypatch):
    (result,) = run(EXAMPLES[number], monkeypatch)
    (history,) = result.histories.values()
    assert 0 < history[-1][f"train_{term}"] < history[0][f"train_{term}"]


def test_an_optimizer_trains(monkeypatch):
    (result,) = run(EXAMPLES[3], monkeypatch)
    assert result.rows[0]["test_accuracy"] > 0.5


@pytest.mark.parametrize("number", [4, 5], ids=["transformer", "two inputs"])
def test_another_task_is_distilled(number, monkeypatch):
    (result,) = run(EXAMPLES[number], monkeypatch)
    (row,) = result.rows
    assert row["teachers"] and row["test_accuracy"] > 0.8  # the commoner label: below 0.65
    assert row["agreement"][row["teachers"][0]] > 0.8


def test_a_metric_is_recorded(monkeypatch, capsys):
    (result,) = run(EXAMPLES[6], monkeypatch)
    printed = [float(number) for number in capsys.readouterr().out.split()]
    (row,) = result.rows
    assert printed == [row["test_accuracy"], row["test_top3"], row["valid_top3"]]
    network, variables = next(iter(result.networks.values()))
    digits = data.load("digits")
    images = data.normalise(digits.test.images, digits.mean, digits.std)
    logits = np.asarray(network.apply(variables, images)[0].logits)
    ranks = (logits > logits[np.arange(500), digits.test.labels][:, None]).sum(-1)
    assert row["test_top3"] == np.mean(ranks < 3) > row["test_accuracy"]
