"""Review of a release: what an officer must see before signing, and what speaks against it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.config import Config
from core.io.files import numbers, read_json
from core.privacy.accounting.rounding import downward, upward
from core.privacy.ledger.account import ledger_of_run
from core.privacy.ledger.card import all_on_this_data_set, three_epsilons
from core.privacy.ledger.ledger import Ledger
from core.privacy.ledger.sources import Sources
from core.publish.proven import audit_failures, audit_lines
from core.publish.release import excess_of, release_card
from core.record.folder import RunFolder

_FIGURES = ("trial", "computed", "released_with_selection", "all_on_this_data_set")


def review(config: Config, run: RunFolder) -> tuple[str, list[str]]:
    """The page for the officer, as text for a terminal, and each point against signing.

    Raises:
        ConfigError: the run is not finished, or not the one that its selection released.
        LedgerError: its ledger is missing or damaged.

    Privacy: of a selection nothing is told but its one release; still for the owner alone, as an
        attack's figures are computed from real images without protection.
    """
    card = release_card(config, run.path)
    result = run.result()
    assert result is not None
    ledger = ledger_of_run(config, run.path, result.fingerprint)
    summary = ledger.summary()
    attacked, failures = _attacked(run)
    against = [*_objections(config, card, summary), *audit_failures(run), *failures]
    parts = {
        "Epsilon": _epsilons(card),
        f"History of data set {summary['name']}": _history(ledger, summary),
        "Audit": [*audit_lines(run), *attacked],
        "Not covered": card["not_covered"],
        "Against signing": against or ["nothing found"],
    }
    lines = [card["statement"]]
    for title, part in parts.items():
        lines += ["", title, *(f"  {line}" for line in part)]
    return "\n".join(lines), against


def _epsilons(card: Mapping[str, Any]) -> list[str]:
    everything = all_on_this_data_set(card)
    largest = max(filter(None, (card[f"epsilon_{name}"] for name in _FIGURES)))
    rows = [
        *three_epsilons(card),
        ("epsilon of all runs on this data set", everything),
        ("the largest of them", upward(largest)),
        ("target, scope", f"{upward(card['target_epsilon'])}, {card['scope']}"),
        ("delta, N (both public)", f"{upward(card['delta'], 6)}, {card['num_examples']}"),
    ]
    words = [card[kind]["epsilon_released_with_selection"] for kind in ("odds", "attack")]
    return [*(f"{name:<45} {text}" for name, text in rows), *words]


def _history(ledger: Ledger, summary: Mapping[str, Any]) -> list[str]:
    """A line for each run that was ever charged, and what is missing."""
    lines = [f"charged together as family {summary['family']}"] if summary["family"] else []
    lines.append(f"{'run':<28} {'trials':>6} {'open':>5} {'epsilon':>9}  since")
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for entry in summary["entries"]:
        runs.setdefault(entry["run"], []).append(entry)
    for run, entries in runs.items():
        since = min(entry["time"] for entry in entries)
        if run in summary["selections"]:  # How many trials it had is secret.
            lines.append(f"{run:<28} {'secret':>6} {'-':>5} {'target':>9}  {since}")
            continue
        still_open = sum(entry["state"] == "reserved" for entry in entries)
        epsilon = upward(ledger.epsilon_of_run(run))
        lines.append(f"{run:<28} {len(entries):>6} {still_open:>5} {epsilon:>9}  {since}")
    return [
        *lines,
        *(f"LOST before {each['time']}: {each['reason']}" for each in summary["losses"]),
    ]


def _attacked(run: RunFolder) -> tuple[list[str], list[str]]:
    """What `inspect` found."""
    if not run.inspection.exists():
        return [f"no attack: python -m core inspect --run-dir {run.path} attacks the model"], []
    found = numbers(read_json(run.inspection)["membership"])
    low, high = found["auc_interval"]
    line = (
        f"membership attack: area {found['auc']:.4f} (95 % interval {low:.4f} to {high:.4f}), "
        f"epsilon is at least {downward(found['epsilon_lower_bound'])}"
    )
    failed = [] if found["within_bound"] else ["the membership attack exceeds what epsilon allows"]
    return [line], failed


def _objections(config: Config, card: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    found = [each] if (each := excess_of(config, card)) else []
    if summary["losses"]:
        found.append("records of what was spent on the data were lost: no figure holds them")
    shared = Sources(Path(config.runtime.ledger)).shared_paths()
    path = config.dataset.path and str(Path(config.dataset.path).expanduser().resolve())
    if path in shared:
        found.append(
            f"'{path}' was read as several data sets with a ledger each, whose epsilons do not add "
            "up: if they hold the same records, no figure holds what the others spent"
        )
    return found
