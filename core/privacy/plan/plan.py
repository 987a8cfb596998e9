"""Privacy plan: the only source of numbers for samplers, clips, noise and reports.

`make_plan(config)` solves the DP-SGD noise multiplier that is left after the easy stage's releases,
so that both stages together spend the target epsilon. It touches no data.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from itertools import chain
from typing import Any

from core.config import Config, PrivacyConfig, load, nested
from core.errors import ConfigError, InfeasibleError
from core.io.files import numbers
from core.privacy.accounting import renyi, solve
from core.privacy.accounting.mechanism import (
    FINE,
    Mechanism,
    discretization_for,
    grouped,
    quick_grid,
)
from core.privacy.accounting.rounding import upward
from core.privacy.plan.releases import (
    RELEASES,
    Aggregate,
    CentralPlan,
    DpSgdPlan,
    FrequencyPlan,
    MomentsPlan,
    Release,
    ScorePlan,
    planned,
    solved,
)
from core.privacy.plan.scopes import alike_share, filter_share, share_of
from core.privacy.plan.shares import Share

_MIXTURE = 1e-3
_ROUNDING = 1e-6
"""By how much another version's accountant may find another epsilon for a kept plan."""


@dataclass(frozen=True)
class PrivacyPlan:
    """Everything one trial releases, and what it costs, as of `accounting`.

    Attributes:
        target_epsilon: what `scope` covers, which may be more than this trial.
        public_data: whether the data set is public, as its owner states.
        epsilon: of this trial alone.
        epsilon_central: of its central images alone, or of the moments in their place.
        epsilon_frequency: of its frequency features alone.
        epsilon_score: by how much its private scores raise `epsilon`.
        early_metric: what it is scored by during training, and may be stopped by; empty: by none.
    """

    num_examples: int
    target_epsilon: float
    delta: float
    neighboring_relation: str
    scope: str
    public_data: bool
    central: CentralPlan | None
    dp_sgd: DpSgdPlan
    score: ScorePlan | None
    epsilon: float
    epsilon_central: float
    epsilon_score: float
    early_metric: str = ""
    frequency: FrequencyPlan | None = None
    epsilon_frequency: float = 0.0
    moments: MomentsPlan | None = None

    @property
    def is_private(self) -> bool:
        """False for `method=non_private`, which no ledger takes and nothing may release."""
        return math.isfinite(self.epsilon)

    @property
    def noise_multiplier(self) -> float:
        """DP-SGD's noise multiplier; of a method without it that of its one release."""
        alone = None if self.dp_sgd.num_steps else self.moments or self.frequency
        return (alone or self.dp_sgd).noise_multiplier

    @property
    def epsilon_dp_sgd(self) -> float:
        """Epsilon of DP-SGD alone, at most about 0.1 % too large.

        With those of the other stages it adds up to more than all.
        """
        if not self.is_private:
            return math.inf
        if not self.dp_sgd.num_steps:
            return 0.0
        alone = (self.dp_sgd.mechanism,)
        grid = quick_grid(alone)
        return solve.epsilon_of_mechanisms(alone, self.delta, self.neighboring_relation, grid)

    def tag(self, metric: str) -> str:
        """How private a metric is: `public`, `dp(...)` with its cost, or `non-private`."""
        if metric in ("dp_accuracy", "early_dp_accuracy"):
            return f"dp(epsilon +{upward(self.epsilon_score, 2)})"
        return "public" if self.public_data else "non-private"

    @property
    def statement(self) -> str:
        """The guarantee of this trial alone, in words."""
        if not self.is_private:
            return (
                "This run is NOT private: it trained without noise and clipping (epsilon is "
                "infinite). It is a ceiling to compare with; nothing of it may leave."
            )
        unit = {
            "zero_out": "replacing one image and its label by an empty record",
            "replace_one": "replacing one image and its label by any other",
        }[self.neighboring_relation]
        return (
            f"This trial alone is ({upward(self.epsilon)}, {upward(self.delta, 6)})-differentially "
            f"private for {unit}; the public facts are the configuration, with "
            f"N={self.num_examples}."
        )

    @property
    def releases(self) -> list[Release]:
        """All that is released, in the order in which it runs."""
        return _made(getattr(self, name) for name in RELEASES)

    @property
    def mechanisms(self) -> list[Mechanism]:
        """What the accountant composes."""
        return [each.mechanism for each in self.releases]

    @property
    def other_mechanisms(self) -> list[Mechanism]:
        """What is released in any case, however many DP-SGD steps run and at whatever noise."""
        return [each.mechanism for each in self.releases if each is not self.dp_sgd]

    def members_found(self, false_alarms: float) -> float:
        """The largest share of members that any attack on this trial finds, see `tradeoff`.

        Args:
            false_alarms: share of non-members that it is wrong about, in [0, 1].
        """
        from core.privacy.accounting import tradeoff  # Loads the accountant, which takes a second.

        return tradeoff.members_found(
            tuple(self.mechanisms), self.neighboring_relation, false_alarms
        )

    def epsilon_after(self, steps: int) -> float:
        """Epsilon of this trial when it ends after so many DP-SGD steps; its scores count whole."""
        rate, noise_multiplier, _ = self.dp_sgd.mechanism
        executed = [(rate, noise_multiplier, steps)] if steps else []
        return solve.epsilon_of_mechanisms(
            (*self.other_mechanisms, *executed), self.delta, self.neighboring_relation, FINE
        )

    @classmethod
    def restored(cls, summary: Mapping[str, Any]) -> "PrivacyPlan":
        """The plan whose `summary` was kept; nothing is solved again."""
        kept: dict[str, Any] = {
            name: kind(**numbers(summary[name])) if summary.get(name) else None
            for name, kind in RELEASES.items()
        }
        names = {field.name for field in fields(cls)} & summary.keys() - RELEASES.keys()
        return cls(**kept, **numbers({name: summary[name] for name in names}))

    def summary(self) -> dict[str, Any]:
        """Plain data for privacy.json."""
        return {
            **asdict(self),
            "accountant": solve.accountant_of(
                self.epsilon, self.mechanisms, self.delta, self.neighboring_relation
            ),
            "statement": self.statement,
        }


def check_stages(config: Config, exact: bool = True) -> dict[str, float]:
    """Epsilon that each release of the easy stage alone spends; quick, as DP-SGD is not solved.

    Args:
        exact: False is faster and about 0.1 % too large.

    Returns:
        The figures by the release's field in the plan; 0 for one that is not made.

    Raises:
        InfeasibleError: one exceeds what a trial may spend, or no accountant reaches the target.
    """
    if config.method != "non_private":
        problem = _problem(config)
        mechanisms = problem.with_noise(1.0)
        solve.check_reach(problem.target_epsilon, mechanisms, problem.delta, problem.relation)
    stages = {name: kind for name, kind in RELEASES.items() if issubclass(kind, Aggregate)}
    return {name: _check_alone(kind, config, exact) for name, kind in stages.items()}


def _check_alone(kind: type[Aggregate], config: Config, exact: bool) -> float:
    plan, privacy = kind.of(config), config.privacy
    if plan is None or kind is RELEASES[solved(config)]:
        return 0.0
    discretization = FINE if exact else quick_grid([plan.mechanism])
    epsilon = _epsilon([plan.mechanism], privacy, discretization)
    if (share := share_of(privacy)) is not None:
        used = share.used([plan.mechanism])
        too_dear = f"take {used:.3g} times {share.measure} epsilon" if used >= 1 else ""
    else:
        paid = _repeated([plan.mechanism], _copies(privacy))
        alone = _epsilon(paid, privacy, discretization)
        too_dear = f"alone spend epsilon {upward(alone)} of"
        too_dear = too_dear if alone >= privacy.target_epsilon else ""
    if too_dear:
        raise InfeasibleError(
            f"the {kind.title} {too_dear} {upward(privacy.target_epsilon)}: {kind.remedy(config)}"
        )
    return epsilon


def check_feasible(config: Config) -> None:
    """Whether some DP-SGD noise keeps the total within the target, without solving for it.

    Raises:
        InfeasibleError: the budget cannot pay; the reason is that of `make_plan`.
    """
    if config.method == "non_private":
        return
    check_stages(config)
    if (share := share_of(config.privacy)) is not None:
        share.check_room(_problem(config, trials=1))
    else:
        solve.check_room(_problem(config))


def make_plan(config: Config) -> PrivacyPlan:
    """Solves the DP-SGD noise multiplier under the total budget, in seconds.

    Raises:
        InfeasibleError: the budget cannot pay; says which stage is too dear and the remedy.
    """
    check_stages(config)
    privacy, total = config.privacy, None
    if config.method == "non_private":
        noise_multiplier, total = 0.0, math.inf
    elif (share := share_of(privacy)) is not None:
        noise_multiplier = share.solve_noise_multiplier(_problem(config, trials=1))
    else:
        noise_multiplier, of_all = solve.solve_noise_multiplier(_problem(config))
        total = None if privacy.covers.splits_target else of_all
    return _plan_with(config, noise_multiplier, total)


def resumed_plan(config: Config, plan: PrivacyPlan) -> PrivacyPlan:
    """The plan that a run began with: checked by composing it anew, but not solved again.

    A newer accountant may solve a noise multiplier that differs in its last digits; a run goes on
    with the one that it was charged for.

    Raises:
        ConfigError: it is not a plan of the configuration, states a wrong epsilon, or exceeds the
            target.
    """
    if changed := _disagreements(config, plan):
        raise ConfigError(
            f"the kept privacy plan does not agree with the configuration in {', '.join(changed)}: "
            "restore the run's privacy.json, or choose a new run folder"
        )
    return plan


def _disagreements(config: Config, plan: PrivacyPlan) -> list[str]:
    privacy, private = config.privacy, config.method != "non_private"
    terms = _terms(config, plan.noise_multiplier)
    if changed := [name for name, value in terms.items() if getattr(plan, name) != value]:
        return changed
    if not (0 < plan.noise_multiplier < math.inf if private else plan.noise_multiplier == 0):
        return ["noise_multiplier"]
    found = _plan_with(config, plan.noise_multiplier, None if private else math.inf)
    if private and found.epsilon > 3 * privacy.target_epsilon:  # Whatever epsilon it states.
        return ["target_epsilon"]
    for name in ("epsilon", "epsilon_central", "epsilon_frequency", "epsilon_score"):
        stated, value = getattr(plan, name), getattr(found, name)
        if not math.isclose(stated, value, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
            changed.append(name)
    if private and not changed:
        if (share := share_of(privacy)) is not None:
            used = share.used(plan.mechanisms)
        else:
            paid = _repeated(plan.mechanisms, _copies(privacy))
            used = _epsilon(paid, privacy) / privacy.target_epsilon
        changed += ["target_epsilon"] if used > 1 + _ROUNDING else []
    return changed


def _plan_with(config: Config, noise_multiplier: float, total: float | None) -> PrivacyPlan:
    """The plan at a noise multiplier; `total` is its epsilon, if that is known."""
    privacy, terms = config.privacy, _terms(config, noise_multiplier)
    releases = _made(terms[name] for name in RELEASES)
    total = total or _epsilon([plan.mechanism for plan in releases], privacy)
    alone, by_score = check_stages(config), 0.0
    if (name := solved(config)) in alone:
        alone[name] = _epsilon([terms[name].mechanism], privacy)
    if (score := terms["score"]) is not None:
        by_score = total - _epsilon(
            [plan.mechanism for plan in releases if plan is not score], privacy
        )
    return PrivacyPlan(
        **terms,
        epsilon=total,
        epsilon_central=alone["central"] or alone["moments"],
        epsilon_frequency=alone["frequency"],
        epsilon_score=by_score,
    )


def estimated_noise_multiplier(config: Config) -> float:
    """DP-SGD's noise multiplier as of `make_plan`, to about 0.3 % and faster: to show, not to use.

    Raises:
        InfeasibleError: the budget cannot pay.
    """
    check_stages(config, exact=False)
    if (share := share_of(config.privacy)) is not None:
        return share.solve_noise_multiplier(_problem(config, trials=1))
    return solve.estimated_noise_multiplier(_problem(config))


def estimated_composition(
    config: Config, noise_multiplier: float, trials: int
) -> tuple[float, str]:
    """Epsilon of `trials` equal trials together, slightly too large and quick: to show; by what."""
    problem = _problem(config, trials)
    mechanisms = problem.with_noise(noise_multiplier)
    privacy, grid = config.privacy, quick_grid(mechanisms)
    epsilon = _epsilon(mechanisms, privacy, grid)
    by = solve.accountant_of(
        epsilon, mechanisms, privacy.target_delta, privacy.neighboring_relation
    )
    return epsilon, by


def composed_epsilon(plans: Sequence[PrivacyPlan]) -> float:
    """Epsilon of publishing everything that several trials on the same data computed.

    Raises:
        ValueError: the plans differ in delta or neighbouring relation.
    """
    if len({(plan.delta, plan.neighboring_relation) for plan in plans}) > 1:
        raise ValueError("plans of one sweep must share delta and neighbouring relation")
    if not plans:
        return 0.0
    first = plans[0]
    mechanisms = grouped(each for plan in plans for each in plan.mechanisms)
    grid = discretization_for(mechanisms, sum(plan.epsilon for plan in plans))
    return solve.epsilon_of_mechanisms(mechanisms, first.delta, first.neighboring_relation, grid)


def _terms(config: Config, noise_multiplier: float) -> dict[str, Any]:
    """All of a plan but what it costs."""
    privacy = config.privacy
    return {
        "num_examples": config.dataset.num_examples,
        "target_epsilon": privacy.target_epsilon,
        "delta": privacy.target_delta,
        "neighboring_relation": privacy.neighboring_relation,
        "scope": privacy.scope,
        "public_data": config.dataset.public,
        **planned(config, noise_multiplier),
        "early_metric": config.early_metric,
    }


def _made(plans: Iterable[Release | None]) -> list[Release]:
    """Those that release anything."""
    return [plan for plan in plans if plan is not None and plan.mechanism[-1]]


def _epsilon(
    mechanisms: Sequence[Mechanism],
    terms: PrivacyConfig,
    discretization: float = FINE,
) -> float:
    return solve.epsilon_of_mechanisms(
        tuple(mechanisms), terms.target_delta, terms.neighboring_relation, discretization
    )


def flat(mechanisms: Iterable[Mechanism]) -> tuple[float, ...]:
    """Mechanisms as the configuration holds those of a reference."""
    return tuple(chain.from_iterable(mechanisms))


def reference(config: Config) -> tuple[Mechanism, ...]:
    """What a trial with these settings may release at most, if all that share it are alike.

    Raises:
        InfeasibleError: the budget cannot pay for trials like this one.
    """
    check_stages(config, exact=False)
    share, problem = share_of(config.privacy), _problem(config)
    assert share is not None
    return problem.with_noise(share.solve_noise_multiplier(problem))


def tuning_config(config: Config) -> Config:
    """The tuning trial with the settings of a final run, under scope `tune_then_train`."""
    steps = max(1, round(config.privacy.tuning_steps * config.training.num_steps))
    return load(nested(config), {"training.num_steps": steps})


def tuning_references(tuning: Config, final: Config) -> dict[str, tuple[float, ...]]:
    """What a tuning trial and the final run may release at most, under scope `tune_then_train`.

    Args:
        tuning: a tuning trial, without references.
        final: a final run.

    Returns:
        Both references by their dotted keys.

    Raises:
        InfeasibleError: the budget cannot pay for tuning trials and a final run like these.
    """
    privacy, problem = tuning.privacy, _problem(tuning)
    noise = privacy.tuning_noise
    if privacy.tuning_epsilon is not None:
        remedy = f"raise privacy.tuning_epsilon, or {problem.remedy}"
        alone = replace(problem, target_epsilon=privacy.tuning_epsilon, remedy=remedy)
        # Rounded up to a public figure of few digits.
        noise = solve.rounded_up(solve.solve_noise_multiplier(alone)[0], 3)
    assert noise is not None
    found = {"privacy.tuning_reference": flat(problem.with_noise(noise))}
    last = load(nested(final), {**found, "privacy.is_final_run": True})
    return {**found, "privacy.final_reference": flat(reference(last))}


def sweep_reference(smoothest: Config, others: Iterable[Config]) -> dict[str, tuple[float, ...]]:
    """What each trial of scope `sweep` may release at most, if that takes no more noise than a
    filter of Renyi DP.

    It follows from settings alone, which are public and fixed before the first trial.

    Args:
        smoothest: the trial that is as the reference.
        others: at which that must hold, too.

    Returns:
        The reference by its dotted key; empty where the filter is tighter, or PLD ends.
    """
    privacy, problem = smoothest.privacy, _problem(smoothest, trials=1)
    alike = alike_share(privacy)
    noise = alike and _least_noise(alike, problem)
    if alike is None or noise is None:
        return {}
    bound = replace(alike, reference=problem.with_noise(noise))
    for each in {problem, *(_problem(other, trials=1) for other in others)}:
        filtered = _least_noise(filter_share(privacy), each)
        if filtered is not None and bound.used(each.with_noise(filtered)) > 1:
            return {}
    return {"privacy.tuning_reference": flat(bound.reference)}


@lru_cache(maxsize=64)  # A sweep is scoped when it is loaded, and again before it runs.
def _least_noise(share: Share, problem: solve.Problem) -> float | None:
    try:
        return share.solve_noise_multiplier(problem)
    except InfeasibleError:
        return None


def smoothness(config: Config) -> tuple[int, float]:
    """The larger, the nearer to normal is the privacy loss: steps of DP-SGD, and little else."""
    problem = _problem(config)
    return problem.num_steps, -renyi.divergence(problem.spent, 2)


def _copies(privacy: PrivacyConfig) -> int:
    """How often the target pays for a trial: for each share of a sweep."""
    return privacy.num_shares if privacy.covers.splits_target else 1


def _repeated(mechanisms: Iterable[Mechanism], times: int) -> tuple[Mechanism, ...]:
    return tuple((rate, noise_multiplier, times * n) for rate, noise_multiplier, n in mechanisms)


def _problem(config: Config, trials: int | None = None) -> solve.Problem:
    """Which noise the target leaves; for so many trials together, by default its copies."""
    privacy, times = config.privacy, trials or _copies(config.privacy)
    plans = planned(config, math.inf)
    sought = plans.pop(solved(config))
    assert sought is not None
    rate, _, steps = sought.mechanism
    others = _made(plans.values())
    remedies = [each.remedy(config) for each in others]
    if not others:
        alone = [] if isinstance(sought, Aggregate) else [sought.remedy(config)]
        remedies = ["raise privacy.target_epsilon", *alone]
    return solve.Problem(
        _repeated((each.mechanism for each in others), times),
        rate,
        times * steps,
        # Trials that differ do not compose exactly like equal ones: a little is kept for that.
        privacy.target_epsilon * (1 - _MIXTURE if privacy.covers.splits_target else 1),
        privacy.target_delta,
        privacy.neighboring_relation,
        sought.title,
        ", or ".join(remedies),
    )
