"""`python -m core scale-down`: a cheap stand-in for a run, to search its settings on public data.

Sander, Stock and Sablayrolles (2023), "TAN Without a Burn": with the same steps and the same noise
over batch size, DP-SGD trains alike at a fraction of the batch and so of the cost. That costs more
privacy, little while the noise multiplier is well above 1 and far more below: the stand-in's
target is the epsilon that it truly spends, and it is made for public data alone.
"""

import argparse

from core.config import Config, load, nested, parse_overrides, yaml_subset
from core.errors import ConfigError
from core.privacy.accounting import solve
from core.privacy.accounting.mechanism import quick_grid
from core.privacy.accounting.rounding import upward
from core.privacy.plan.plan import make_plan

BATCH, TARGET = "private_training.expected_batch_size", "privacy.target_epsilon"


def scaled_down(config: Config, factor: float) -> Config:
    """The configuration with batch and DP-SGD noise divided by `factor`, at its true epsilon.

    Its plan solves the noise again from that epsilon, which is at most about 0.1 % too large.

    Args:
        factor: above 1; the batch is rounded, and the noise divided as the batch is.

    Raises:
        ConfigError: the data is not public, the scope shares its target among trials, there is no
            noise, or the factor is out of range.
        InfeasibleError: the budget of the configuration itself cannot pay.
    """
    batch, privacy = config.private_training.expected_batch_size, config.privacy
    if not config.dataset.public:
        raise ConfigError(
            "dataset.public=false: a run at less noise spends more than its target on private "
            "data; scale down on a public stand-in, with dataset.public=true"
        )
    if privacy.covers.covers_choice or config.method == "non_private" or config.trains_nothing:
        raise ConfigError(
            f"privacy.scope={privacy.scope!r} with method={config.method!r} cannot be scaled down: "
            "choose a scope whose target is that of one trial and a private method with DP-SGD"
        )
    if not 1 < factor <= batch:
        raise ConfigError(f"--factor={factor:g} must lie in (1, {BATCH}={batch}]")
    smaller = max(1, round(batch / factor))
    plan = make_plan(config)
    rate, noise, steps = plan.dp_sgd.mechanism
    shrunk = (*plan.other_mechanisms, (rate * smaller / batch, noise * smaller / batch, steps))
    epsilon = solve.epsilon_of_mechanisms(
        shrunk, plan.delta, plan.neighboring_relation, quick_grid(shrunk)
    )
    return load(nested(config), {BATCH: smaller, TARGET: epsilon})


def scale_down(options: argparse.Namespace) -> None:
    """Writes the stand-in's configuration, and says what the search's final run takes back."""
    config = load(options.config, parse_overrides(options.overrides))
    small = scaled_down(config, options.factor)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(yaml_subset.dump(nested(small)))
    print(
        f"{options.out}: {BATCH} {small.private_training.expected_batch_size} for "
        f"{config.private_training.expected_batch_size}, same steps and same noise over batch; one "
        f"run truly spends epsilon {upward(small.privacy.target_epsilon)}, on public data"
    )
    print(
        "a sweep of it under privacy.scope=public takes back under final: "
        f"{BATCH}: {config.private_training.expected_batch_size}, "
        f"{TARGET}: {config.privacy.target_epsilon}"
    )
