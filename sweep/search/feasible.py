"""Feasible points of a sweep and its plan; reads no data."""

import math
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from core.config import flatten
from core.config.keys import NOISE
from core.errors import ConfigError, InfeasibleError
from core.io.terminal import ProgressLine, counted
from core.privacy.accounting.rounding import figure, upward
from core.privacy.ledger.card import accountant_of
from core.privacy.plan.plan import check_feasible, composed_epsilon, make_plan
from sweep.config.dimension import Dimension, is_integer
from sweep.config.grid import grid_points, two_keys
from sweep.config.scope import DEFAULT_NUM_TRIALS, final_point
from sweep.config.sweep import SweepConfig
from sweep.costs.estimate import print_costs
from sweep.search.which_scope import print_which_scope

_POINTS = 4


def infeasible_reason(sweep: SweepConfig, point: Mapping[str, Any]) -> str:
    """Why a point is no run that the budget can pay; empty if it is one."""
    runs = {"": point}
    if sweep.final:  # A search whose winner cannot run on the sensitive data would be in vain.
        runs["of the final run, "] = final_point(sweep.run.privacy.covers, point, sweep.final)
    for which, parameters in runs.items():
        try:
            check_feasible(sweep.trial_config(parameters))
        except (InfeasibleError, ConfigError) as error:
            return f"{which}{error}"
    return ""


def payable_points(sweep: SweepConfig) -> list[dict[str, Any]]:
    """The points of a grid that the budget can pay; takes some seconds the first time."""
    points, line = grid_points(sweep.choices), ProgressLine()
    payable: list[dict[str, Any]] = []
    for number, point in enumerate(points):
        line.show(f"what the budget can pay: {number}/{len(points)}")
        payable += [] if infeasible_reason(sweep, point) else [point]
    return payable


def with_num_trials(sweep: SweepConfig) -> SweepConfig:
    """The sweep, of a grid with the number of trials: what the budget can pay unless given.

    Raises:
        ConfigError: the budget cannot pay so many points.
    """
    if sweep.sampler != "grid":
        return sweep
    points = grid_points(sweep.choices)
    if not (payable := len(payable_points(sweep))):
        reason = infeasible_reason(sweep, points[0])
        raise ConfigError(f"no point of the grid can be tried; the first, as {reason}")
    asked = sweep.num_trials or payable
    if asked > payable:
        raise ConfigError(
            f"num_trials={asked} exceeds the {payable} of {len(points)} points of the grid that "
            "the budget can pay: lower it, or leave it out"
        )
    return sweep.model_copy(update={"num_trials": asked})


def print_plan(sweep: SweepConfig, probe: bool = False) -> None:
    """`--plan`: trials, search space, the solved noise over count x noise or the grid, and costs.

    Args:
        probe: whether to measure the time of a step on random images.
    """
    sweep = with_num_trials(sweep)
    middle = {key: _middle(key, dimension) for key, dimension in sweep.search_space.items()}
    if sweep.sampler == "grid":  # Of which some points are named that no budget pays.
        payable = payable_points(sweep)
        middle = payable[len(payable) // 2]
    config = sweep.trial_config(middle)
    privacy = config.privacy
    total = sweep.num_trials or DEFAULT_NUM_TRIALS
    secret = privacy.covers.is_secret
    trials = f"a secret number of trials (mean {privacy.selection_mean:g})"
    trials = trials if secret else counted(total, "trial")
    trials += f" ({sweep.replicates} of each setting)" if sweep.replicates > 1 else ""
    trials += " and a final run," if sweep.final else ""
    print(
        f"sweep {sweep.name}: {trials} of {counted(sweep.workers_per_trial, 'worker')} each, "
        f"{config.training.num_steps} steps, scope {privacy.scope} at epsilon "
        f"{upward(privacy.target_epsilon)}, delta {upward(privacy.target_delta, 6)}, "
        f"N={config.dataset.num_examples}"
    )
    for key, dimension in sweep.search_space.items():
        print(f"  {key}: {describe_dimension(dimension)}")
    objectives = " and ".join(f"{each.direction} {each.metric}" for each in sweep.objectives)
    print(f"objective: {objectives}, sampler {sweep.sampler}")
    if sweep.scheduler == "asha":
        shares = ", ".join(f"{share:.3g}" for share in sweep.asha.rungs)
        tag = config.early_metric
        print(f"scheduler asha: judges {tag} after {shares} of the steps; costs are without it")
    _print_grid(sweep, middle)
    try:
        plan = make_plan(config)
    except InfeasibleError as error:
        print(f"the middle of the space cannot be paid: {error}")
        return
    print(f"epsilon of one trial in the middle of the space: {upward(plan.epsilon)}")
    if privacy.covers.claims_each and total > 1:
        together = composed_epsilon([plan] * total)
        print(f"epsilon of all {total} together, and so of choosing among them: {upward(together)}")
    elif not privacy.covers.claims_each:
        print(
            f"epsilon that scope {privacy.scope} claims: {upward(privacy.target_epsilon)}, by "
            f"{accountant_of(privacy, plan.summary()['accountant'])}"
        )
    print_which_scope(sweep, middle)
    trials = privacy.selection_mean if secret else total
    if privacy.covers.tunes_first:  # The final run, in the time of a tuning trial.
        trials += 1 / privacy.tuning_steps
    print_costs(sweep, config, trials, probe)


def _print_grid(sweep: SweepConfig, middle: dict[str, Any]) -> None:
    config = sweep.trial_config(middle)
    keys = two_keys(sweep.choices) or (sweep.count_key, NOISE)
    current, labels = flatten(config), {sweep.count_key: "count", NOISE: "noise"}
    rows, columns = (
        _grid(key, sweep.search_space[key], _POINTS)
        if key in sweep.search_space
        else [current[key]]
        for key in keys
    )
    table = Table(box=box.SIMPLE)
    table.add_column(" \\ ".join(labels.get(key, key) for key in keys), justify="right")
    for value in columns:
        table.add_column(figure(keys[1], value, 3), justify="right")
    line, done = ProgressLine(), 0
    for row in rows:
        cells = [figure(keys[0], row, 3)]
        for column in columns:
            line.show(f"solving {done}/{len(rows) * len(columns)}")
            done += 1
            try:
                point = dict(zip(keys, (row, column), strict=True))
                plan = make_plan(sweep.trial_config({**middle, **point}))
                cells.append(f"{plan.noise_multiplier:.3f}")
            except InfeasibleError:
                cells.append("-")
        table.add_row(*cells)
    print(
        f"\nDP-SGD noise multiplier at stage_split={config.stage_split:.3g}, "
        "where - cannot be paid:"
    )
    Console().print(table)


def _grid(key: str, dimension: Dimension, points: int) -> list[Any]:
    """Evenly spaced values of a dimension, ends included."""
    if dimension.choices is not None:
        return list(dimension.choices)
    assert dimension.low is not None
    assert dimension.high is not None
    low, high = float(dimension.low), float(dimension.high)
    steps = [i / (points - 1) for i in range(points)]
    if dimension.log:
        values = [math.exp(math.log(low) + s * (math.log(high) - math.log(low))) for s in steps]
    else:
        values = [low + s * (high - low) for s in steps]
    if is_integer(key):
        return sorted({round(value) for value in values})
    return sorted(set(values))


def describe_dimension(dimension: Dimension) -> str:
    """Values of a key in words."""
    if dimension.choices is not None:
        return f"one of {', '.join(str(choice) for choice in dimension.choices)}"
    spacing = ", logarithmic" if dimension.log else ""
    spacing += f", step {dimension.step:g}" if dimension.step else ""
    return f"{dimension.low:g} to {dimension.high:g}{spacing}"


def _middle(key: str, dimension: Dimension) -> Any:
    values = _grid(key, dimension, 3)
    return values[len(values) // 2]
