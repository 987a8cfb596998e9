"""Replicates: intervals that hold as often as they say, and what is recommended by them."""

import csv
import dataclasses
import math

import numpy as np
import pytest
from test_report_parts import Row, row
from test_winners import sweep

from sweep.results.export import export, records
from sweep.results.replicates import FIGURES, estimates, sentences
from sweep.results.table import best, recommended, results_table, told_of_noise


def simulated(rng: np.random.Generator, means, replicates: int, noise: float = 0.02):
    return [
        ((place,), f"{place}/{number}", mean + noise * rng.standard_normal())
        for place, mean in enumerate(means)
        for number in range(replicates)
    ]


@pytest.mark.parametrize("replicates", [2, 4])
def test_of_equal_settings_one_is_called_better_in_one_of_twenty_searches_at_most(replicates):
    """Although the recommended one is what turned out best of eight."""
    rng, searches, called, missed = np.random.default_rng(5), 400, 0, 0
    for _ in range(searches):
        found = estimates(simulated(rng, [0.7] * 8, replicates))
        first, *others = found.settings
        called += any(
            first.mean - each.mean > found.half_width_between(first, each) for each in others
        )
        missed += sum(abs(each.mean - 0.7) > found.half_width(each) for each in found.settings)
    assert called <= 38  # Binomial: above with probability 1e-4 at 5 %.
    assert 0.04 < missed / (8 * searches) < 0.06


def test_the_noise_of_a_score_is_that_within_settings():
    rng = np.random.default_rng(6)
    found = estimates(simulated(rng, np.linspace(0, 1, 500), 3, noise=0.05))
    assert found.degrees == 1000
    assert found.noise == pytest.approx(0.05, rel=0.07)


def test_a_gain_beyond_noise_is_told_and_one_within_is_not():
    rng = np.random.default_rng(7)
    found = estimates(simulated(rng, [0.5, 0.7, 0.71], 4))
    told = " ".join(sentences(found, "accuracy", (0,)))
    assert "better than the preset: by 0.2" in told
    assert "differences to 1 of 2 other settings are within noise" in told
    near = " ".join(sentences(found, "accuracy", found.settings[1].place))
    assert "within noise of the preset: by 0.0" in near
    assert "preset" not in " ".join(sentences(found, "accuracy", found.settings[0].place))


def test_fewer_replicates_need_a_better_mean_and_less_may_be_better():
    scores = [((0,), "a", 0.80), ((1,), "b", 0.78), ((1,), "c", 0.79), ((2,), "d", 0.5),
              ((2,), "e", 0.55)]  # fmt: skip
    assert estimates(scores).settings[0].trial == "b"
    assert estimates(scores, maximize=False).settings[0].trial == "d"
    assert estimates(scores[:2]) is None
    assert estimates([]) is None


def replicated() -> list[Row]:
    return [
        row("lucky", 0.90, 9, stage_split=0.3),
        row("other", 0.60, 9, stage_split=0.3, seed=1),
        row("good", 0.85, 9, stage_split=0.6),
        row("again", 0.86, 9, stage_split=0.6, seed=1),
        row("third", 0.40, 9, stage_split=0.1),
    ]


def test_the_recommended_setting_stands_beside_the_best_trial():
    """One lucky trial is the best seen; that of the better mean is recommended."""
    rows = replicated()
    search = sweep(replicates=2)
    assert best(search, rows).trial == "lucky"
    assert recommended(search, rows).trial == "good"
    told = told_of_noise(search, rows)
    assert told[0].startswith("recommended setting: that of good (accuracy 0.855 +- ")
    assert "2 degrees of freedom" in told[1]
    table = results_table(search, rows, rows[:1], ["accuracy"], 10.0)
    (means,) = [column for column in table.columns if column.header == "mean accuracy"]
    assert [str(cell).split()[0] for cell in means.cells] == ["0.75"] * 2 + ["0.855"] * 2 + ["0.4"]
    alone = [rows[0], rows[2]]
    assert recommended(search, alone).trial == "lucky"
    assert told_of_noise(search, alone) == []
    headers = [column.header for column in results_table(search, alone, [], [], 1.0).columns]
    assert "mean accuracy" not in headers


def test_records_of_trials_hold_the_interval_of_their_setting(tmp_path):
    rows, search = replicated(), sweep(replicates=2)
    rows.append(dataclasses.replace(rows[0], trial="broken", state="failed", scores={}))
    good, third, broken = (records(search, rows)[i] for i in (3, 4, 5))
    found = [good[name] for name in FIGURES]
    noise = math.sqrt((0.15**2 * 2 + 0.005**2 * 2) / 2)  # Two degrees of freedom.
    half = 4.303 * noise / math.sqrt(2)
    assert found == pytest.approx([0.855, 0.855 - half, 0.855 + half, 2], rel=1e-3)
    assert third["setting_high"] - 0.4 == pytest.approx(4.303 * noise, rel=1e-3)
    assert [broken[name] for name in FIGURES] == [None] * 4
    export(search, rows, path := tmp_path / "trials.csv")
    with path.open() as file:
        lines = list(csv.DictReader(file))
    assert [float(lines[3][name]) for name in FIGURES] == pytest.approx(found)
    assert lines[5]["setting_mean"] == ""
    assert {records(search, rows[:1])[0][name] for name in FIGURES} == {None}
