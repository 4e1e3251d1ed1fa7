"""Every field is checked at construction."""

import dataclasses
import json
from itertools import pairwise

import pytest

from repflow.monitor import MonitorConfig
from repflow.monitor.signatures import DEFAULT, NonFinite


def test_defaults() -> None:
    config = MonitorConfig()
    assert (config.every_n_steps, config.max_tokens, config.cka_tokens) == (50, 8192, 2048)
    assert (config.max_memory_mib, config.skip_first_tokens, config.states) == (1024, 0, "residual")


def test_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MonitorConfig().every_n_steps = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        MonitorConfig(5)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        (
            "every_n_steps",
            0,
            ValueError,
            "expected every_n_steps of 1 or more, got 0; to switch monitoring off, leave the monitor out",
        ),
        ("every_n_steps", True, TypeError, "expected every_n_steps to be an integer, got True"),
        ("every_n_steps", 2.5, TypeError, "expected every_n_steps to be an integer, got 2.5"),
        ("max_tokens", 3, ValueError, "expected max_tokens of 4 or more, got 3"),
        ("cka_tokens", -1, ValueError, "expected cka_tokens of 4 or more, got -1"),
        ("max_memory_mib", 0, ValueError, "expected max_memory_mib of 1 or more, got 0"),
        ("skip_first_tokens", -1, ValueError, "expected skip_first_tokens of 0 or more, got -1"),
        ("reduce", "auto", TypeError, "expected reduce to be True or False, got 'auto'"),
        ("metrics", "cka", TypeError, r"expected metrics as a tuple of names, got 'cka'; write \('cka',\)"),
        (
            "metrics",
            ("cka", "kca"),
            ValueError,
            "expected metrics among 'inter_token', 'adjacent', 'variation', 'cka', 'ssm', got 'kca'",
        ),
        ("states", "raw", ValueError, "expected states among 'residual', 'hf', got 'raw'"),
        ("compiled", "yes", ValueError, "expected compiled to be \"auto\", True or False, got 'yes'"),
        ("cka_estimator", "debiased", ValueError, "expected cka_estimator among 'unbiased', 'biased', got 'debiased'"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_a_bad_value_says_what_was_expected(field, value, error, message) -> None:
    with pytest.raises(error, match=message):
        MonitorConfig(**{field: value})


def test_from_options() -> None:
    config = MonitorConfig(every_n_steps=3)
    assert MonitorConfig.from_options(config, {}) is config
    assert MonitorConfig.from_options(None, {"every_n_steps": 3}) == config
    with pytest.raises(TypeError, match="got both; put seed into the config"):
        MonitorConfig.from_options(config, {"seed": 1})
    with pytest.raises(TypeError, match="unknown option every_steps; expected some of every_n_steps"):
        MonitorConfig.from_options(None, {"every_steps": 1})


def test_every_field_is_documented() -> None:
    """A docstring under each field, with the unit of each number."""
    import ast
    import inspect

    (definition,) = ast.parse(inspect.getsource(MonitorConfig)).body
    assert isinstance(definition, ast.ClassDef)
    body = definition.body
    for field, following in pairwise(body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant), ast.unparse(field)


def test_signatures() -> None:
    assert MonitorConfig().rules == DEFAULT
    assert MonitorConfig(signatures=()).rules == ()
    rules = (NonFinite(), NonFinite(name="again", threshold=5.0))
    assert MonitorConfig(signatures=rules).rules == rules
    described = MonitorConfig(signatures=rules).to_dict()["signatures"]
    assert [(rule["name"], rule["threshold"]) for rule in described] == [("nonfinite", 0.0), ("again", 5.0)]
    assert json.dumps(described)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("all", TypeError, r"expected signatures as a tuple, got 'all'; write \"default\", \(\) for none, or some"),
        (NonFinite(), TypeError, r"expected signatures as a tuple, got NonFinite\(.*NonFinite\(\), CollapseOnset"),
        ((NonFinite,), TypeError, "expected every one of signatures to be a Signature, got <class .*NonFinite"),
        (("nonfinite",), TypeError, "expected every one of signatures to be a Signature, got 'nonfinite'"),
        ((NonFinite(), NonFinite()), ValueError, "of different names, got nonfinite more than once; give one of them"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_signatures_that_are_none(given, error, message) -> None:
    with pytest.raises(error, match=message):
        MonitorConfig(signatures=given)
