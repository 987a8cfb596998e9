"""Results table of a sweep, read from the trials' folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from core.config import Config, flatten
from core.config.keys import CLUSTERS, COUNT, NOISE
from core.config.metrics import DIRECTIONS, HEADLINES
from core.errors import LedgerError
from core.io.code_digest import code_digest
from core.io.files import write_json
from core.io.terminal import counted
from core.privacy.accounting.rounding import figure, upward
from core.privacy.ledger.account import ledger_of_run
from core.privacy.ledger.card import all_on_this_data_set, card_markdown, make_card, three_epsilons
from core.privacy.ledger.ledger import Ledger
from core.privacy.plan.plan import PrivacyPlan, composed_epsilon
from core.record.folder import Result, RunFolder
from sweep.config.scope import DEFAULT_NUM_TRIALS, SEED, inside
from sweep.config.sweep import SweepConfig
from sweep.results.driver import running_driver
from sweep.results.replicates import Estimates, estimates, sentences

CARD = "privacy_card.md"
"""In the folder of a sweep, beside the same as JSON."""
EPSILONS = {
    "epsilon": "epsilon_trial",
    "epsilon_sweep": "epsilon_computed",
    "epsilon_released": "epsilon_released_with_selection",
}
"""Of a card, by the names of metrics."""


@dataclass(frozen=True)
class Row:
    """One trial.

    Attributes:
        state: `finished`, `stopped` (early, by the scheduler), `failed` or `unfinished`.
        scores: metrics by name; empty unless finished.
        error: why it has no scores.
        for_good: whether it failed as it would fail again with the code that runs now.
        early_score: the last one of a stopped trial.
        spent: epsilon of a stopped trial's steps.
    """

    trial: str
    run_dir: Path
    config: Config
    state: str
    scores: dict[str, float]
    plan: PrivacyPlan
    seconds: float
    error: str
    early_score: float | None = None
    spent: float | None = None
    for_good: bool = False

    @property
    def folder(self) -> RunFolder:
        """What the trial wrote."""
        return RunFolder(self.run_dir)

    @property
    def epsilon(self) -> float:
        """Epsilon of this trial alone: of its plan, or of the part that it ran."""
        return self.plan.epsilon if self.spent is None else self.spent


def load_rows(sweep: SweepConfig) -> list[Row]:
    """Every trial that has a folder, in the order in which they began."""
    folders = map(RunFolder, (sweep.folder / "trials").glob("*/"))
    rows = [_row(folder) for folder in folders if folder.config_file.exists()]
    return sorted(rows, key=lambda row: row.folder.config_file.stat().st_mtime_ns)


def _row(folder: RunFolder) -> Row:
    plan, ended, failure = folder.plan(), folder.result(), folder.failure()
    state, reason, spent, early, for_good = "unfinished", "", None, None, False
    result = ended.report if ended is not None else {}
    if ended is not None and ended.is_stopped:
        state, spent, early = "stopped", result["epsilon"], result[plan.early_metric]
        reason = f"stopped at step {result['step']}: {plan.early_metric} {early:.4g}"
    elif ended is not None:
        state = "finished"
    elif failure is not None:
        state, (identity, reason) = "failed", failure
        # A run asks its whole identity; what the driver does not know of it, as the device, stays.
        for_good = folder.begun_with() == (identity, code_digest())
    elif folder.error.exists():
        state, reason = "failed", folder.error.read_text().strip()
    return Row(
        trial=folder.path.name,
        run_dir=folder.path,
        config=folder.config(),
        state=state,
        scores={name: result[name] for name in DIRECTIONS if name in result},
        plan=plan,
        seconds=float(result.get("seconds", 0.0)),
        error=reason,
        early_score=early,
        spent=spent,
        for_good=for_good,
    )


def final_row(sweep: SweepConfig, rows: Sequence[Row]) -> Row | None:
    """The one run after the search, if there is to be one and it began."""
    return next((row for row in rows if sweep.final and row.config.is_final), None)


def best(sweep: SweepConfig, rows: Sequence[Row], by: str | None = None) -> Row | None:
    """The finished trial of the search with the best first objective, or the best `by` another.

    Of trials that are equal in it the one with the best others: it lies on the front.
    """
    objectives = sorted(sweep.objectives, key=lambda each: each.metric != by)
    return max(
        scored_rows(sweep, rows),
        key=lambda row: [objective.gain(row.scores) for objective in objectives],
        default=None,
    )


def winners(sweep: SweepConfig, rows: Sequence[Row]) -> list[Row]:
    """The best trial; of several objectives the Pareto front: no other trial is as good in all of
    them and better in one.
    """
    if len(sweep.objectives) == 1:
        return [row for row in [best(sweep, rows)] if row is not None]
    scored = scored_rows(sweep, rows)
    gains = [[each.gain(row.scores) for each in sweep.objectives] for row in scored]

    def beaten(mine: list[float]) -> bool:
        return any(
            all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine
            for other in gains
        )

    return [row for row, mine in zip(scored, gains, strict=True) if not beaten(mine)]


def score_estimates(sweep: SweepConfig, rows: Sequence[Row]) -> Estimates | None:
    """What the trials of one setting tell of the noise; None where no setting has two."""
    metric = sweep.objective.metric
    scored = scored_rows(sweep, rows)
    scores = [(_place(sweep, row), row.trial, row.scores[metric]) for row in scored]
    return estimates(scores, sweep.objective.direction == "maximize")


def setting_figures(sweep: SweepConfig, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Mean score and interval of the setting of each scored trial; empty without replicates."""
    if (found := score_estimates(sweep, rows)) is None:
        return {}
    scored = scored_rows(sweep, rows)
    return {row.trial: found.figures(found.at(_place(sweep, row))) for row in scored}


def recommended(sweep: SweepConfig, rows: Sequence[Row]) -> Row | None:
    """The first trial of the setting with the best mean score; without replicates the best."""
    if (found := score_estimates(sweep, rows)) is None:
        return best(sweep, rows)
    return next(row for row in rows if row.trial == found.settings[0].trial)


def told_of_noise(sweep: SweepConfig, rows: Sequence[Row]) -> list[str]:
    """Sentences on the recommended setting and on what is noise; none without replicates."""
    found = score_estimates(sweep, rows)
    preset = tuple(sweep.preset.values())
    return sentences(found, sweep.objective.metric, preset) if found else []


def _place(sweep: SweepConfig, row: Row) -> tuple[Any, ...]:
    values = flatten(row.config)
    return tuple(values[key] for key in sweep.search_space if key != SEED)


def scored_rows(sweep: SweepConfig, rows: Sequence[Row]) -> list[Row]:
    """The trials of the search that have all scores that choose; never the final run."""
    last = final_row(sweep, rows)
    return [row for row in rows if row is not last and set(sweep.metrics) <= set(row.scores)]


def num_planned(sweep: SweepConfig) -> int | None:
    """Trials that the search is to have; None under scope `selection`, where that is secret."""
    secret = sweep.run.privacy.covers.is_secret
    return None if secret else sweep.num_trials or DEFAULT_NUM_TRIALS


def num_left(sweep: SweepConfig, rows: Sequence[Row]) -> int:
    """Planned trials of the search that have not ended; 0 where their number is secret."""
    last = final_row(sweep, rows)
    ended = sum(row.state != "unfinished" for row in rows if row is not last)
    return max(0, (num_planned(sweep) or 0) - ended)


def planned_epsilon(rows: Sequence[Row], num_trials: int = 0) -> float:
    """Epsilon of the whole plans of all trials that began, composed by PLD; needs no ledger.

    Args:
        num_trials: if more than began, each that is still to come counts as the last that did.
    """
    plans = [row.plan for row in rows]
    return composed_epsilon([*plans, *plans[-1:] * (num_trials - len(plans))])


def sweep_epsilon(sweep: SweepConfig, rows: Sequence[Row]) -> float:
    """Epsilon of publishing everything that the trials computed.

    Privacy: what the ledger holds of the sweep; before any trial has ended, and so told where its
        ledger is, `planned_epsilon`.

    Raises:
        LedgerError: the ledger is missing or damaged.
    """
    ended = [best(sweep, rows), *(row for row in rows if row.state == "stopped")]
    for row in filter(None, ended):
        return _ledger(row).epsilon_of_run(sweep.name)
    return planned_epsilon(rows)


def sweep_card(sweep: SweepConfig, rows: Sequence[Row], released: Row) -> dict[str, Any]:
    """The sweep's privacy card, of its `released_row`.

    Raises:
        LedgerError: the ledger is missing or damaged.
    """
    return make_card(
        _ledger(released),
        sweep.name,
        released.plan,
        released.config.privacy,
        _result(released).identity,
        _objective(sweep, rows),
        searched=True,
    )


def write_card(
    sweep: SweepConfig, rows: Sequence[Row], released: Row, complete: bool
) -> dict[str, Any]:
    """Writes the card into the sweep's folder; a complete sweep marks what may be released.

    Only what `claimed_row` would claim has a card, of selections a complete one; its ledger notes
    the trial for good.

    Raises:
        LedgerError: the ledger is missing or damaged, or notes another trial of the selection.
    """
    if released.config.privacy.covers.is_secret:
        left = [row for row in rows if row.folder.selected.exists()]
        if left and released not in left:  # Also where the ledger has lost its note of it.
            raise LedgerError(
                f"trial {left[0].trial} of selection {sweep.name} may have left already, and no "
                "other may: choose another name for another selection"
            )
        _ledger(released).select(sweep.name, _result(released).identity)
    card = sweep_card(sweep, rows, released)
    path = sweep.folder / CARD
    write_json(path.with_suffix(".json"), card)
    path.write_text(card_markdown(card))
    for row in rows:
        row.folder.selected.unlink(missing_ok=True)
    front = winners(sweep, rows)
    for row in (front if released in front else [released]) if complete else []:
        write_json(row.folder.selected, {"objective": _objective(sweep, rows)})
    return card


def withdraw_card(sweep: SweepConfig, rows: Sequence[Row]) -> None:
    """Takes back what a sweep claimed before it goes on: further trials belong to the claim.

    A selection keeps its mark: no other trial may ever leave.
    """
    if not sweep.run.privacy.covers.is_secret:
        card = sweep.folder / CARD
        for path in (card, card.with_suffix(".json"), *(row.folder.selected for row in rows)):
            path.unlink(missing_ok=True)


def released_row(sweep: SweepConfig, rows: Sequence[Row]) -> Row | None:
    """The one that may be published: the best trial; or the final run after them.

    None while there is none that has finished.
    """
    if not sweep.final:
        return best(sweep, rows)
    last = final_row(sweep, rows)
    return last if last is not None and last.state == "finished" else None


def claimed_row(sweep: SweepConfig, rows: Sequence[Row]) -> tuple[Row | None, str]:
    """What a claim can be made about: what may be published, or None and why there is none.

    Privacy: the best trial so far of a selection that is not complete is not the one that leaves.
        Where the claim counts what chose the trial, the trials still to come belong to it too.
    """
    released, covers = released_row(sweep, rows), sweep.run.privacy.covers
    if covers.claims_each and (left := num_left(sweep, rows)):
        total = num_planned(sweep) or 0
        state = "running" if running_driver(sweep.folder) else "not finished"
        ended = f"{total - left} of {counted(total, 'trial')} ended"
        spent = upward(planned_epsilon(rows, total))
        planned = f": all together are planned to spend epsilon {spent}" if rows else ""
        return None, f"sweep: {state}, {ended}, {_NO_CLAIM}{planned}"
    if covers.is_secret and not any(row.folder.selected.exists() for row in rows):
        return None, f"selection: not complete, {_NO_CLAIM}"
    last = final_row(sweep, rows)
    if last is not None and last.state == "failed":
        return None, f"final run: failed ({last.error}), {_NO_CLAIM}"
    return released, f"final run: not finished, {_NO_CLAIM}"


def _objective(sweep: SweepConfig, rows: Sequence[Row]) -> str:
    winner = best(sweep, rows)
    assert winner is not None
    return " and ".join(f"{metric} ({winner.plan.tag(metric)})" for metric in sweep.metrics)


def three_figures(card: Mapping[str, Any]) -> dict[str, float]:
    """The card's epsilons under the names of metrics, but for those that must stay secret."""
    return {name: card[key] for name, key in EPSILONS.items() if card[key] is not None}


def shown_metrics(sweep: SweepConfig, rows: Sequence[Row]) -> list[str]:
    """The scores that a table has columns for: the usual ones and the objective."""
    shown = {*HEADLINES, sweep.objective.metric}
    return [name for name in DIRECTIONS if name in shown and any(name in r.scores for r in rows)]


def print_results(sweep: SweepConfig, rows: list[Row], pruned: int, ui: str) -> None:
    """Prints the table, the best trial, the epsilons and where to look next."""
    winner = best(sweep, rows)
    released, none_yet = claimed_row(sweep, rows)
    metrics = shown_metrics(sweep, rows)
    print(inside([sweep]), end="")
    tried, left_out = counted(len(rows), "trial"), counted(pruned, "point")
    print(f"sweep {sweep.name}: {tried}, {left_out} pruned without compute")
    total = sweep_epsilon(sweep, rows)
    front = winners(sweep, rows)
    print_whole(results_table(sweep, rows, front, metrics, total))
    for row in rows:
        if row.state == "failed":
            print(f"trial {row.trial} failed: {row.error}")
        elif row.state == "stopped":
            print(f"trial {row.trial} {row.error}")
    if winner is None:
        if num_left(sweep, rows):
            print(none_yet + _how_to_go_on(sweep, rows))
        return
    if len(sweep.objectives) > 1:
        print(f"Pareto front by {' and '.join(sweep.metrics)} (* in the table):")
    title = "best trial: " if len(sweep.objectives) == 1 else "  "
    for row in front:
        print(f"{title}{row.trial} ({_scores(row)})")
    for line in told_of_noise(sweep, rows):
        print(line)
    if released is None:
        print(none_yet + _how_to_go_on(sweep, rows))
    else:
        _print_released(sweep, rows, released, total)
    print(f"compare: {ui}")


def print_whole(table: Table) -> None:
    """Prints a table at its own width: a narrow terminal wraps, rather than hides, figures."""
    natural = Console(width=1000).measure(table).maximum
    Console(width=max(Console().width, natural)).print(table)


def _how_to_go_on(sweep: SweepConfig, rows: Sequence[Row]) -> str:
    last = final_row(sweep, rows)
    if running_driver(sweep.folder) or (last and last.for_good):
        return ""
    text = "; the same command goes on"
    total, left = num_planned(sweep) or 0, num_left(sweep, rows)
    if 0 < left < total and sweep.run.privacy.covers.claims_each:
        text += f", or ends the sweep here with num_trials={total - left}"
    return text


def _print_released(sweep: SweepConfig, rows: Sequence[Row], released: Row, total: float) -> None:
    if sweep.final:
        print(f"final run: {released.trial} ({_scores(released)})")
    card = sweep_card(sweep, rows, released)
    print(f"privacy: {card['statement']}")
    for name, value in three_epsilons({**card, "epsilon_computed": total}):
        print(f"  {name}: {value}")
    spent = all_on_this_data_set(card)
    print(f"  epsilon of all runs on this data set: {spent} (python -m core ledger show)")
    if (path := sweep.folder / CARD).exists():  # Not before the end.
        print(f"card: {path}")
    print(f"samples: {released.folder.grid}")


def _scores(row: Row) -> str:
    """Scores with their tags, equal tags said once."""
    by_tag: dict[str, list[str]] = {}
    for name, value in row.scores.items():
        by_tag.setdefault(row.plan.tag(name), []).append(f"{name} {value:.4g}")
    return "; ".join(f"{', '.join(scores)}: {tag}" for tag, scores in by_tag.items())


def _result(row: Row) -> Result:
    result = row.folder.result()
    assert result is not None
    return result


def _ledger(row: Row) -> Ledger:
    return ledger_of_run(row.config, row.run_dir, _result(row).fingerprint)


def results_table(
    sweep: SweepConfig,
    rows: Sequence[Row],
    starred: Sequence[Row],
    metrics: Sequence[str],
    total: float,
) -> Table:
    """One line for each trial; the best one, or the Pareto front, is `starred`."""
    table = Table(box=box.SIMPLE)
    columns = ["trial", "count", "noise", "split"]
    others = [k for k in sweep.search_space if k not in (*_SHOWN, SEED)]
    columns += [key.replace(".", " ") for key in others]  # Breaks there if it must.
    total_so_far = "eps so far" if num_left(sweep, rows) else "eps sweep"
    means, scored = score_estimates(sweep, rows), {r.trial for r in scored_rows(sweep, rows)}
    columns += ["DP-SGD noise", "eps trial", total_so_far, *metrics]
    columns += [*([f"mean {sweep.objective.metric}"] if means else []), "seconds"]
    for name in columns:
        first = name == "trial"
        table.add_column(name, justify="left" if first else "right", no_wrap=first)
    for row in rows:
        flat, easy = flatten(row.config), row.plan.central or row.plan.moments
        cells = [row.trial + (" *" if row in starred else "")]
        cells += [
            easy_count(row.plan),
            f"{easy.noise_multiplier:.3g}" if easy else "-",
            f"{flat['stage_split']:.2f}",
        ]
        cells += [figure(key, flat[key], 3) for key in others]
        cells += [f"{row.plan.noise_multiplier:.4f}", upward(row.epsilon), upward(total)]
        cells += [
            f"{row.scores[m]:.4g}" if m in row.scores else row.state for m in metrics or ["state"]
        ][: len(metrics)]
        if means:
            cells += [means.interval(means.at(_place(sweep, row))) if row.trial in scored else "-"]
        cells += [f"{row.seconds:.0f}" if row.seconds else row.state]
        table.add_row(*cells)
    return table


_NO_CLAIM = "so nothing is claimed yet"
_SHOWN = (COUNT, CLUSTERS, NOISE, "stage_split")


def easy_count(plan: PrivacyPlan) -> str:
    """Central images of each class, or clusters of moments; a dash without either."""
    if plan.central:
        return str(plan.central.num_releases)
    return str(plan.moments.num_clusters) if plan.moments else "-"
