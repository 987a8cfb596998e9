"""A stand-in keeps noise over batch and is charged what it truly spends."""

import pytest

from core.__main__ import main
from core.commands.scale_down import BATCH, TARGET, scaled_down
from core.config import flatten, load, nested, yaml_subset
from core.errors import ConfigError
from core.privacy.accounting import solve
from core.privacy.plan.plan import make_plan

SETTINGS = {
    "dataset.public": True,
    "stage_split": 0.0,
    "privacy.target_epsilon": 1.0,
    "privacy.dp_accuracy_stddev": 50.0,
}


def test_the_stand_in_keeps_noise_over_batch_and_states_its_true_epsilon(tmp_path, capsys):
    config = load({}, SETTINGS)
    small = scaled_down(config, 2)
    before, after = flatten(config), flatten(small)
    assert {key for key in before if before[key] != after[key]} == {BATCH, TARGET}
    whole, part = make_plan(config), make_plan(small)
    assert part.dp_sgd.expected_batch_size == 64
    ratios = [p.dp_sgd.noise_stddev / p.dp_sgd.expected_batch_size for p in (whole, part)]
    assert ratios[1] == pytest.approx(ratios[0], rel=3e-3)
    rate, noise, steps = whole.dp_sgd.mechanism
    mechanisms = (whole.score.mechanism, (rate / 2, noise / 2, steps))
    spent = solve.epsilon_of_mechanisms(mechanisms, whole.delta, "zero_out", 5e-4)
    assert part.epsilon == pytest.approx(spent, rel=3e-3)
    assert spent <= small.privacy.target_epsilon <= 1.003 * spent
    assert spent > 1.02  # More than the whole run's target: nothing is got for free.

    source, out = tmp_path / "whole.yaml", tmp_path / "small.yaml"
    source.write_text(yaml_subset.dump(nested(config)))
    command = ["scale-down", "--config", str(source), "--factor", "2", "--out", str(out)]
    assert main(command) == 0
    assert f"under final: {BATCH}: 128, {TARGET}: 1" in capsys.readouterr().out
    assert load(out) == small


def test_all_that_runs_beside_dp_sgd_is_in_the_stand_in_s_epsilon():
    changes = {"method": "feta_pro", "frequency.noise_multiplier": 5.0, "stage_split": 0.5}
    config = load({}, {**SETTINGS, **changes, "privacy.target_epsilon": 3.0})
    whole, part = make_plan(config), make_plan(scaled_down(config, 2))
    assert part.frequency == whole.frequency is not None
    ratios = [p.dp_sgd.noise_stddev / p.dp_sgd.expected_batch_size for p in (whole, part)]
    assert ratios[1] == pytest.approx(ratios[0], rel=3e-3)


@pytest.mark.parametrize(
    ("changes", "factor", "message"),
    [
        ({"dataset.public": False}, 2, r"dataset\.public=false"),
        ({"privacy.scope": "sweep"}, 2, r"privacy\.scope='sweep'"),
        ({"method": "non_private", "privacy.dp_accuracy_stddev": None}, 2, "private method"),
        ({}, 1, r"--factor=1 must lie in \(1, "),
        ({}, 1e6, r"--factor=1e\+06"),
    ],
)
def test_what_cannot_be_scaled_down_is_refused(changes, factor, message):
    with pytest.raises(ConfigError, match=message):
        scaled_down(load({}, SETTINGS | changes), factor)
