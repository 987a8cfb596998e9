"""Scopes: what the target epsilon covers, as `privacy.scope` says, in one table.

A rule of a scope is an attribute here; its share and its budget are in `privacy.plan.scopes`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scope:
    """One scope.

    Attributes:
        statement: the guarantee, as the card states it.
        claims_each: whether each trial is a claim of its own, whose terms may differ.
        covers_choice: whether the target covers all that chose the trial, too; else it is what one
            trial may spend.
        splits_target: whether trials share it; by shares, with a budget for all of them.
        tunes_first: whether tuning trials come before the one final run, all charged as a whole
            with the first of them.
        is_secret: whether only the best trial leaves, and how many there were must stay secret.
        chosen_on_public_data: whether all trials but one run are on other, public data.
        chosen: by what the trial was chosen.
        owner_states, chosen_by_owner: the same where no search of this project vouches for it.
        theorem: what proves it where trials have shares; empty: they have none.
        published: what may leave, in words.
        ways: for every sampler, for `asha` and for `replace_one` whether the guarantee is `proven`
            and by what, `covered, loose`, or `refused` and why.
    """

    statement: str
    claims_each: bool = False
    covers_choice: bool = False
    splits_target: bool = False
    tunes_first: bool = False
    is_secret: bool = False
    chosen_on_public_data: bool = False
    chosen: str = "the best of {among} by {objective}"
    owner_states: str = ""
    chosen_by_owner: str = ""
    theorem: str = ""
    published: str = ""
    ways: Mapping[str, str] = field(default_factory=dict[str, str])

    def refusal(self, way: str) -> str:
        """Why a way to search is refused; empty if it is not."""
        cell = self.ways[way]
        return cell.removeprefix(_REFUSED) if cell.startswith(_REFUSED) else ""


_REFUSED = "refused: "
_ZERO_OUT = f"{_REFUSED}proven for zero_out alone"
_PLD = "proven: PLD, Koskela et al. 2020"
COMPOSED = "adaptive composition of Zhu, Dong and Wang 2022, theorem 10"
"""What proves trials that references bound."""
_TUNED = "proven: Zhu, Dong and Wang 2022, theorem 10"
_FILTER = f"{_TUNED}, where tighter; else Renyi filter, Feldman and Zrnic 2021"
SAMPLERS = ("random", "grid", "tpe", "gp", "nsga2")


def _ways(random: str, grid: str, adaptive: str, asha: str, replace_one: str) -> dict[str, str]:
    samplers = zip(SAMPLERS, (random, grid, *[adaptive] * 3), strict=True)
    return {**dict(samplers), "asha": asha, "replace_one": replace_one}


SCOPES = {
    "trial": Scope(
        "Each trial alone is ({trial}, {delta})-differentially private. The choice among {trials} "
        "trials used their results and metrics that are not private; the end-to-end guarantee is "
        "not {trial} but {computed} by composition, and does not cover those metrics.",
        claims_each=True,
        published="any one trial; of the search only its composition",
        ways=_ways(_PLD, _PLD, "covered, loose: each trial alone", "covered, loose", _PLD),
    ),
    "sweep": Scope(
        "All {trials} trials together, whatever chose them, whenever they were stopped and "
        "whichever is published, are ({target}, {delta})-differentially private; what ran comes to "
        "{computed}. Metrics tagged non-private are not covered and chose nothing.",
        covers_choice=True,
        splits_target=True,
        theorem="filter of Feldman and Zrnic 2021, valid for adaptively chosen trials",
        published="every trial",
        ways=_ways(
            _PLD,
            _PLD,
            _FILTER,
            "covered, loose: a stopped trial counts whole, except by the Renyi filter",
            "proven: PLD, with `random` or `grid` alone",
        ),
    ),
    "tune_then_train": Scope(
        "Up to {tuning} tuning trials and the final run after them, whatever chose their settings, "
        "whenever they were stopped and whichever is published, are together ({target}, {delta})-"
        "differentially private. Metrics tagged non-private are not covered and chose nothing.",
        covers_choice=True,
        tunes_first=True,
        chosen="by {objective}, among the tuning trials",
        theorem=COMPOSED,
        published="every trial and the final run",
        ways=_ways(
            _TUNED, _TUNED, _TUNED, "covered, loose: a stopped trial counts whole", _ZERO_OUT
        ),
    ),
    "selection": Scope(
        "The one trial that leaves, the best by {objective} of a secret number of trials "
        "({law} law of mean {mean:g}) whose settings were drawn alike, is ({target}, {delta})-"
        "differentially private with its selection. The other trials, their number, their scores "
        "and this sweep's logs must stay inside.",
        covers_choice=True,
        is_secret=True,
        chosen="at random; of their secret number the best by {objective}",
        theorem="private selection of Papernot and Steinke 2022, theorem 2",
        published="the best trial alone",
        ways=_ways(
            "proven: selection by profiles, core/privacy/accounting/selection.py",
            f"{_REFUSED}takes each point once",
            f"{_REFUSED}learns from results",
            f"{_REFUSED}stops trials by their results",
            _ZERO_OUT,
        ),
    ),
    "public": Scope(
        "All settings were chosen on other, public data. The one run on this data is ({trial}, "
        "{delta})-differentially private.",
        chosen_on_public_data=True,
        chosen="on public data, by {objective}",
        owner_states="As the owner of the data states, all settings were chosen on other, public "
        "data; no search of this project vouches for it. The one run on this data is ({trial}, "
        "{delta})-differentially private.",
        chosen_by_owner="on public data, as its owner states",
        published="the one run; the search is on other, public data",
        ways=_ways(_PLD, _PLD, _PLD, _PLD, _PLD),
    ),
}
