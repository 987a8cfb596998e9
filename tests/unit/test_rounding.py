"""No text claims more than what holds: epsilons, deltas and odds are rounded up."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from core.privacy.accounting.rounding import figure, odds, upward

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (10.0, 4, "10"),
        (9.9994, 4, "10"),
        (9.9984, 4, "9.999"),
        (9.998, 4, "9.998"),
        (10.000001, 4, "10.01"),
        (1.1, 4, "1.1"),  # The float is a little more, but this is what its owner wrote.
        (1.10001, 4, "1.101"),
        (0.00061, 2, "0.00061"),
        (0.000611, 2, "0.00062"),
        (1e-5, 6, "1e-05"),
        (1.51500001e-6, 6, "1.51501e-06"),
        (1234.5, 4, "1235"),
        (12345.0, 4, "1.235e+04"),
        (0.0, 4, "0"),
        (math.inf, 4, "inf"),
        (np.float64(0.1), 4, "0.1"),
    ],
)
def test_a_bound_is_rounded_up_and_kept_where_it_needs_no_rounding(value, digits, text):
    assert upward(value, digits) == text
    assert float(text) >= value


def test_the_name_tells_which_way_a_figure_is_rounded():
    for name in ("epsilon", "privacy.target_epsilon", "epsilon_central", "eps sweep", "delta"):
        assert figure(name, 1.00004) == "1.001"
    for name in ("accuracy", "training.steps", "stage_split"):
        assert figure(name, 1.00004) == "1"
    assert figure("epsilon", 3) == "3"
    assert figure("state", "finished") == "finished"


@pytest.mark.parametrize(
    ("epsilon", "times"),
    [(0.0, "1.00"), (1.0, "2.72"), (1.001, "2.73"), (10.0, "22,027"), (20.0, "4.9e+08")],
)
def test_odds_are_rounded_up(epsilon, times):
    assert f"at most {times} times as likely" in odds(epsilon)
    assert float(times.replace(",", "")) >= math.exp(epsilon)


def test_odds_of_an_epsilon_beyond_floats_are_told():
    assert "at most e^1235 times" in odds(1234.5)


def test_no_epsilon_or_delta_is_rounded_to_the_nearest():
    """A bound that is printed by a plain format may be too small: it goes through `upward`."""
    names = r"epsilon|delta|together|everything|released|spent"
    plain = re.compile(rf"\{{[^{{}}]*\b\w*(?:{names})\w*[^{{}}]*:[^{{}}]*g\}}")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for package in ("core", "sweep")
        for path in (ROOT / package).rglob("*.py")
        for line in path.read_text().splitlines()
        if plain.search(line)
    ]
    allowed = (  # What a user gave, in the words of an error; a lower bound; a command.
        "privacy.target_delta={self.privacy.target_delta:g} must lie",
        "at least {found['epsilon_lower_bound']:.4g}",
        "EPSILON={epsilon:g}",
        "--epsilon={epsilon:g} must be positive",
    )
    assert [line for line in found if not any(text in line for text in allowed)] == []
