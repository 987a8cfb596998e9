"""Privacy plan: the only source of numbers for samplers, clips, noise and reports.

`make_plan(config)` solves the DP-SGD noise multiplier that is left after the easy stage's releases,
so that both stages together spend the target epsilon. It touches no data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

from core.config import Config, PrivacyConfig
from core.errors import ConfigError, InfeasibleError
from core.io.terminal import numbers
from core.privacy.accounting import solve
from core.privacy.accounting.mechanism import (
    FINE,
    Mechanism,
    discretization_for,
    grouped,
    quick_grid,
)
from core.privacy.accounting.rounding import upward
from core.privacy.plan.releases import (
    CentralPlan,
    DpSgdPlan,
    FrequencyPlan,
    ScorePlan,
    central_plan,
    dp_sgd_plan,
    dp_sgd_sample_rate,
    frequency_plan,
    score_plan,
)
from core.privacy.plan.scopes import Share, share_of

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
        epsilon_central: of its central images alone.
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

    @property
    def is_private(self) -> bool:
        """False for `method=non_private`, which no ledger takes and nothing may release."""
        return math.isfinite(self.epsilon)

    @property
    def noise_multiplier(self) -> float:
        """DP-SGD's noise multiplier."""
        return self.dp_sgd.noise_multiplier

    @property
    def epsilon_dp_sgd(self) -> float:
        """Epsilon of DP-SGD alone, at most about 0.1 % too large.

        With those of the other stages it adds up to more than all.
        """
        if not self.is_private:
            return math.inf
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
    def mechanisms(self) -> list[Mechanism]:
        """All that is released, in the order in which it runs."""
        stages = (self.central, self.frequency, self.dp_sgd, self.score)
        return [stage.mechanism for stage in stages if stage is not None]

    @property
    def beside_dp_sgd(self) -> list[Mechanism]:
        """What is released in any case, however many DP-SGD steps run and at whatever noise."""
        stages = (self.central, self.frequency, self.score)
        return [stage.mechanism for stage in stages if stage is not None]

    def epsilon_after(self, steps: int) -> float:
        """Epsilon of this trial when it ends after so many DP-SGD steps; its scores count whole."""
        rate, noise_multiplier, _ = self.dp_sgd.mechanism
        executed = [(rate, noise_multiplier, steps)] if steps else []
        return solve.epsilon_of_mechanisms(
            (*self.beside_dp_sgd, *executed), self.delta, self.neighboring_relation, FINE
        )

    @classmethod
    def restored(cls, summary: Mapping[str, Any]) -> "PrivacyPlan":
        """The plan whose `summary` was kept; nothing is solved again."""
        central = CentralPlan(**summary["central"]) if summary["central"] else None
        kept = summary.get("frequency")  # Older summaries have none.
        frequency = FrequencyPlan(**kept) if kept else None
        score = ScorePlan(**summary["score"]) if summary["score"] else None
        dp_sgd = DpSgdPlan(**numbers(summary["dp_sgd"]))
        names = {field.name for field in fields(cls)} - {"central", "frequency", "dp_sgd", "score"}
        rest = numbers({name: summary[name] for name in names if name in summary})
        return cls(central=central, frequency=frequency, dp_sgd=dp_sgd, score=score, **rest)

    def summary(self) -> dict[str, Any]:
        """Plain data for privacy.json."""
        return {
            **asdict(self),
            "accountant": solve.accountant_of(
                self.epsilon, self.mechanisms, self.delta, self.neighboring_relation
            ),
            "statement": self.statement,
        }


def check_central(config: Config, exact: bool = True) -> float:
    """Epsilon that the central images alone spend; quick, as DP-SGD is not solved.

    Args:
        exact: False is faster and about 0.1 % too large.

    Raises:
        InfeasibleError: it exceeds what one trial may spend, or no accountant reaches the target.
    """
    if config.method != "non_private":
        *_, target, delta, relation = question = _question(config)
        fixed, rate, steps = question[:3]
        solve.check_reach(target, [*fixed, (rate, 1.0, steps)], delta, relation)
    central = config.central_images
    remedy = (
        f"lower central_images.per_class ({central.per_class}) or raise "
        f"central_images.noise_multiplier ({central.noise_multiplier:g})"
    )
    return _check_alone("central images", remedy, central_plan(config), config.privacy, exact)


def check_frequency(config: Config, exact: bool = True) -> float:
    """The same for the frequency features."""
    remedy = f"raise frequency.noise_multiplier ({config.frequency.noise_multiplier:g})"
    plan = frequency_plan(config)
    return _check_alone("frequency features", remedy, plan, config.privacy, exact)


def _check_alone(
    name: str,
    remedy: str,
    plan: CentralPlan | FrequencyPlan | None,
    privacy: PrivacyConfig,
    exact: bool,
) -> float:
    if plan is None:
        return 0.0
    discretization = FINE if exact else quick_grid([plan.mechanism])
    epsilon = _epsilon([plan.mechanism], privacy, discretization)
    if (share := share_of(privacy)) is not None:
        used = share.used([plan.mechanism])
        too_dear = f"take {used:.3g} times the trial's share of epsilon" if used >= 1 else ""
    else:
        paid = _repeated([plan.mechanism], _copies(privacy))
        alone = _epsilon(paid, privacy, discretization)
        too_dear = f"alone spend epsilon {upward(alone)} of"
        too_dear = too_dear if alone >= privacy.target_epsilon else ""
    if too_dear:
        raise InfeasibleError(f"the {name} {too_dear} {upward(privacy.target_epsilon)}: {remedy}")
    return epsilon


def check_feasible(config: Config) -> None:
    """Whether some DP-SGD noise keeps the total within the target, without solving for it.

    Raises:
        InfeasibleError: the budget cannot pay; the reason is that of `make_plan`.
    """
    if config.method == "non_private":
        return
    check_central(config)
    check_frequency(config)
    if (share := share_of(config.privacy)) is not None:
        _solve_within(share, config)
    else:
        solve.check_room(*_question(config))


def make_plan(config: Config) -> PrivacyPlan:
    """Solves the DP-SGD noise multiplier under the total budget, in seconds.

    Raises:
        InfeasibleError: the budget cannot pay; says which stage is too dear and the remedy.
    """
    check_central(config)
    check_frequency(config)
    privacy, total = config.privacy, None
    if config.method == "non_private":
        noise_multiplier, total = 0.0, math.inf
    elif (share := share_of(privacy)) is not None:
        noise_multiplier = _solve_within(share, config)
    else:
        noise_multiplier, of_all = _solve(*_question(config))
        total = of_all if privacy.scope != "sweep" else None
    return _plan_with(config, noise_multiplier, total)


def kept_plan(config: Config, plan: PrivacyPlan) -> PrivacyPlan:
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
    if private:
        if not 0 < plan.noise_multiplier < math.inf:
            return ["noise_multiplier"]
    elif plan.noise_multiplier:
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
    central, frequency, dp_sgd = terms["central"], terms["frequency"], terms["dp_sgd"]
    stages = [stage.mechanism for stage in (central, frequency, dp_sgd) if stage is not None]
    total = total or _epsilon([*_fixed(config), dp_sgd.mechanism], privacy)
    return PrivacyPlan(
        **terms,
        epsilon=total,
        epsilon_central=check_central(config),
        epsilon_score=0.0 if terms["score"] is None else total - _epsilon(stages, privacy),
        epsilon_frequency=check_frequency(config),
    )


def estimated_noise_multiplier(config: Config) -> float:
    """DP-SGD's noise multiplier as of `make_plan`, to about 0.3 % and faster: to show, not to use.

    Raises:
        InfeasibleError: the budget cannot pay.
    """
    check_central(config, exact=False)
    check_frequency(config, exact=False)
    if (share := share_of(config.privacy)) is not None:
        return _solve_within(share, config)
    return solve.estimated_noise_multiplier(*_question(config))


def estimated_composition(
    config: Config, noise_multiplier: float, trials: int
) -> tuple[float, str]:
    """Epsilon of `trials` equal trials together, slightly too large and quick: to show; by what."""
    dp_sgd = (dp_sgd_sample_rate(config), noise_multiplier, config.private_steps)
    mechanisms = _repeated([*_fixed(config), dp_sgd], trials)
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
        "central": central_plan(config),
        "dp_sgd": dp_sgd_plan(config, noise_multiplier),
        "score": score_plan(config),
        "early_metric": config.early_metric,
        "frequency": frequency_plan(config),
    }


def _epsilon(
    mechanisms: Sequence[Mechanism],
    terms: PrivacyConfig,
    discretization: float = FINE,
) -> float:
    return solve.epsilon_of_mechanisms(
        tuple(mechanisms), terms.target_delta, terms.neighboring_relation, discretization
    )


def _fixed(config: Config) -> tuple[Mechanism, ...]:
    """What a trial releases beside DP-SGD."""
    stages = (central_plan(config), frequency_plan(config), score_plan(config))
    return tuple(stage.mechanism for stage in stages if stage is not None)


def _solve_within(share: Share, config: Config) -> float:
    rate = dp_sgd_sample_rate(config)
    return share.solve_noise_multiplier(_fixed(config), rate, config.private_steps)


def _copies(privacy: PrivacyConfig) -> int:
    """How often the target pays for a trial: for each share of a sweep."""
    return privacy.num_shares if privacy.scope == "sweep" else 1


def _repeated(mechanisms: Sequence[Mechanism], times: int) -> list[Mechanism]:
    return [(rate, noise_multiplier, times * n) for rate, noise_multiplier, n in mechanisms]


def _question(
    config: Config,
) -> tuple[tuple[Mechanism, ...], float, int, float, float, str]:
    """What is spent beside DP-SGD, its sample rate and steps, target, delta, relation."""
    privacy = config.privacy
    dp_sgd = (dp_sgd_sample_rate(config), 0.0, config.private_steps)
    *fixed, (rate, _, steps) = _repeated([*_fixed(config), dp_sgd], _copies(privacy))
    return (
        tuple(fixed),
        rate,
        steps,
        # Trials that differ do not compose exactly like equal ones: a little is kept for that.
        privacy.target_epsilon * (1 - _MIXTURE if privacy.scope == "sweep" else 1),
        privacy.target_delta,
        privacy.neighboring_relation,
    )


_solve = lru_cache(maxsize=1024)(solve.solve_noise_multiplier)
