"""`--plan`: what a sweep would run and which of its points the budget can pay; reads no data."""

import math
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from core.account import COUNT, NOISE
from core.errors import InfeasibleError
from core.privacy.card import accountant_of
from core.privacy.plan import composed_epsilon, make_plan
from core.reporting import ProgressLine
from sweep.config import Dimension, SweepConfig, is_integer
from sweep.costs import print_costs
from sweep.scope import DEFAULT_NUM_TRIALS

_POINTS = 4


def print_plan(sweep: SweepConfig, probe: bool = False) -> None:
    """Prints trials, search space, the solved noise multiplier over count x noise, and costs.

    Args:
        probe: whether to measure the time of a step on random images.
    """
    middle = {key: _middle(key, dimension) for key, dimension in sweep.search_space.items()}
    config = sweep.trial_config(middle)
    privacy = config.privacy
    total = sweep.num_trials or DEFAULT_NUM_TRIALS
    secret = privacy.scope == "selection"
    trials = f"a secret number of trials (mean {privacy.selection_mean:g})"
    trials = trials if secret else f"{total} trials"
    print(
        f"sweep {sweep.name}: {trials} of {sweep.workers_per_trial} workers each, "
        f"{config.training.num_steps} steps, scope {privacy.scope} at epsilon "
        f"{privacy.target_epsilon:g}, delta {privacy.target_delta:g}, "
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
    print(f"epsilon of one trial in the middle of the space: {plan.epsilon:.4g}")
    if privacy.scope == "trial":
        together = composed_epsilon([plan] * total)
        print(f"epsilon of all {total} together, and so of choosing among them: {together:.4g}")
    else:
        print(
            f"epsilon that scope {privacy.scope} claims: {privacy.target_epsilon:g}, by "
            f"{accountant_of(privacy)}"
        )
    print_costs(sweep, config, privacy.selection_mean if secret else total, probe)


def _print_grid(sweep: SweepConfig, middle: dict[str, Any]) -> None:
    config = sweep.trial_config(middle)
    current = {
        COUNT: config.central_images.per_class,
        NOISE: config.central_images.noise_multiplier,
    }
    counts, noises = (
        _grid(key, sweep.search_space[key], _POINTS)
        if key in sweep.search_space
        else [current[key]]
        for key in (COUNT, NOISE)
    )
    table = Table(box=box.SIMPLE)
    table.add_column("count \\ noise", justify="right")
    for noise in noises:
        table.add_column(f"{noise:.3g}", justify="right")
    line, done = ProgressLine(), 0
    for count in counts:
        cells = [str(count)]
        for noise in noises:
            line.show(f"solving {done}/{len(counts) * len(noises)}")
            done += 1
            try:
                plan = make_plan(sweep.trial_config({**middle, COUNT: count, NOISE: noise}))
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
