"""The page on config fields is the computed one."""

import pytest

from distill_jax.runs.config import FIELDS, Field, help
from experiments import fields


def test_the_page_is_up_to_date(capsys):
    assert fields.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "changed",
    [
        (*FIELDS, Field("recipe.new", 1, "Something new.")),
        FIELDS[:-1],
        (*FIELDS[:-1], Field(FIELDS[-1].path, "7 minutes", FIELDS[-1].about)),
    ],
    ids=["added", "removed", "another default"],
)
def test_a_page_that_lags_behind_the_fields_is_told(changed, monkeypatch, capsys):
    monkeypatch.setattr(help, "FIELDS", changed)
    assert fields.main(["--check"]) == 1
    assert "--write mends it" in capsys.readouterr().err


def test_text_of_a_field_is_no_markup(monkeypatch):
    monkeypatch.setattr(help, "FIELDS", (Field("x", 0, "c<a+b, a|b and 'layer3.*' by [i][j]"),))
    assert r"| `x` | `0` | c\<a+b, a\|b and 'layer3.\*' by \[i]\[j] |" in fields.tables()
