"""`python -m core account`: what a configuration would spend under each scope; reads no data."""

import argparse

from core.config import Config, load, nested, parse_overrides
from core.config.keys import COUNT, NOISE
from core.errors import InfeasibleError
from core.privacy.accounting.mechanism import LARGEST
from core.privacy.accounting.rounding import attack, upward
from core.privacy.ledger.card import accountant_of
from core.privacy.plan.compare import final_noise, under
from core.privacy.plan.plan import (
    PrivacyPlan,
    estimated_composition,
    estimated_noise_multiplier,
    make_plan,
)

_TRIALS = 16
_FACTORS = (0.25, 1.0, 4.0)
_LINE = "{:<34} {:>12}   {}"


def account(options: argparse.Namespace) -> None:
    """Prints the plan, what each scope would ask for, and what-if figures over count and noise."""
    config = load(options.config, parse_overrides(options.overrides))
    privacy = config.privacy
    plan = make_plan(config)
    print(
        f"N={config.dataset.num_examples}, epsilon {upward(privacy.target_epsilon)}, delta "
        f"{upward(privacy.target_delta, 6)}, {privacy.neighboring_relation}, scope {privacy.scope} "
        f"({accountant_of(privacy, plan.summary()['accountant'])})"
    )
    print(plan.statement)
    if not plan.is_private:
        return
    print(f"In words: {attack(plan.members_found)}.")
    if privacy.target_epsilon > LARGEST >= plan.epsilon and not privacy.covers.covers_choice:
        print(
            f"PLD, which ends at epsilon {LARGEST:g}, asks for less noise than Renyi DP does at "
            f"{upward(privacy.target_epsilon)}: so much of the target is spent"
        )
    if plan.epsilon_central:
        first = "moments" if plan.moments else "central images"
        print(f"{first:<18} epsilon {upward(plan.epsilon_central)} alone")
    if plan.frequency is not None:
        print(f"frequency          epsilon {upward(plan.epsilon_frequency)} alone")
    if plan.score is not None:
        print(f"dp_accuracy        epsilon +{upward(plan.epsilon_score, 2)}")
    if not plan.dp_sgd.num_steps:
        print(f"no DP-SGD: the release has noise multiplier {plan.noise_multiplier:g}")
        return
    print(
        f"DP-SGD             noise multiplier {plan.noise_multiplier:g}, sample rate "
        f"{plan.dp_sgd.sample_rate:.4g}, {plan.dp_sgd.num_steps} steps"
    )
    _print_scopes(config, plan)
    if plan.moments is None:  # Which have no count.
        _print_what_if(config)


def _print_scopes(config: Config, plan: PrivacyPlan) -> None:
    """One line a scope: the noise that it asks for, and what the target then covers."""
    target = config.privacy.target_epsilon
    trial = under(config, "trial")
    shared = config.privacy.covers.covers_choice
    alone = estimated_noise_multiplier(trial) if shared else plan.noise_multiplier
    together, accountant = estimated_composition(trial, alone, _TRIALS)
    print(
        "\n" + _LINE.format("scope", "DP-SGD noise", f"what epsilon {upward(target)} then covers")
    )
    text = f"one trial; {_TRIALS} trials and the choice among them: {upward(together, 3)}"
    text += " by Renyi DP" if accountant.startswith("Renyi") else ""
    print(_LINE.format("trial", _noise(alone), text))
    print(_LINE.format("public", _noise(alone), "the one run on this data, tuned on public data"))
    rows: list[tuple[str, dict[str, object], str]] = []
    for shares in (2, 4, 8, _TRIALS):
        text = f"all of {shares} trials, whatever chooses them"
        rows.append((f"sweep num_shares={shares}", {"num_shares": shares, "adaptive": True}, text))
    text = f"all of {_TRIALS} trials, chosen without results (sampler=random or grid)"
    fixed = {"num_shares": _TRIALS, "adaptive": False}
    rows.append((f"sweep num_shares={_TRIALS} adaptive=false", fixed, text))
    for law in ("geometric", "logarithmic"):
        text = f"the best of a secret number, mean {config.privacy.selection_mean:g}"
        rows.append((f"selection selection_law={law}", {"selection_law": law}, text))
    tuned = f"all of {_TRIALS} tuning trials and the final run, whose noise this is"
    rows.append((f"tune_then_train num_shares={_TRIALS}", {"num_shares": _TRIALS}, tuned))
    for name, settings, text in rows:
        found = final_noise(config, name.split()[0], **settings)
        print(_LINE.format(name, "-" if found is None else _noise(found), text))


def _print_what_if(config: Config) -> None:
    """The DP-SGD noise multiplier that each count and noise of central images would leave."""
    counts = sorted({max(1, round(f * config.central_images.per_class)) for f in _FACTORS})
    noises = [f * config.central_images.noise_multiplier for f in _FACTORS]
    noises = [noise for noise in noises if noise >= 0.3]
    print(f"\nDP-SGD noise multiplier, to about 0.3 %, by {COUNT} (down)")
    print(f"and {NOISE} (across), where - cannot be paid")
    print(" " * 8 + "".join(f"{noise:>10.3g}" for noise in noises))
    for count in counts:
        cells: list[str] = []
        for noise in noises:
            try:
                figure = estimated_noise_multiplier(
                    load(nested(config), {COUNT: count, NOISE: noise})
                )
                cells.append(_noise(figure))
            except InfeasibleError:
                cells.append("-")
        print(f"{count:>8}" + "".join(f"{cell:>10}" for cell in cells))


def _noise(multiplier: float) -> str:
    return f"{multiplier:.3f}" if multiplier >= 0.1 else f"{multiplier:.3g}"
