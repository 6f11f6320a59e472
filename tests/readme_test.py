"""The README's examples of things of one's own, exactly as they stand there."""

import pathlib
import re

import pytest

from distill_jax import data, default_config

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
SECTION = README.partition("## Bring your own\n")[2].partition("\n## ")[0]
EXAMPLES = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


def run(example, monkeypatch, **options):
    """Runs an example; the results of its runs, which are given these options."""
    import distill_jax

    results, plain = [], distill_jax.run

    def kept(config):
        results.append(plain(config, **options))
        return results[-1]

    monkeypatch.setattr(distill_jax, "run", kept)
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    return results


def test_there_are_four_of_at_most_twenty_lines():
    lengths = [sum(bool(line.strip()) for line in x.splitlines()) for x in EXAMPLES]
    assert len(lengths) == 4 and max(lengths) <= 20, lengths


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
