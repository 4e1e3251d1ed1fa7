"""docs/alerts.md is what the signatures say, and its code runs."""

import re
from dataclasses import fields

import pytest

from repflow.monitor.signatures import DEFAULT, ProbingDrop
from tests.alerts_page import PAGE, page


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.alerts_page"


@pytest.mark.parametrize("rule", [*DEFAULT, ProbingDrop()], ids=lambda rule: rule.name)
def test_every_signature_says_rule_source_reading_and_remedy(rule):
    doc = type(rule).__doc__ or ""
    assert all(part in doc for part in ("**Rule.**", "**Source.**", "**How to read it.**"))
    assert len(rule.suggestion) > 40
    (section,) = re.findall(rf"^## {rule.name}\n(.*?)(?=^## |\Z)", page(), re.MULTILINE | re.DOTALL)
    for field in fields(rule):
        row = next(line for line in section.splitlines() if line.startswith(f"| `{field.name}` |"))
        name, default, text, _ = row.split(" | ") if row.endswith(" | ") else [*row.rstrip("|").split(" | "), ""]
        assert default.strip("` ") and (text.strip() or isinstance(rule, ProbingDrop)), name


@pytest.mark.usefixtures("untyped")
def test_the_code_runs(capsys):
    scope = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", page(), re.MULTILINE | re.DOTALL):
        exec(block, scope)
    assert "a drop of 0.180, above 0.15" in capsys.readouterr().out
