"""The plan against figures computed independently, and what it must refuse."""

import json
import math
from dataclasses import replace

import pytest
from by_library import dp_events, epsilon_of, rdp_epsilon_of, subsampled_gaussian
from dp_accounting.pld import privacy_loss_distribution

from core.config import Config, load
from core.errors import ConfigError, InfeasibleError
from core.privacy.accounting import solve
from core.privacy.accounting.mechanism import COARSE, FINE
from core.privacy.plan.plan import (
    PrivacyPlan,
    check_stages,
    composed_epsilon,
    make_plan,
    resumed_plan,
)

REFERENCE = {
    "dataset.name": "idx",
    "dataset.num_examples": 60_000,
    "dataset.image_size": 28,
    "central_images.image_size": 14,
    "central_images.noise_multiplier": 5.0,
    "central_images.expected_batch_size": 6_000,
    "private_training.expected_batch_size": 4_096,
    "training.num_steps": 4_394,  # Half of them are DP-SGD steps: 2,197.
    "privacy.target_delta": 1e-5,
}


def reference(**changes: object) -> Config:
    return load({}, REFERENCE | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.parametrize(
    ("epsilon", "per_class", "golden"),
    [(1.0, 5, 12.173), (1.0, 50, 14.290), (10.0, 5, 1.7601), (10.0, 50, 1.7635)],
)
def test_noise_multiplier_matches_golden_figures(epsilon, per_class, golden):
    plan = make_plan(
        reference(privacy__target_epsilon=epsilon, central_images__per_class=per_class)
    )
    assert plan.noise_multiplier == pytest.approx(golden, rel=5e-3)
    assert plan.noise_multiplier == pytest.approx(golden, rel=2e-4)
    assert 0.999 * epsilon < plan.epsilon <= epsilon
    assert plan.dp_sgd.num_steps == 2197


@pytest.mark.parametrize(
    ("per_class", "pld", "rdp"), [(5, 0.1646, 0.188), (50, 0.526, 0.583), (200, 1.098, None)]
)
def test_central_images_alone(per_class, pld, rdp):
    event = subsampled_gaussian(0.1, 5.0, per_class)
    assert epsilon_of([event], 1e-5, "zero_out") == pytest.approx(pld, rel=5e-3)
    if rdp:
        assert rdp_epsilon_of([event], 1e-5, "zero_out") == pytest.approx(rdp, rel=5e-3)


def test_central_images_over_the_budget_are_refused_with_the_reason():
    config = reference(privacy__target_epsilon=1.0, central_images__per_class=200)
    with pytest.raises(InfeasibleError, match=r"central images alone spend epsilon 1\.099 of 1"):
        make_plan(config)
    with pytest.raises(InfeasibleError, match=r"lower central_images\.per_class"):
        check_stages(config)


def test_central_images_that_leave_too_little_are_refused():
    config = reference(
        privacy__target_epsilon=1.0981, central_images__per_class=200, training__num_steps=4_394
    )
    with pytest.raises(InfeasibleError, match="leave too little"):
        make_plan(config)


def test_without_easy_stage_nothing_is_released_or_charged():
    plan = make_plan(reference(stage_split=0.0, training__num_steps=2_197))
    assert plan.central is None
    assert plan.epsilon_central == 0
    assert plan.mechanisms == [plan.dp_sgd.mechanism]


def test_full_batch_equals_the_analytic_gaussian():
    event = subsampled_gaussian(1.0, 3.0, 1)
    exact = privacy_loss_distribution.from_gaussian_mechanism(3.0).get_epsilon_for_delta(1e-5)
    assert epsilon_of([event], 1e-5, "zero_out") == pytest.approx(exact, rel=1e-3)


def test_pld_never_exceeds_rdp_and_calibration_then_accounting_is_the_identity():
    plan = make_plan(reference(privacy__target_epsilon=3.0))
    again = epsilon_of(dp_events(plan.mechanisms), 1e-5, "zero_out")
    assert again == pytest.approx(plan.epsilon, rel=1e-9)
    assert again <= rdp_epsilon_of(dp_events(plan.mechanisms), 1e-5, "zero_out")


def test_replace_one_costs_about_twice():
    plan = make_plan(reference(privacy__target_epsilon=10.0))
    twice = epsilon_of(dp_events(plan.mechanisms), 1e-5, "replace_one", COARSE)
    assert twice == pytest.approx(21.4, rel=0.01)


def test_sixteen_trials_compose_to_the_golden_figure():
    plan = make_plan(reference(privacy__target_epsilon=10.0))
    assert composed_epsilon([plan] * 16) == pytest.approx(63.5, rel=5e-3)
    one = make_plan(reference(privacy__target_epsilon=1.0))
    assert composed_epsilon([one] * 16) == pytest.approx(4.75, rel=5e-3)


SCOPES = [
    {"privacy__dp_accuracy_stddev": 50.0},
    {"method": "feta_pro"},
    {"privacy__scope": "sweep", "privacy__num_shares": 4},
    {"privacy__scope": "sweep", "privacy__num_shares": 4, "privacy__adaptive": False},
    {"privacy__scope": "selection"},
    {"method": "non_private"},
]


@pytest.mark.parametrize("changes", SCOPES)
def test_a_kept_plan_is_taken_as_it_is_and_not_solved_again(changes, monkeypatch):
    config = reference(**changes)
    plan = make_plan(config)
    kept = json.loads(json.dumps(plan.summary()))

    def never(*_: object) -> float:
        raise AssertionError("solved again")

    monkeypatch.setattr(solve, "solve_noise_multiplier", never)
    monkeypatch.setattr("core.privacy.plan.shares.Share.solve_noise_multiplier", never)
    assert resumed_plan(config, PrivacyPlan.restored(kept)) == plan


@pytest.mark.parametrize("changes", SCOPES[:-1])
def test_a_kept_plan_with_too_little_noise_is_refused(changes):
    config = reference(**changes)
    plan = make_plan(config)
    less = replace(
        plan, dp_sgd=replace(plan.dp_sgd, noise_multiplier=0.998 * plan.noise_multiplier)
    )
    with pytest.raises(ConfigError, match=r"configuration in epsilon: restore .* new run folder"):
        resumed_plan(config, less)
    spent = solve.epsilon_of_mechanisms(
        tuple(less.mechanisms), plan.delta, plan.neighboring_relation, FINE
    )
    with pytest.raises(ConfigError, match="configuration in target_epsilon: "):
        resumed_plan(config, replace(less, epsilon=spent))


@pytest.mark.parametrize(
    ("stage", "key", "factor"),
    [
        ("dp_sgd", "sample_rate", 0.5),
        ("dp_sgd", "num_steps", 2),
        ("dp_sgd", "max_grad_norm", 0.5),
        ("dp_sgd", "expected_batch_size", 2),
        ("central", "noise_multiplier", 0.5),
        ("central", "num_releases", 2),
        ("central", "sensitivity", 0.5),
        ("central", "expected_class_count", 2),
    ],
)
def test_a_kept_plan_of_other_numbers_is_refused(stage, key, factor):
    config = reference()
    kept = make_plan(config).summary()
    kept[stage] = {**kept[stage], key: factor * kept[stage][key]}
    with pytest.raises(ConfigError, match=f"configuration in {stage}: "):
        resumed_plan(config, PrivacyPlan.restored(kept))


@pytest.mark.parametrize(
    ("noise_multiplier", "stated", "key"),
    [
        (0.0, {"epsilon": math.inf}, "noise_multiplier"),
        (math.inf, {"epsilon": 0.0}, "noise_multiplier"),
        (math.nan, {}, "noise_multiplier"),
        (-1.0, {}, "noise_multiplier"),
        (0.01, {}, "target_epsilon"),
        (None, {"epsilon_central": 1e-9}, "epsilon_central"),
        (None, {"epsilon_score": 0.0}, "epsilon_score"),
        (None, {"epsilon": 9.0}, "epsilon: "),
    ],
)
def test_a_private_run_never_takes_a_plan_without_its_noise_or_its_epsilons(
    noise_multiplier, stated, key
):
    config = reference(privacy__dp_accuracy_stddev=50.0)
    plan = replace(make_plan(config), **stated)
    if noise_multiplier is not None:
        plan = replace(plan, dp_sgd=replace(plan.dp_sgd, noise_multiplier=noise_multiplier))
    with pytest.raises(ConfigError, match="configuration in " + key):
        resumed_plan(config, plan)


@pytest.mark.parametrize("delta", [1e-9, 1e-12])
def test_a_kept_plan_of_a_small_delta_is_taken(delta):
    config = reference(privacy__target_delta=delta, privacy__target_epsilon=10.0)
    plan = make_plan(config)
    assert resumed_plan(config, plan) is plan


def test_public_numbers_come_from_the_configuration_alone():
    plan = make_plan(reference())
    assert plan.dp_sgd.sample_rate == 4_096 / 60_000
    assert plan.dp_sgd.expected_batch_size == 4_096
    assert plan.central is not None
    assert plan.central.sample_rate == 0.1
    assert plan.central.expected_class_count == 600
    assert plan.central.sensitivity == pytest.approx(14.0)
    assert plan.central.noise_stddev == pytest.approx(70.0)
    centred = make_plan(reference(central_images__pixel_center=0.5))
    assert centred.central is not None
    assert centred.central.sensitivity == pytest.approx(7.0)
    colour = make_plan(reference(dataset__channels=3))
    assert colour.central is not None
    assert colour.central.sensitivity == pytest.approx((14 * 14 * 3) ** 0.5)
    mode = make_plan(reference(central_images__kind="mode", central_images__pixel_center=0.5))
    assert mode.central is not None
    assert mode.central.sensitivity == pytest.approx(14.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("privacy.target_epsilon", 0),
        ("privacy.target_epsilon", -1),
        ("privacy.target_epsilon", float("nan")),
        ("privacy.target_epsilon", float("inf")),
        ("privacy.target_delta", 0),
        ("privacy.target_delta", 1 / 60_000),
        ("central_images.noise_multiplier", 0),
        ("central_images.noise_multiplier", -2),
        ("central_images.noise_multiplier", 1e10),
        ("frequency.noise_multiplier", 1e200),
        ("privacy.dp_accuracy_stddev", 1e200),
        ("private_training.expected_batch_size", 0),
        ("private_training.expected_batch_size", 60_001),
        ("central_images.expected_batch_size", 60_001),
        ("private_training.max_grad_norm", 0),
        ("central_images.pixel_center", 1.5),
    ],
)
def test_meaningless_privacy_settings_are_refused(key, value):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        load({}, REFERENCE | {key: value})
