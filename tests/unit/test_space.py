"""The search: what cannot be paid never becomes a trial, what is known is not tried twice."""

import re

import optuna
import pytest
from optuna.trial import TrialState

from core.config import short_digest
from core.config.scopes import SAMPLERS
from core.privacy.keys import MasterSecret
from sweep.config.scope import settings_entropy
from sweep.config.sweep import load_sweep
from sweep.search.feasible import infeasible_reason, print_plan
from sweep.search.search import MAX_ATTEMPTS, FeasibleSearch
from sweep.search.study import open_storage
from sweep.search.which_scope import print_which_scope


@pytest.fixture
def make(tmp_path):
    def make(finished=(), entropy=0, **overrides):
        keys = {key.replace("__", "."): value for key, value in overrides.items()}
        sweep = load_sweep("tests/data/sweep.yaml", {"storage_path": str(tmp_path), **keys})
        pruned = []
        search = FeasibleSearch(sweep, dict(finished), lambda *item: pruned.append(item), entropy)
        return sweep, search, pruned

    return make


def study_of(sweep) -> optuna.Study:
    return optuna.load_study(study_name=sweep.name, storage=open_storage(sweep.folder))


def test_unaffordable_points_are_pruned_with_the_reason(make):
    sweep, search, pruned = make(privacy__target_epsilon=1.0)
    points = [search.suggest(str(i)) for i in range(8)]
    assert all(isinstance(point, dict) for point in points)
    assert pruned, "at epsilon 1 a good part of this space cannot be paid"
    for point, reason in pruned:
        assert "epsilon" in reason
        assert "lower central_images.per_class" in reason
        assert set(point) == set(sweep.search_space)
    states = [trial.state for trial in study_of(sweep).trials]
    assert states.count(TrialState.PRUNED) == len(pruned)
    assert states.count(TrialState.RUNNING) == 8


def test_an_unaffordable_space_ends_the_search(make, monkeypatch):
    monkeypatch.setattr("sweep.search.search.MAX_ATTEMPTS", 5)
    assert MAX_ATTEMPTS > 5
    _, search, pruned = make(
        privacy__target_epsilon=0.1,
        search_space__central_images__noise_multiplier__high=1.5,
        search_space__stage_split__low=0.5,
    )
    assert search.suggest("a") == FeasibleSearch.FINISHED
    assert len(pruned) == 5
    assert "5 points in a row" in search.gave_up


def test_a_point_whose_final_run_cannot_be_paid_is_not_searched(make):
    public = {"privacy__scope": "public", "dataset__public": True, "privacy__target_epsilon": 1.0}
    sweep, _, _ = make(final__dataset__num_examples=800, **public)
    point = {
        "central_images.per_class": 5,
        "central_images.noise_multiplier": 5.0,
        "stage_split": 0.5,
    }
    assert point.keys() == sweep.search_space.keys()
    assert infeasible_reason(sweep.model_copy(update={"final": {}}), point) == ""
    assert infeasible_reason(sweep, point).startswith("of the final run, ")
    large, _, _ = make(final__dataset__num_examples=60_000, **public)
    assert infeasible_reason(large, point) == ""


def test_results_reach_the_study_and_failures_do_not_count_as_bad(make):
    sweep, search, _ = make()
    for name in "abc":
        search.suggest(name)
    search.on_trial_result("a", {"training_iteration": 1, "loss": 1.0})
    search.on_trial_complete("a", {"training_iteration": 2, "accuracy": 0.75})
    search.on_trial_complete("b", {"training_iteration": 1, "loss": 1.0})
    search.on_trial_complete("c", None, error=True)
    trials = study_of(sweep).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "FAIL"]
    assert trials[0].value == 0.75


def test_a_new_driver_tries_interrupted_points_first_and_keeps_results(make):
    sweep, search, _ = make()
    done, cut, lost = (search.suggest(name) for name in "abc")
    search.on_trial_complete("a", {"training_iteration": 1, "accuracy": 0.5})
    ids = [short_digest(sweep.trial_config(point)) for point in (done, lost)]
    _, again, pruned = make(finished={ids[0]: [0.5], ids[1]: [0.9]})
    assert again.suggest("d") == cut
    assert again.suggest("e") not in (done, cut, lost)
    assert not pruned
    values = [trial.value for trial in study_of(sweep).trials if trial.state == TrialState.COMPLETE]
    assert values == [0.5, 0.9]


def test_points_that_were_queued_anew_and_never_asked_for_are_queued_again(make):
    _, search, _ = make()
    cut = [search.suggest(name) for name in "ab"]
    make()  # A driver that died at once.
    _, again, _ = make()
    assert [again.suggest(name) for name in "cd"] == cut


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_each_setting_comes_with_its_replicates_also_over_a_restart(make, sampler):
    """The base run's own first; of each setting all seeds, none twice, whenever a driver dies."""
    settings = {"replicates": 3, "sampler": sampler, "num_startup_trials": 1}
    sweep, search, _ = make(**settings)
    first = [search.suggest(name) for name in "abcd"]
    assert [point.pop("seed") for point in first] == [0, 1, 2, 0]
    assert first[:3] == [sweep.preset] * 3
    assert first[3] != sweep.preset
    for name, score in zip("ab", (0.5, 0.6), strict=True):
        search.on_trial_complete(name, {"training_iteration": 2, "accuracy": score})
    replicates = sweep.replicates_of(sweep.preset)
    ids = [short_digest(sweep.trial_config(each)) for each in replicates]
    # The third ended while no driver was there; of the second setting no trial has.
    _, again, pruned = make(finished=dict(zip(ids, ([0.5], [0.6], [0.7]), strict=True)), **settings)
    rest = [again.suggest(name) for name in "efgh"]
    assert [point.pop("seed") for point in rest] == [0, 1, 2, 0]
    assert rest[:3] == [first[3]] * 3
    assert rest[3] not in first
    assert not pruned
    complete = [t for t in study_of(sweep).trials if t.state == TrialState.COMPLETE]
    assert sorted(trial.value for trial in complete) == [0.5, 0.6, 0.7]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_several_objectives_reach_the_study_also_over_a_restart(make, sampler):
    settings = {"objective": ["fid_cnn", "accuracy"], "sampler": sampler, "num_startup_trials": 2}
    sweep, search, _ = make(**settings)
    points = [search.suggest(name) for name in "abc"]
    search.on_trial_result("a", {"training_iteration": 1, "loss": 1.0})
    search.on_trial_complete("a", {"training_iteration": 2, "accuracy": 0.75, "fid_cnn": 9.0})
    search.on_trial_complete("b", {"training_iteration": 2, "accuracy": 0.75})
    ids = [short_digest(sweep.trial_config(point)) for point in points]
    _, again, _ = make(finished={ids[0]: [9.0, 0.75], ids[2]: [7.0, 0.5]}, **settings)
    assert again.suggest("d") == points[1]
    assert again.suggest("e") not in points
    study = study_of(sweep)
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    complete = [t.values for t in study.trials if t.state == TrialState.COMPLETE]
    assert complete == [[9.0, 0.75], [7.0, 0.5]]


def test_a_stopped_trial_counts_with_its_last_early_score(make):
    sweep, search, _ = make(scheduler="asha")
    for name in "ab":
        search.suggest(name)
    early = {"stage": "early_score", "early_accuracy": 0.3, "training_iteration": 1}
    search.on_trial_complete("a", {**early, "stage": "stopped"})
    search.on_trial_complete("b", early)  # Cut off, not stopped: it is tried again.
    states = [(trial.state.name, trial.value) for trial in study_of(sweep).trials]
    assert states == [("COMPLETE", 0.3), ("FAIL", None)]


def test_a_point_is_not_tried_twice(make, monkeypatch):
    monkeypatch.setattr("sweep.search.search.MAX_ATTEMPTS", 20)
    _, search, pruned = make(
        search_space__central_images__noise_multiplier__low=20.0,
        search_space__central_images__per_class__high=2,
        search_space__stage_split__low=0.8,
    )
    points = [search.suggest(str(i)) for i in range(3)]
    assert points[2] == FeasibleSearch.FINISHED
    assert {point["central_images.per_class"] for point in points[:2]} == {1, 2}
    assert all("same configuration" in reason for _, reason in pruned)


@pytest.mark.parametrize("stops", [(), (1,), (2, 3)])
def test_random_points_are_fixed_before_the_first_result(make, stops, tmp_path):
    """However often a user stops and goes on, seen results decide nothing about later points."""
    points = []
    sweep, search, _ = make(sampler="random", name=f"stopped{len(stops)}")
    for i in range(5):
        if i in stops:
            done = {short_digest(sweep.trial_config(point)): [0.5] for point in points}
            sweep, search, _ = make(finished=done, sampler="random", name=f"stopped{len(stops)}")
        points.append(search.suggest(str(i)))
    _, other, _ = make(sampler="random", name="undisturbed")
    assert points == [other.suggest(str(i)) for i in range(5)]


def test_settings_of_a_selection_cannot_be_foreseen_without_the_secret(make):
    base = load_sweep(
        "tests/data/sweep.yaml",
        {
            "privacy.scope": "selection",
            "privacy.dp_accuracy_stddev": 50,
            "objective.metric": "dp_accuracy",
            "sampler": "random",
            "num_trials": None,
        },
    ).run
    secrets = [MasterSecret(bytes([i]) * 32) for i in (1, 2, 1)]
    entropies = [settings_entropy(base, 0, secret, "release") for secret in secrets]
    assert entropies[0] == entropies[2] != entropies[1]
    assert min(entropies) > 2**200
    assert settings_entropy(base, 0, secrets[0], "another release") != entropies[0]
    points = []
    for number, entropy in enumerate(entropies):
        _, search, _ = make(entropy=entropy, sampler="random", name=f"secret{number}")
        points.append([search.suggest(str(i)) for i in range(3)])
    assert points[0] == points[2]
    assert all(one != other for one in points[0] for other in points[1])
    public = load_sweep("tests/data/sweep.yaml", {}).run
    assert settings_entropy(public, 7, secrets[0], "release") == 7


def test_plan_reads_no_data(capsys, monkeypatch):
    monkeypatch.setattr("sweep.search.feasible._POINTS", 2)
    sweep = load_sweep(
        "tests/data/sweep.yaml",
        {
            "dataset.name": "idx",
            "dataset.path": "/nowhere",
            "privacy.target_epsilon": 1.0,
            "search_space.central_images.per_class.high": 20,
        },
    )
    print_plan(sweep)
    text = capsys.readouterr().out
    assert "4 trials of 2 workers" in text
    assert "central_images.per_class: 1 to 20, logarithmic" in text
    assert " - " in text, "twenty images at the smallest noise cannot be paid at epsilon 1"
    assert "epsilon of one trial" in text
    assert re.search(r"^ *sweep +- +1 +4 runs ", text, re.M)
    assert "scope tune_then_train cannot pay at privacy.tuning_epsilon=0.6" in text
    assert "recommended: a larger privacy.target_epsilon" in text


def test_which_scope_is_answered_for_the_sweep_at_hand(capsys):
    sweep = load_sweep("tests/data/sweep.yaml", {"privacy.tuning_epsilon": 1.5})
    point = {"central_images.per_class": 5, "central_images.noise_multiplier": 5.0}
    print_which_scope(sweep, point | {"stage_split": 0.4})
    text = capsys.readouterr().out
    samplers = ", ".join(SAMPLERS)
    noise = {
        scope: float(re.search(rf"^ *{scope} +(\d\.\d+) +{rest}", text, re.M)[1])
        for scope, rest in (
            ("trial", rf"[1-9]\d\.\d+ +4 runs +{samplers} +any one trial"),
            ("sweep", rf"10 +4 runs +{samplers} +every trial"),
            ("tune_then_train", rf"10 +5 runs +{samplers} +every trial and the final run"),
            ("selection", "10 +16 runs +random +the best trial alone"),
            ("public", rf"10 +5 runs +{samplers} +the one run"),
        )
    }
    assert noise["trial"] == noise["public"] < noise["tune_then_train"] < noise["selection"]
    assert noise["selection"] < noise["sweep"]
    recommended = re.search(r"recommended: scope (\w+), .* \((\S+), without", text)
    assert recommended.groups() == ("tune_then_train", f"{noise['tune_then_train']:.3f}")
