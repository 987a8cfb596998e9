"""One-run audit: its bound holds for what is private, and catches half of the noise."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from two_ranks import tiny_run

from core.__main__ import main
from core.evaluation.audit import audit, canary_scores, epsilon_bound, p_value
from core.privacy.accounting.mechanism import FINE
from core.privacy.accounting.solve import epsilon_of_mechanisms
from core.privacy.keys import KeyedStream
from core.privacy.plan.releases import DpSgdPlan
from core.record.folder import RunFolder

DELTA, CANARIES = 1e-5, 20_000
PLAN = DpSgdPlan(2, 1.0, noise_multiplier=2.0, max_grad_norm=0.1, expected_batch_size=40)


def audited(plan: DpSgdPlan) -> float:
    keys = (KeyedStream(f"{name} of the audit".encode().ljust(32)) for name in ("masks", "noise"))
    return audit(*canary_scores(plan, CANARIES, *keys, "cpu"), DELTA)["epsilon_lower_bound"]


def test_the_bound_stays_below_epsilon_and_half_the_noise_is_caught():
    claimed = epsilon_of_mechanisms((PLAN.mechanism,), DELTA, "zero_out", FINE)
    assert 0.3 * claimed < audited(PLAN) <= claimed
    assert audited(replace(PLAN, noise_multiplier=PLAN.noise_multiplier / 2)) > claimed


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_without_delta_it_is_the_binomial_and_with_it_more(epsilon):
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    exact = stats.binom.sf(69, 100, chance)
    assert p_value(70, 100, 1000, epsilon, 0.0) == pytest.approx(exact)
    assert p_value(70, 100, 1000, epsilon, 1e-5) > exact
    assert p_value(0, 100, 1000, epsilon, 0.0) == 1


def test_randomized_response_has_its_own_epsilon_at_most():
    """Each bit is told rightly with chance e/(1+e): epsilon 1 by construction."""
    random = np.random.default_rng(0)
    bounds = []
    for _ in range(200):
        correct = random.binomial(2000, math.e / (1 + math.e))
        bounds.append(epsilon_bound(correct, 2000, 2000, 0.0, 0.05))
    assert 0.8 < np.mean(bounds) < 1
    assert np.mean(np.array(bounds) > 1) < 0.12  # 0.05 but for chance: 4.5 standard deviations.


def test_the_command_keeps_its_bound_and_an_officer_sees_it(tmp_path, capsys):
    run = tmp_path / "run"
    tiny_run(run)
    command = ["audit", "--run-dir", str(run), "--canaries", "400"]
    assert main(command) == 0
    assert "at least" in capsys.readouterr().out
    found = json.loads(RunFolder(run).audit.read_text())
    assert found["canaries"] == 400
    assert found["epsilon_lower_bound"] <= found["epsilon"]
    check = ["release", "--check", "--run-dir", str(run)]
    assert main(check) == 0
    assert "noisy updates of DP-SGD: epsilon is at least" in capsys.readouterr().out
    RunFolder(run).audit.write_text(json.dumps({**found, "epsilon_lower_bound": 99.0}))
    assert main(check) == 2
    assert "the audit of DP-SGD proves more than epsilon" in capsys.readouterr().out
    assert main([*command[:-1], "10"]) == 2
    assert "--canaries=10" in capsys.readouterr().err
