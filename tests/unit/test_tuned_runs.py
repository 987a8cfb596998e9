"""Tuned runs: their settings in a sweep, and what the ledger takes of them."""

from dataclasses import replace

import pytest
from test_ledger import CENTRAL, DP_SGD, TERMS, counted, epsilon
from test_sweep_config import QUICKSTART, SELECTION

from core.config import load, nested
from core.config.scopes import SCOPES
from core.errors import ConfigError, InfeasibleError, LedgerError
from core.privacy.ledger.admission import BudgetExceededError
from core.privacy.ledger.ledger import Ledger
from core.privacy.ledger.terms import Key
from core.privacy.plan.budget import RunBudget, run_budget
from core.privacy.plan.plan import make_plan
from sweep.config.scope import final_point, tuning_settings
from sweep.config.sweep import dump_sweep, load_sweep
from sweep.search.feasible import infeasible_reason

TUNED = SELECTION | {
    "privacy.scope": "tune_then_train",
    "sampler": "tpe",
    "num_trials": 4,
    "privacy.tuning_epsilon": 0.8,
    "privacy.tuning_steps": 0.5,
}
WITHIN = RunBudget(9.0, adaptive=True, tuning_trials=2, references="both")


def key(trial: str, part: str = "tuning", run: str = "tuned") -> Key:
    return Key(run, trial, part, 0, DP_SGD.count)


def test_the_whole_is_charged_with_the_first_trial_and_no_trial_more_than_was_fixed(tmp_path):
    ledger = Ledger.open(tmp_path, replace(TERMS, budget=10.0))
    events = (CENTRAL, DP_SGD)
    first = ledger.reserve(key("a"), events, within=WITHIN)
    assert counted(ledger) == ledger.epsilon_of_run("tuned") == 9.0
    ledger.commit(first, 3)  # Stopped: the whole counts all the same.
    ledger.reserve(key("b"), events, within=WITHIN)
    with pytest.raises(BudgetExceededError, match=r"number 3 of stage 'tuning' .* 2 tuning"):
        ledger.reserve(key("c"), events, within=WITHIN)
    ledger.reserve(key("c", "final run"), events, within=WITHIN)
    with pytest.raises(BudgetExceededError, match="number 2 of stage 'final run' of run"):
        ledger.reserve(key("d", "final run"), events, within=WITHIN)
    with pytest.raises(BudgetExceededError, match="number 1 of stage 'all'"):
        ledger.reserve(key("d", "all"), events, within=WITHIN)
    for other in (replace(WITHIN, references="others"), replace(WITHIN, tuning_trials=3), None):
        with pytest.raises(LedgerError, match="which never changes"):
            ledger.reserve(key("d"), events, within=other)
    ledger.reserve(key("a"), events, within=WITHIN)  # Goes on.
    summary = ledger.summary()
    assert (counted(ledger), summary["num_releases"], summary["selections"]) == (9.0, 1, [])
    assert summary["delta_committed_and_reserved"] == TERMS.delta
    assert ledger.largest_epsilon("tuned") == epsilon(*events)
    with pytest.raises(BudgetExceededError, match="of its budget 10"):
        ledger.reserve(key("e", "all", "other"), (CENTRAL, replace(DP_SGD, noise_multiplier=2.0)))
    assert Ledger.at(ledger.path).epsilon_of_run("tuned") == 9.0


def test_a_data_set_without_room_for_the_whole_refuses_the_first_trial(tmp_path):
    ledger = Ledger.open(tmp_path, replace(TERMS, budget=8.0))
    with pytest.raises(BudgetExceededError, match="to 9 of its budget 8"):
        ledger.reserve(key("a"), (CENTRAL, DP_SGD), within=WITHIN)


def test_a_sweep_fixes_both_references_the_steps_and_the_final_run():
    sweep = load_sweep(QUICKSTART, TUNED)
    privacy, steps = sweep.run.privacy, sweep.run.training.num_steps
    assert privacy.num_shares == 4
    assert sweep.final == {"privacy.is_final_run": True, "training.num_steps": 2 * steps}
    assert privacy.tuning_reference[-1] == steps
    assert privacy.final_reference[-1] == 2 * steps  # No easy stage, as the nearest to normal.
    noise = "central_images.noise_multiplier"
    point = {"stage_split": 0.3, "central_images.per_class": 2, noise: 9.0}
    tuning = sweep.trial_config(point)
    final = sweep.trial_config(final_point(privacy.covers, point, sweep.final))
    assert (tuning.is_final, final.is_final) == (False, True)
    assert final.dataset.public == tuning.dataset.public
    budget = run_budget(final)
    assert budget == run_budget(tuning)
    assert budget.tuning_trials == 4
    cheap, last = make_plan(tuning), make_plan(final)
    assert cheap.epsilon <= 0.8 < last.epsilon < privacy.target_epsilon
    assert cheap.score is not None
    assert infeasible_reason(sweep, point) == ""
    assert infeasible_reason(sweep, point | {noise: 1.0}) != ""
    assert dump_sweep(sweep)["base"]["privacy"] == nested(sweep.run)["privacy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.metric": "accuracy"}, "scope='tune_then_train' cannot choose by"),
        ({"privacy.num_shares": 3}, "num_trials=4 exceeds the 3 tuning trials"),
        ({"privacy.is_final_run": True}, "is_final_run=True contradicts .*: leave it out"),
        ({"final.dataset.path": "secret"}, "and final belong together"),
        (
            {"search_space.privacy.is_final_run.choices": [False, True]},
            "is_final_run cannot be searched",
        ),
        ({"privacy.neighboring_relation": "replace_one"}, "proven for .* alone"),
    ],
)
def test_what_would_make_its_claim_false_is_refused(changes, message):
    with pytest.raises((ConfigError, InfeasibleError), match=message):
        load_sweep(QUICKSTART, TUNED | changes)


def test_the_number_of_steps_is_not_searched_where_tuning_trials_have_a_part_of_it():
    part = load({}, {"privacy.scope": "tune_then_train", "privacy.tuning_steps": 0.5})
    with pytest.raises(ConfigError, match=r"fix it, or set privacy\.tuning_steps=1"):
        tuning_settings(part, ["training.num_steps"])
    whole = load({}, {"privacy.scope": "tune_then_train"})
    assert tuning_settings(whole, ["training.num_steps"]) == ({}, {"privacy.is_final_run": True})


def test_every_scope_tells_what_may_be_published():
    assert all(scope.published for scope in SCOPES.values())
