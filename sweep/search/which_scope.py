"""Answer of `--plan` to "which scope?": every scope for the sweep at hand, and the one advised."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from core.config.scopes import SAMPLERS, SCOPES
from core.privacy.accounting.rounding import upward
from core.privacy.plan.compare import Figures, compare_scopes
from sweep.config.scope import DEFAULT_NUM_TRIALS, NON_ADAPTIVE, final_point
from sweep.config.sweep import SweepConfig
from sweep.costs.estimate import stored_speed
from sweep.costs.usage import devices_per_trial
from sweep.results.table import print_whole


def print_which_scope(sweep: SweepConfig, point: Mapping[str, Any]) -> None:
    """Prints a table of all scopes and one sentence that recommends.

    Args:
        point: of the space, at which the noise is solved.
    """
    last = final_point(sweep.run.privacy.covers, point, sweep.final) if sweep.final else point
    config = sweep.trial_config(last)
    total = sweep.num_trials or DEFAULT_NUM_TRIALS
    rows = compare_scopes(config, total, sweep.sampler not in NON_ADAPTIVE)
    speed = stored_speed(sweep, config)
    hours = speed and speed.of_trial(config) * devices_per_trial(sweep) / 3600
    table = Table(box=box.SIMPLE)
    for name in ("scope", "final noise", "end-to-end epsilon", "device hours"):
        table.add_column(name, justify="left" if name == "scope" else "right")
    for name in ("samplers", "may be published"):
        table.add_column(name)
    for row in rows:
        scope = SCOPES[row.scope]
        table.add_row(
            row.scope,
            "-" if row.noise_multiplier is None else f"{row.noise_multiplier:.3f}",
            upward(row.epsilon),
            f"{row.trainings:g} runs" if hours is None else f"{hours * row.trainings:.3g}",
            ", ".join(sampler for sampler in SAMPLERS if not scope.refusal(sampler)),
            scope.published,
        )
    print("\nwhich scope? for a search like this one, in the middle of the space:")
    print_whole(table)
    for row in rows:
        if SCOPES[row.scope].tunes_first and row.noise_multiplier is None:
            key = "tuning_epsilon" if config.privacy.tuning_noise is None else "tuning_noise"
            value = getattr(config.privacy, key)
            print(f"scope {row.scope} cannot pay at privacy.{key}={value}: try another")
    print(_advice(rows, config.dataset.public))


def _advice(rows: list[Figures], public_data: bool) -> str:
    if public_data:
        return "recommended: scope trial, as the data is public; search for other data by public"
    alone = next(row for row in rows if row.scope == "public").noise_multiplier
    covering = [row for row in rows if SCOPES[row.scope].covers_choice and row.noise_multiplier]
    if not covering or alone is None:
        return "recommended: a larger privacy.target_epsilon, as no scope can pay for such a search"
    best = min(covering, key=lambda row: row.noise_multiplier or 0.0)
    return (
        f"recommended: scope {best.scope}, which leaves the least noise of those whose epsilon "
        f"covers the search ({best.noise_multiplier:.3f}, without any search {alone:.3f}); if "
        "settings can be found on other, public data, scope public"
    )
