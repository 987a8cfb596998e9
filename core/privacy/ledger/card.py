"""Privacy card of a publication, and the ledger's summary in words."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from core.config import PrivacyConfig
from core.config.scopes import Scope
from core.errors import LedgerError
from core.privacy.accounting.rounding import attack, odds, upward
from core.privacy.ledger.book import UNBOUNDED
from core.privacy.ledger.ledger import Ledger, events_of
from core.privacy.plan.plan import PrivacyPlan
from core.privacy.plan.scopes import STAYS_INSIDE, members_found, share_of

RELATIONS = {
    "zero_out": "a record is replaced by an empty one; the number of records N is public",
    "replace_one": "a record is replaced by any other; the number of records N is public",
}
ALONE = (
    "This one run, with settings given beforehand, is ({trial}, {delta})-differentially private."
)
ONLY_SO_FAR = (
    "This trial alone is ({trial}, {delta})-differentially private. It is so far the only one of "
    "its sweep; every further one adds to the end-to-end guarantee, as their results choose among "
    "them."
)
AMONG_OTHERS = (
    "This run alone is ({trial}, {delta})-differentially private. It is one of {runs} releases on "
    "this data set, which together are ({everything}, {delta_of_all})-differentially private: that "
    "is the guarantee if their results had a part in choosing this one."
)
SUMMED = (
    "; each selection, tuned run or sweep below references (here {count}) counts as the one "
    "release that it claims, whose epsilon and delta are added"
)
STOPPING = " Trials could also be stopped early by their scores during training ({metric}: {tag})."
FAMILY = (
    " The data sets of family {family} are charged together: an epsilon of several runs covers a "
    "record that lies in each of them."
)
LOST = (
    " Records of what was spent on the data before {time} were lost: they are not included, and "
    "whether those results had a part in choosing this run is not known. The owner's reason: "
    "{reason}"
)
NOT_COVERED = (
    "metrics that are tagged non-private, and choices made by them beyond what is stated above",
    "floating-point effects: noise is float64 and rounded to float32 with the sum that it is added "
    "to; the last digits of a record's gradient may depend on the rest of its batch",
    "side channels such as timing, memory use and logs of the machines that trained",
    "other releases of the same data: those in this ledger add their epsilon, others are unknown",
    "other data sets with the same records: this card knows only runs on exactly this content, in "
    "this order, format and numbering of classes, or on what shares its dataset.family",
    "compositions over trials whose noise was chosen by earlier results: PLD, which gives the "
    "figure, is proven for noise fixed beforehand "
    "(scopes sweep and tune_then_train are proven for both)",
    "numbers of steps that depend on results: a run ended by a time limit, by hand or by scores is "
    "charged for the steps that began, for which PLD is proven if their number was fixed "
    "beforehand (scopes sweep and tune_then_train are proven for both)",
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
    searched: bool,
) -> dict[str, Any]:
    """The card of one sweep or of one released model.

    Args:
        ledger: of the data set.
        run: name in the ledger of the sweep or single run that the card is about.
        plan: of the trial that is released.
        privacy: the settings that decided it.
        identity: of that trial in the ledger.
        objective: the metric that chose it among several trials, with its tag.
        searched: whether a sweep has chosen the trial; else what scope `public` says of the
            settings is the owner's word alone.

    Returns:
        Plain data, ready for JSON. `epsilon_trial` is the largest of the run's trials,
        `epsilon_released_trial` that of the released one. Under scope `selection` nothing is said
        of the other trials, and `epsilon_computed` is None, as it would tell their number.
        Everything holds at `delta` but what has a delta of its own, and `attack`, which needs none.

    Privacy: the same whatever the number of trials of a selection is, of this run or of others.

    Raises:
        LedgerError: it has no entry of this trial, as after a loss, so there is nothing to state,
            or one of other releases than those of the plan; or of its selection another trial
            leaves, or none yet.
    """
    summary, secret = ledger.summary(), privacy.covers.is_secret
    entries = _entries_of(ledger, summary["entries"], run, identity, plan, secret)
    trials, others = len(entries), summary["num_releases"] - len(entries)
    in_sweep = searched or run in summary["sweeps"]
    everything = summary["epsilon_committed_and_reserved"]
    delta, delta_of_all = summary["delta"], summary["delta_committed_and_reserved"]
    computed = 0.0 if secret else ledger.epsilon_of_run(run)
    largest = plan.epsilon if trials == 1 else max(plan.epsilon, ledger.largest_epsilon(run))
    by_all = trials == 1 and others > 0 and privacy.covers.claims_each
    of_trial = plan.epsilon if trials == 1 or not privacy.covers.claims_each else computed
    choosing = privacy.target_epsilon if privacy.covers.covers_choice else of_trial
    released = everything if by_all and not privacy.covers.covers_choice else choosing
    # The ledger's own grid depends on how many trials it holds.
    accountant = plan.summary()["accountant"] if secret else summary["accountant"]
    return {
        "statement": _statement(
            summary, plan, privacy, trials, objective, searched, in_sweep, largest, computed
        ),
        "scope": privacy.scope,
        "unit": summary["unit"],
        "neighboring_relation": summary["neighboring_relation"],
        "neighboring_relation_in_words": RELATIONS[summary["neighboring_relation"]],
        "num_examples": plan.num_examples,
        "delta": delta,
        "target_epsilon": privacy.target_epsilon,
        "epsilon_trial": largest,
        "epsilon_released_trial": plan.epsilon,
        "epsilon_computed": None if secret else computed,
        "epsilon_released_with_selection": released,
        "delta_released_with_selection": delta_of_all if by_all else delta,
        "epsilon_all_on_this_data_set": everything,
        "delta_all_on_this_data_set": delta_of_all,
        "odds": dict(epsilon_trial=odds(largest), epsilon_released_with_selection=odds(released)),
        "attack": _attacks(ledger, run, plan, privacy, trials, by_all),
        "accountant": accountant,
        "accountant_of_the_scope": accountant_of(privacy, accountant),
        "accountant_of_all_on_this_data_set": _accountant_of_all(summary),
        "events": [
            {"trial": entry["trial"], "state": entry["state"], **event}
            for entry in entries
            for event in entry["events"]
        ],
        "hyperparameters_chosen_by": _chosen_by(
            privacy.covers, trials, others, objective, searched, in_sweep
        ),
        "public": list(PUBLIC),
        "not_covered": list(NOT_COVERED),
        "data_set_declared_public": plan.public_data,
    }


def _attacks(
    ledger: Ledger, run: str, plan: PrivacyPlan, privacy: PrivacyConfig, trials: int, by_all: bool
) -> dict[str, str]:
    """What an attack on the released trial finds, and one on the release with its selection."""

    def of_release(false_alarms: float) -> float:
        if privacy.has_shares or privacy.covers.splits_target:  # With the trials still to come.
            return members_found(privacy, false_alarms)
        if by_all:
            return ledger.members_found(false_alarms)
        if trials == 1 or privacy.covers.chosen_on_public_data:
            return plan.members_found(false_alarms)
        return ledger.members_found(false_alarms, run)

    return {
        "epsilon_released_trial": attack(plan.members_found),
        "epsilon_released_with_selection": attack(of_release),
    }


def _entries_of(
    ledger: Ledger,
    entries: list[dict[str, Any]],
    run: str,
    identity: str,
    plan: PrivacyPlan,
    secret: bool,
) -> list[dict[str, Any]]:
    """The entries that the card is about: of a selection that of the trial that leaves."""
    of_run = [entry for entry in entries if entry["run"] == run]
    of_trial = [entry for entry in of_run if entry["trial"] == identity]
    if not of_trial:
        raise LedgerError(
            f"the ledger '{ledger.path}' holds no entry of trial {identity[:16]} of {run}: restore "
            "the ledger that it was charged to, as nothing can be stated without it"
        )
    planned = [asdict(event) for event in events_of(plan)]
    for entry in of_trial:  # Of whose releases some may be shared with other trials.
        if [event | {"release": ""} for event in entry["events"]] != planned:
            raise LedgerError(
                f"the ledger '{ledger.path}' charged trial {identity[:16]} of {run} for other "
                "releases than those of its privacy.json: restore the file that the run wrote"
            )
    if secret and ledger.selected(run) != identity:
        raise LedgerError(
            f"trial {identity[:16]} is not the one that selection {run} ended with, so nothing "
            "can be claimed about it: release the selected one, once all trials have ended"
        )
    return of_trial if secret else of_run


def _statement(
    summary: Mapping[str, Any],
    plan: PrivacyPlan,
    privacy: PrivacyConfig,
    trials: int,
    objective: str,
    searched: bool,
    in_sweep: bool,
    largest: float,
    computed: float,
) -> str:
    """The first guarantee that applies, and all that is to be added to it."""
    everything, metric = summary["epsilon_committed_and_reserved"], plan.early_metric
    scope, others = privacy.covers, summary["num_releases"] - trials
    guarantees = (
        (scope.owner_states and not searched, scope.owner_states),
        (scope.claims_each and trials == 1 and others, AMONG_OTHERS),
        (scope.claims_each and trials == 1 and in_sweep, ONLY_SO_FAR),
        (scope.claims_each and trials == 1, ALONE),
        (True, scope.statement),
    )
    additions = (
        (metric and trials > 1, STOPPING),  # Never of a selection.
        (everything == math.inf, UNBOUNDED),
        (summary["family"], FAMILY),
    )
    sentence = next(text for applies, text in guarantees if applies)
    sentence += "".join(text for applies, text in additions if applies)
    return sentence.format(
        trial=upward(largest),
        computed=upward(computed),
        target=upward(privacy.target_epsilon),
        delta=upward(summary["delta"], 6),
        trials=trials,
        tuning=privacy.num_shares,
        runs=trials + others,
        everything=upward(everything),
        delta_of_all=upward(summary["delta_committed_and_reserved"], 6),
        objective=objective,
        law=privacy.selection_law,
        mean=privacy.selection_mean,
        metric=metric,
        tag=metric and plan.tag(metric),
        family=summary["family"],
    ) + "".join(LOST.format(**loss) for loss in summary["losses"])


def _chosen_by(
    scope: Scope, trials: int, others: int, objective: str, searched: bool, in_sweep: bool
) -> str:
    alone = not (scope.is_secret or scope.chosen_on_public_data)
    if alone and trials == 1 and not others:
        return "by a sweep, so far in its only trial" if in_sweep else "given beforehand"
    # Several runs one by one are a search too, and nobody knows of which; a sweep knows.
    among = f"{trials} trials" if trials > 1 else f"{trials + others} releases on this data set"
    chosen = scope.chosen if searched else scope.chosen_by_owner or scope.chosen
    return chosen.format(among=among, objective=objective)


def accountant_of(privacy: PrivacyConfig, composition: str) -> str:
    """What bounds the epsilon of the scope, in words; `composition` where all is composed."""
    share = share_of(privacy)
    return composition if share is None else share.accountant


def _accountant_of_all(summary: Mapping[str, Any]) -> str:
    """What bounds the epsilon of all runs on a data set, in words."""
    count = summary["num_wholes"]
    return summary["accountant"] + (SUMMED.format(count=count) if count else "")


def three_epsilons(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and figure of the epsilons that are always stated together."""
    return [
        ("epsilon of one trial", upward(card["epsilon_trial"])),
        ("epsilon of all that was computed", _figure(card["epsilon_computed"])),
        ("epsilon of the release with its selection", _at(card, "released_with_selection")),
    ]


def all_on_this_data_set(card: Mapping[str, Any]) -> str:
    """Epsilon of all runs on the data set, with its delta if that is not the card's."""
    return _at(card, "all_on_this_data_set")


def _at(card: Mapping[str, Any], name: str) -> str:
    epsilon, delta = card[f"epsilon_{name}"], card[f"delta_{name}"]
    return upward(epsilon) + ("" if delta == card["delta"] else f" at delta {upward(delta, 6)}")


def _figure(epsilon: float | None) -> str:
    if epsilon is None:
        return "not told: it would give the number of trials away"
    return upward(epsilon)


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
        f"| delta | {upward(card['delta'], 6)} |",
        *(f"| {name} | {value} |" for name, value in three_epsilons(card)),
        f"| epsilon of all runs on this data set | {all_on_this_data_set(card)} |",
        f"| target epsilon, scope | {upward(card['target_epsilon'])}, {card['scope']} |",
        f"| accountant of a trial | {card['accountant']} |",
        f"| accountant of the scope | {card['accountant_of_the_scope']} |",
        f"| accountant of all runs | {card['accountant_of_all_on_this_data_set']} |",
        f"| hyperparameters | {card['hyperparameters_chosen_by']} |",
        "",
        "In words, for the release with its selection: "
        f"{card['odds']['epsilon_released_with_selection']}, up to a probability of "
        f"{upward(card['delta_released_with_selection'], 6)}. And by the privacy losses "
        f"themselves, {card['attack']['epsilon_released_with_selection']}; of the released trial "
        f"alone, {card['attack']['epsilon_released_trial']}.",
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
    budget = "without a cap"
    if summary["budget"] is not None:
        budget = f"of {upward(summary['budget'])}"
    lines = [STAYS_INSIDE] if summary["selections"] else []
    lines += [f"family {summary['family']}"] if summary["family"] else []
    lines += [
        f"data set {summary['name']}: N={summary['num_examples']} (public), delta "
        f"{upward(summary['delta'], 6)}, {summary['neighboring_relation']}, unit "
        f"{summary['unit']}",
        f"epsilon {_at(summary, 'committed_and_reserved')} {budget}, of which "
        f"{upward(summary['epsilon_committed'])} is settled ({_accountant_of_all(summary)})",
        *(f"LOST before {each['time']}: {each['reason']}" for each in summary["losses"]),
        f"{'state':<10} {'steps':>13} {'epsilon':>8}  run, identity, stage, note",
    ]
    for entry in summary["entries"]:
        planned = entry["end_step"] - entry["first_step"]
        executed = "-" if entry["executed_steps"] is None else entry["executed_steps"]
        names = [entry["run"], entry["trial"][:16], entry["stage"], entry["note"]]
        lines.append(
            f"{entry['state']:<10} {f'{executed}/{planned}':>13} {upward(entry['epsilon']):>8}  "
            + ", ".join(name for name in names if name)
        )
    lines.append("identity: that in evaluation.json of the run's folder, which the note may name")
    return "\n".join(lines)
