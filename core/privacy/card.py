"""What people read of the ledger: its summary, and the privacy card of a publication."""

import math
from collections.abc import Mapping
from typing import Any

RELATIONS = {
    "zero_out": "a record is replaced by an empty one; the number of records N is public",
    "replace_one": "a record is replaced by any other; the number of records N is public",
}
SCOPES = {
    "trial": (
        "Each trial alone is ({trial}, {delta:g})-differentially private. The choice among "
        "{trials} trials used their results and metrics that are not private; the end-to-end "
        "guarantee is not {trial} but {computed} by composition."
    ),
    "sweep": (
        "All {trials} trials together, whatever chose them and whichever is published, are "
        "({computed}, {delta:g})-differentially private."
    ),
}
NOT_COVERED = (
    "metrics that are tagged non-private, and choices made by them beyond what is stated above",
    "floating-point attacks on the noise, which is drawn in float64 and rounded to float32",
    "side channels such as timing, memory use and logs of the machines that trained",
    "other releases of the same data that are not in this ledger",
    "facts about groups of records, which the guarantee covers only at a multiple of epsilon",
)
PUBLIC = (
    "the whole configuration: sample rates, divisors, clip norm, steps, network, seed",
    "the number N of training images, the list of classes, the image shape",
)


def make_card(
    summary: Mapping[str, Any],
    run: str,
    *,
    scope: str,
    epsilon_trial: float,
    epsilon_computed: float,
    chosen_by: str,
) -> dict[str, Any]:
    """The card of one sweep or of one released model.

    Args:
        summary: `Ledger.summary()` of the data set.
        run: name in the ledger of the sweep or single run that the card is about.
        scope: `privacy.scope`.
        epsilon_trial: of the released trial alone.
        epsilon_computed: of all that this run computed, by composition.
        chosen_by: how the hyperparameters were chosen, in words.

    Returns:
        Plain data, ready for JSON.

    Raises:
        ValueError: the ledger has no entry of this run; there is nothing to state.
    """
    entries = [entry for entry in summary["entries"] if entry["run"] == run]
    if not entries:
        raise ValueError(f"the ledger holds no entry of {run}")
    released = epsilon_trial if len(entries) == 1 else epsilon_computed
    statement = SCOPES[scope].format(
        trial=f"{epsilon_trial:.4g}",
        computed=f"{epsilon_computed:.4g}",
        delta=summary["delta"],
        trials=len(entries),
    )
    return {
        "statement": statement,
        "scope": scope,
        "unit": summary["unit"],
        "neighboring_relation": summary["neighboring_relation"],
        "neighboring_relation_in_words": RELATIONS[summary["neighboring_relation"]],
        "num_examples": summary["num_examples"],
        "delta": summary["delta"],
        "epsilon_trial": epsilon_trial,
        "epsilon_computed": epsilon_computed,
        "epsilon_released_with_selection": released,
        "epsilon_all_on_this_data_set": summary["epsilon_committed_and_reserved"],
        "odds": {
            name: odds(epsilon)
            for name, epsilon in (
                ("epsilon_trial", epsilon_trial),
                ("epsilon_released_with_selection", released),
            )
        },
        "accountant": summary["accountant"],
        "events": [
            {"trial": entry["trial"], "state": entry["state"], **event}
            for entry in entries
            for event in entry["events"]
        ],
        "hyperparameters_chosen_by": chosen_by,
        "public": list(PUBLIC),
        "not_covered": list(NOT_COVERED),
        "data_set_fingerprint": summary["fingerprint"],
    }


def odds(epsilon: float) -> str:
    """Epsilon in words (Nanayakkara et al. 2023): how much more likely any outcome may become."""
    times = math.exp(epsilon)
    figure = f"{times:.2f}" if times < 100 else f"{times:,.0f}" if times < 1e6 else f"{times:.2g}"
    return (
        f"whatever somebody concludes from the release, they are at most {figure} times as likely "
        "to conclude it because one record was in the data"
    )


def card_markdown(card: Mapping[str, Any]) -> str:
    """The card as a page for people."""
    lines = [
        "# Privacy card",
        "",
        card["statement"],
        "",
        "| | |",
        "| --- | --- |",
        f"| unit of protection | {card['unit']} |",
        f"| neighbouring data sets | {card['neighboring_relation_in_words']} |",
        f"| number of records N | {card['num_examples']} |",
        f"| delta | {card['delta']:g} |",
        f"| epsilon of one trial | {card['epsilon_trial']:.4g} |",
        f"| epsilon of all that was computed | {card['epsilon_computed']:.4g} |",
        "| epsilon of the release with its selection | "
        f"{card['epsilon_released_with_selection']:.4g} |",
        f"| epsilon of all runs on this data set | {card['epsilon_all_on_this_data_set']:.4g} |",
        f"| accountant | {card['accountant']} |",
        f"| hyperparameters | {card['hyperparameters_chosen_by']} |",
        "",
        "In words, for the release with its selection: "
        f"{card['odds']['epsilon_released_with_selection']}, up to a probability of "
        f"{card['delta']:g}.",
        "",
        "## Releases",
        "",
        "| trial | mechanism | sample rate | noise multiplier | releases | state |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {event['trial'][:16]} | {event['kind']} | {event['sample_rate']:.6g} | "
        f"{event['noise_multiplier']:.6g} | {event['count']} | {event['state']} |"
        for event in card["events"]
    ]
    lines += ["", "## Public", "", *(f"- {item}" for item in card["public"])]
    lines += ["", "## Not covered", "", *(f"- {item}" for item in card["not_covered"])]
    return "\n".join([*lines, ""])


def ledger_text(summary: dict[str, Any]) -> str:
    """`Ledger.summary()` as text for a terminal, one line for each key."""
    budget = "without a cap" if summary["budget"] is None else f"of {summary['budget']:g}"
    lines = [
        f"data set {summary['fingerprint'][:16]}: N={summary['num_examples']} (public), delta "
        f"{summary['delta']:g}, {summary['neighboring_relation']}, unit {summary['unit']}",
        f"epsilon {summary['epsilon_committed_and_reserved']:.4g} {budget}, of which "
        f"{summary['epsilon_committed']:.4g} is settled ({summary['accountant']})",
        f"{'state':<10} {'steps':>13} {'epsilon':>8}  run, trial, stage, note",
    ]
    for entry in summary["entries"]:
        planned = entry["end_step"] - entry["first_step"]
        executed = "-" if entry["executed_steps"] is None else entry["executed_steps"]
        names = [entry["run"], entry["trial"][:16], entry["stage"], entry["note"]]
        lines.append(
            f"{entry['state']:<10} {f'{executed}/{planned}':>13} {entry['epsilon']:>8.4g}  "
            + ", ".join(name for name in names if name)
        )
    return "\n".join(lines)
