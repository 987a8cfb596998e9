"""What people read of the ledger: its summary, and the privacy card of a publication."""

import math
from collections.abc import Mapping
from typing import Any

from core.config import PrivacyConfig
from core.privacy.ledger import Ledger
from core.privacy.mechanisms import LARGEST
from core.privacy.plan import PrivacyPlan
from core.privacy.scopes import share_of

RELATIONS = {
    "zero_out": "a record is replaced by an empty one; the number of records N is public",
    "replace_one": "a record is replaced by any other; the number of records N is public",
}
SCOPES = {
    "trial": (
        "Each trial alone is ({trial}, {delta})-differentially private. The choice among {trials} "
        "trials used their results and metrics that are not private; the end-to-end guarantee is "
        "not {trial} but {computed} by composition, and does not cover those metrics."
    ),
    "sweep": (
        "All {trials} trials together, whatever chose them, whenever they were stopped and "
        "whichever is published, are ({target}, {delta})-differentially private; what ran comes to "
        "{computed}. Metrics tagged non-private are not covered and chose nothing."
    ),
    "selection": (
        "The one trial that leaves, the best by {objective} of a secret number of trials "
        "({law} law of mean {mean:g}) whose settings were drawn alike, is ({target}, {delta})-"
        "differentially private with its selection. The other trials, their number, their scores "
        "and this sweep's logs must stay inside."
    ),
    "public": (
        "All settings were chosen on other, public data. The one run on this data is ({trial}, "
        "{delta})-differentially private."
    ),
}
ALONE = (
    "This one run, with settings given beforehand, is ({trial}, {delta})-differentially private."
)
AMONG_OTHERS = (
    "This run alone is ({trial}, {delta})-differentially private. It is one of {runs} trials on "
    "this data set, which together come to {everything}: that is the guarantee if their results "
    "had a part in choosing this one."
)
STOPPING = (
    " Trials could also be stopped early by their scores during training ({metric}: {tag}); one "
    "that was pays for the steps that it ran."
)
NOT_COVERED = (
    "metrics that are tagged non-private, and choices made by them beyond what is stated above",
    "floating-point effects: noise is float64 and rounded to float32 with the sum that it is added "
    "to; the last digits of a record's gradient may depend on the rest of its batch",
    "side channels such as timing, memory use and logs of the machines that trained",
    "other releases of the same data: those in this ledger add their epsilon, others are unknown",
    "compositions over trials whose noise was chosen by earlier results: PLD, which gives the "
    "figure, is proven for noise fixed beforehand (scope sweep is proven for both)",
    "numbers of steps that depend on results: a run ended by a time limit, by hand or by scores is "
    "charged for the steps that began, for which PLD is proven if their number was fixed "
    "beforehand (scope sweep is proven for both)",
    "facts about groups of records, which the guarantee covers only at a multiple of epsilon",
)
PUBLIC = (
    "the whole configuration: sample rates, divisors, clip norm, steps, network, seed",
    "the number N of training images, the list of classes, the image shape",
)


def make_card(
    ledger: Ledger,
    run: str,
    plan: PrivacyPlan,
    privacy: PrivacyConfig,
    identity: str,
    objective: str,
) -> dict[str, Any]:
    """The card of one sweep or of one released model.

    Args:
        ledger: of the data set.
        run: name in the ledger of the sweep or single run that the card is about.
        plan: of the trial that is released.
        privacy: the settings that decided it.
        identity: of that trial in the ledger.
        objective: the metric that chose it among several trials, with its tag.

    Returns:
        Plain data, ready for JSON. Under scope `selection` it says nothing of the other trials,
        and `epsilon_computed` is None, as it would tell their number.

    Raises:
        ValueError: the ledger has no entry of this trial; there is nothing to state.
    """
    summary = ledger.summary()
    entries = [entry for entry in summary["entries"] if entry["run"] == run]
    if identity not in {entry["trial"] for entry in entries}:
        raise ValueError(f"the ledger holds no entry of trial {identity[:16]} of {run}")
    trials, secret = len(entries), privacy.scope == "selection"
    everything = summary["epsilon_committed_and_reserved"]
    computed = ledger.epsilon_of_run(run)
    others = len(summary["entries"]) - trials
    released = {
        "trial": computed if trials > 1 else everything if others else plan.epsilon,
        "public": plan.epsilon,
    }.get(privacy.scope, privacy.target_epsilon)
    if secret:
        entries = [entry for entry in entries if entry["trial"] == identity]
    # The ledger's own grid depends on how many trials it holds.
    accountant = plan.summary()["accountant"] if secret else summary["accountant"]
    sentence = SCOPES[privacy.scope]
    stopping = ""
    if plan.early_metric and trials > 1:
        tag = plan.tag(plan.early_metric)
        stopping = STOPPING.format(metric=plan.early_metric, tag=tag)
    if trials == 1 and privacy.scope == "trial":
        sentence = AMONG_OTHERS if others else ALONE
    # Several runs one by one are a search too, and nobody knows of which; a sweep knows.
    candidates = trials if trials > 1 else trials + others
    chosen = {
        "selection": f"at random; of their secret number the best by {objective}",
        "public": f"on public data, by {objective}",
    }.get(privacy.scope, f"the best of {candidates} trials by {objective}")
    return {
        "statement": sentence.format(
            trial=f"{plan.epsilon:.4g}",
            computed=f"{computed:.4g}",
            target=f"{privacy.target_epsilon:.4g}",
            delta=f"{summary['delta']:g}",
            trials=trials,
            runs=trials + others,
            everything=f"{everything:.4g}",
            objective=objective,
            law=privacy.selection_law,
            mean=privacy.selection_mean,
        )
        + stopping,
        "scope": privacy.scope,
        "unit": summary["unit"],
        "neighboring_relation": summary["neighboring_relation"],
        "neighboring_relation_in_words": RELATIONS[summary["neighboring_relation"]],
        "num_examples": summary["num_examples"],
        "delta": summary["delta"],
        "target_epsilon": privacy.target_epsilon,
        "epsilon_trial": plan.epsilon,
        "epsilon_computed": None if secret else computed,
        "epsilon_released_with_selection": released,
        "epsilon_all_on_this_data_set": None if secret else everything,
        "odds": {
            name: odds(epsilon)
            for name, epsilon in (
                ("epsilon_trial", plan.epsilon),
                ("epsilon_released_with_selection", released),
            )
        },
        "accountant": accountant,
        "accountant_of_the_scope": accountant_of(privacy, accountant),
        "events": [
            {"trial": entry["trial"], "state": entry["state"], **event}
            for entry in entries
            for event in entry["events"]
        ],
        "hyperparameters_chosen_by": "given beforehand"
        if trials == 1 and not others and privacy.scope in ("trial", "sweep")
        else chosen,
        "public": list(PUBLIC),
        "not_covered": list(NOT_COVERED),
        "data_set_declared_public": plan.public_data,
    }


def accountant_of(privacy: PrivacyConfig, composition: str) -> str:
    """What bounds the epsilon of the scope, in words; `composition` where all is composed."""
    share = share_of(privacy)
    if share is None:
        return composition
    orders = " and ".join(str(order) for order in share.orders)
    theorem = {
        "sweep": "filter of Feldman and Zrnic 2021, valid for adaptively chosen trials",
        "selection": "private selection of Papernot and Steinke 2022, theorem 2",
    }[privacy.scope]
    return f"Renyi DP at order {orders} ({theorem})"


def odds(epsilon: float) -> str:
    """Epsilon in words (Nanayakkara et al. 2023): how much more likely any outcome may become."""
    if epsilon < LARGEST:
        times = math.exp(epsilon)
        figure = f"{times:,.{2 if times < 100 else 0}f}" if times < 1e6 else f"{times:.2g}"
    else:
        figure = f"exp({epsilon:.4g})"
    return (
        f"whatever somebody concludes from the release, they are at most {figure} times as likely "
        "to conclude it because one record was in the data"
    )


def three_epsilons(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and figure of the epsilons that are always stated together."""
    return [
        ("epsilon of one trial", _figure(card["epsilon_trial"])),
        ("epsilon of all that was computed", _figure(card["epsilon_computed"])),
        (
            "epsilon of the release with its selection",
            _figure(card["epsilon_released_with_selection"]),
        ),
    ]


def _figure(epsilon: float | None) -> str:
    return (
        "not told: it would give the number of trials away" if epsilon is None else f"{epsilon:.4g}"
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
        f"| data declared public | {'yes' if card['data_set_declared_public'] else 'no'} |",
        f"| delta | {card['delta']:g} |",
        *(f"| {name} | {value} |" for name, value in three_epsilons(card)),
        "| epsilon of all runs on this data set | "
        f"{_figure(card['epsilon_all_on_this_data_set'])} |",
        f"| target epsilon, scope | {card['target_epsilon']:g}, {card['scope']} |",
        f"| accountant of a trial | {card['accountant']} |",
        f"| accountant of the scope | {card['accountant_of_the_scope']} |",
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
