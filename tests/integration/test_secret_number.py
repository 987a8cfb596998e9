"""The secret number of a selection: no card and no bundle, of it or of others, depends on it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dp_accounting.pld import common, privacy_loss_distribution

from core.__main__ import main
from core.config import Config, load, nested, yaml_subset
from core.diffusion.denoiser import build_denoiser
from core.errors import ConfigError, LedgerError
from core.io.files import write_json
from core.privacy.accounting.mechanism import COARSE
from core.privacy.ledger.account import RELEASE_ID, Spending
from core.privacy.ledger.admission import BudgetExceededError
from core.privacy.ledger.card import make_card
from core.privacy.ledger.file import locked
from core.privacy.ledger.ledger import Ledger, events_of, ledger_path
from core.privacy.ledger.terms import Key, Terms
from core.privacy.plan.budget import run_budget
from core.privacy.plan.plan import PrivacyPlan, make_plan
from core.privacy.plan.scopes import STAYS_INSIDE

FINGERPRINT = "ab" * 32
TARGET = 2.0
SMALL = {
    "model.base_channels": 8,
    "central_images.noise_multiplier": 20.0,
    "privacy.target_epsilon": TARGET,
    "privacy.dp_accuracy_stddev": 50.0,
    "early_scores.at": [0.5],
    "early_scores.metric": "dp_accuracy",
}
LONE = load("core/configs/digits.yaml", SMALL)
SELECTION = load("core/configs/digits.yaml", SMALL | {"privacy.scope": "selection"})


@pytest.fixture(scope="module")
def plans() -> dict[str, PrivacyPlan]:
    return {config.privacy.scope: make_plan(config) for config in (LONE, SELECTION)}


def ledger_in(folder: Path, plan: PrivacyPlan) -> Ledger:
    terms = Terms(FINGERPRINT, plan.num_examples, plan.delta, plan.neighboring_relation)
    return Ledger.open(folder / "ledger", terms)


def charge(ledger: Ledger, plan: PrivacyPlan, run: str, trial: str, done: bool = True, **more):
    key = Key(run, trial, "all", 0, plan.dp_sgd.num_steps)
    reservation = ledger.reserve(key, events_of(plan), **more)
    if done:
        ledger.commit(reservation, plan.dp_sgd.num_steps)


def select(ledger: Ledger, plan: PrivacyPlan, number: int, run: str = "best") -> None:
    """Charges a selection of `number` trials; of several the last is still running."""
    within = run_budget(SELECTION, f"release of {run}")
    for trial in range(number):
        charge(ledger, plan, run, f"{run} {trial}", done=trial < max(1, number - 1), within=within)
    ledger.select(run, f"{run} 0")


def finished(folder: Path, config: Config, plan: PrivacyPlan, name: str, trial: str) -> Path:
    """What a run leaves that `core release` reads."""
    run_dir = folder / "run"
    (run_dir / "synthetic").mkdir(parents=True)
    kept = load(nested(config), {"runtime.ledger": str(folder / "ledger")})
    (run_dir / "config.yaml").write_text(yaml_subset.dump(nested(kept)))
    write_json(run_dir / "privacy.json", plan.summary())
    result = {"fingerprint": FINGERPRINT, "name": name, "identity": trial, "accuracy": 0.5}
    write_json(run_dir / "evaluation.json", result)
    if config.privacy.scope == "selection":
        write_json(run_dir / "selected.json", {"objective": "dp_accuracy"})
    numbers = np.random.default_rng(0)
    images = numbers.integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    labels = np.arange(20) % 10
    np.savez(run_dir / "synthetic" / "images.npz", images=images, labels=labels)
    torch.manual_seed(0)
    torch.save(build_denoiser(config).state_dict(), run_dir / "model.pt")
    return run_dir


def bundle(run_dir: Path, capsys) -> tuple[dict[str, bytes], str]:
    """The files of a release, and what the command prints."""
    out = run_dir.parent / "bundle"
    assert main(["release", "--run-dir", str(run_dir), "--out", str(out)]) == 0
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    return files, capsys.readouterr().out.replace(str(out), "OUT")


@pytest.mark.parametrize("first", [True, False])
def test_another_runs_bundle_is_the_same_for_one_trial_and_for_twenty(
    plans, tmp_path, capsys, first
):
    bundles = {}
    for number in (1, 2, 20):
        folder = tmp_path / str(number)
        ledger = ledger_in(folder, plans["trial"])
        for select_now in (first, not first):
            if select_now:
                select(ledger, plans["selection"], number)
            else:
                charge(ledger, plans["trial"], "lone", "its identity")
        run_dir = finished(folder, LONE, plans["trial"], "lone", "its identity")
        bundles[number] = bundle(run_dir, capsys)
        if number == 20:
            assert len(ledger.summary()["entries"]) == 21
    assert bundles[1] == bundles[2] == bundles[20]
    card = json.loads(bundles[20][0]["privacy_card.json"])
    assert "one of 2 releases on this data set, which together are (4, 2e-05)-" in card["statement"]
    assert card["epsilon_all_on_this_data_set"] == pytest.approx(2 * TARGET, abs=1e-3)
    assert card["epsilon_released_with_selection"] == card["epsilon_all_on_this_data_set"]
    assert card["delta_released_with_selection"] == card["delta_all_on_this_data_set"] == 2e-5
    page = bundles[20][0]["privacy_card.md"].decode()
    assert "| epsilon of all runs on this data set | 4 at delta 2e-05 |" in page
    assert "(here 1) counts as the one release that it claims" in page
    assert "up to a probability of 2e-05." in page
    readme = bundles[20][0]["README.md"].decode()
    assert "| epsilon of the release with its selection | 4 at delta 2e-05 |" in readme


def test_the_bundle_of_a_selection_is_the_same_for_one_trial_and_for_twenty(
    plans, tmp_path, capsys
):
    bundles = []
    for number in (1, 20):
        folder = tmp_path / str(number)
        ledger = ledger_in(folder, plans["selection"])
        charge(ledger, plans["trial"], "lone", "another")
        select(ledger, plans["selection"], number)
        run_dir = finished(folder, SELECTION, plans["selection"], "best", "best 0")
        bundles.append(bundle(run_dir, capsys))
    assert bundles[0] == bundles[1]
    card = json.loads(bundles[0][0]["privacy_card.json"])
    assert card["epsilon_released_with_selection"] == TARGET
    assert card["delta_released_with_selection"] == 1e-5
    assert card["epsilon_computed"] is None
    assert (card["epsilon_all_on_this_data_set"], card["delta_all_on_this_data_set"]) == (
        pytest.approx(2 * TARGET, abs=1e-3),
        2e-5,
    )
    assert "stopped early" not in card["statement"]


def test_beside_a_selection_of_an_earlier_version_no_card_tells_its_number(plans, tmp_path, capsys):
    """Its lines say the scope alone: neither its target nor which release it is."""
    bundles = []
    for number in (1, 20):
        folder = tmp_path / str(number)
        ledger = ledger_in(folder, plans["trial"])
        charge(ledger, plans["trial"], "lone", "its identity")
        for trial in range(number):
            charge(ledger, plans["selection"], "old", f"old {trial}", note="scope selection")
        bundles.append(
            bundle(finished(folder, LONE, plans["trial"], "lone", "its identity"), capsys)
        )
        assert (ledger.summary()["num_releases"], ledger.summary()["selections"]) == (2, ["old"])
        own = finished(folder / "own", SELECTION, plans["selection"], "old", "old 0")
        ledger.select("old", "old 0")
        config = load(nested(SELECTION), {"runtime.ledger": str(folder / "ledger")})
        (own / "config.yaml").write_text(yaml_subset.dump(nested(config)))
        bundles[-1] = (bundles[-1], bundle(own, capsys))
        assert main(["ledger", "show", "--folder", str(folder / "ledger")]) == 0
        assert capsys.readouterr().out.startswith(STAYS_INSIDE)
        within = run_budget(SELECTION, "release of old")
        with pytest.raises(LedgerError, match="choose another name"):  # It cannot go on.
            charge(ledger, plans["selection"], "old", "more", within=within)
    assert bundles[0] == bundles[1]
    (lone, _), (own, _) = bundles[0]
    card = json.loads(lone["privacy_card.json"])
    assert (
        "one of 2 releases on this data set, which together are (inf, 2e-05)-" in card["statement"]
    )
    assert "it counts as unbounded, as the sum of its trials would tell their" in card["statement"]
    assert f"is ({TARGET:g}, 1e-05)-" in json.loads(own["privacy_card.json"])["statement"]


def test_beside_a_selection_of_an_earlier_version_a_budget_pays_for_nothing(plans, tmp_path):
    plan, messages = plans["trial"], set()
    for number in (1, 20):
        terms = Terms(FINGERPRINT, plan.num_examples, plan.delta, plan.neighboring_relation)
        ledger = Ledger.open(tmp_path / str(number), replace(terms, budget=1e3))
        for trial in range(number):
            charge(ledger, plans["selection"], "old", f"old {trial}", note="scope trial")
        lines = ledger.path.read_bytes()
        assert lines.count(b"scope trial") == number
        ledger = Ledger.open(tmp_path / f"old {number}", replace(terms, budget=1e3))
        with locked(ledger.path) as chain:
            for entry in map(json.loads, lines.splitlines()[1:]):
                chain.append(entry["kind"], {**entry, "note": "scope selection"})
        before = ledger.path.read_bytes()
        with pytest.raises(BudgetExceededError, match="it counts as unbounded") as refused:
            charge(ledger, plan, "lone", "its identity")
        assert ledger.path.read_bytes() == before
        messages.add(str(refused.value))
    assert len(messages) == 1


def test_a_sweeps_card_is_the_same_beside_any_selection_and_its_largest_trial_counts(
    plans, tmp_path, capsys
):
    """Of two trials the released one spends less than half of what the other does."""
    half = load(nested(LONE), {"privacy.target_epsilon": 0.9994 * TARGET / 2})
    small = make_plan(half)
    bundles = []
    for number in (1, 20):
        folder = tmp_path / str(number)
        ledger = ledger_in(folder, small)
        charge(ledger, small, "sweep", "small")
        charge(ledger, plans["trial"], "sweep", "large")
        select(ledger, plans["selection"], number)
        bundles.append(bundle(finished(folder, half, small, "sweep", "small"), capsys))
    assert bundles[0] == bundles[1]
    card = json.loads(bundles[0][0]["privacy_card.json"])
    assert card["statement"].startswith("Each trial alone is (2, 1e-05)-differentially private.")
    assert card["epsilon_trial"] == pytest.approx(plans["trial"].epsilon, rel=1e-9)
    assert card["epsilon_released_trial"] == small.epsilon < 1
    assert "the best of 2 trials" in card["hyperparameters_chosen_by"]
    assert "| epsilon of one trial | 2 |" in bundles[0][0]["privacy_card.md"].decode()


def test_epsilons_and_deltas_of_selections_are_added(plans, tmp_path):
    """A mechanism that is no better than its (epsilon, delta) shows that both sums are needed."""
    ledger = ledger_in(tmp_path, plans["trial"])
    empty = ledger.summary()
    assert (empty["epsilon_committed_and_reserved"], empty["num_releases"]) == (0, 0)
    charge(ledger, plans["trial"], "lone", "another")
    alone = ledger.summary()["epsilon_committed_and_reserved"]
    select(ledger, plans["selection"], 3)
    select(ledger, plans["selection"], 7, "other")
    summary = ledger.summary()
    everything, delta = (summary[f"{name}_committed_and_reserved"] for name in ("epsilon", "delta"))
    assert everything == pytest.approx(alone + 2 * TARGET)
    assert delta == 3e-5
    assert summary["num_releases"] == 3
    assert summary["selections"] == ["best", "other"]
    worst = privacy_loss_distribution.identity(COARSE)
    for rate, noise, count in plans["trial"].mechanisms:
        release = privacy_loss_distribution.from_gaussian_mechanism(
            noise, value_discretization_interval=COARSE, sampling_prob=rate
        )
        worst = worst.compose(release.self_compose(count))
    claimed = common.DifferentialPrivacyParameters(TARGET, plans["trial"].delta)
    one = privacy_loss_distribution.from_privacy_parameters(claimed, COARSE)
    worst = worst.compose(one).compose(one)
    assert worst.get_delta_for_epsilon(everything) <= delta
    assert worst.get_delta_for_epsilon(everything) > 2e-5
    assert worst.get_delta_for_epsilon(everything - TARGET) > delta


def test_what_the_owner_sees_of_a_selection_says_that_it_must_stay_inside(plans, tmp_path, capsys):
    ledger = ledger_in(tmp_path, plans["trial"])
    charge(ledger, plans["trial"], "lone", "another")
    command = ["ledger", "show", "--folder", str(tmp_path / "ledger")]
    assert main(command) == 0
    assert STAYS_INSIDE not in capsys.readouterr().out
    select(ledger, plans["selection"], 3)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(STAYS_INSIDE)
    assert "epsilon 4 at delta 2e-05 without a cap" in shown
    assert main(["ledger", "verify", "--folder", str(tmp_path / "ledger")]) == 0
    assert capsys.readouterr().out.endswith(": unbroken\n")


def test_a_selection_begun_anew_is_another_release(plans, tmp_path):
    """Its folder is gone, and with it what tells it apart: under the same name it is refused."""
    plan = plans["selection"]

    def spending(name: str) -> Spending:
        run_dir, charged = tmp_path / "run", tmp_path / "charged"
        return Spending(SELECTION, plan, tmp_path / "ledger", name, run_dir, charged)

    with pytest.raises(ConfigError, match="which tells this selection from others"):
        spending("best").reserve(FINGERPRINT, "a")
    assert not (tmp_path / "ledger").exists()
    for release, name in (("first", "best"), ("second", "again")):
        (tmp_path / "charged").mkdir()
        (tmp_path / "charged" / RELEASE_ID).write_text(release)
        if release == "second":
            with pytest.raises(LedgerError, match=r"begun within .*'first'.* choose another name"):
                spending("best").reserve(FINGERPRINT, "c")
        for trial in ("a", "b"):
            spending(name).reserve(FINGERPRINT, f"{trial} of {name}")
        shutil.rmtree(tmp_path / "charged")
    summary = Ledger.at(ledger_path(tmp_path / "ledger", FINGERPRINT)).summary()
    assert [len(summary["entries"]), summary["num_releases"]] == [4, 2]
    assert summary["epsilon_committed_and_reserved"] == 2 * TARGET
    assert summary["delta_committed_and_reserved"] == 2e-5


def test_only_one_trial_of_a_selection_ever_leaves(plans, tmp_path):
    """Whatever is made of its folder: else it would be more than one release."""
    plan, ledger = plans["selection"], ledger_in(tmp_path, plans["selection"])
    within = run_budget(SELECTION, "release of best")
    for trial in ("a", "b"):
        charge(ledger, plan, "best", trial, within=within)
    with pytest.raises(LedgerError, match="not the one that selection best ended with"):
        make_card(ledger, "best", plan, SELECTION.privacy, "a", "dp_accuracy", searched=True)
    ledger.select("best", "a")
    before = ledger.path.read_bytes()
    ledger.select("best", "a")
    charge(ledger, plan, "best", "b", within=within)  # As a finished run that is started again.
    for refused in (
        lambda: ledger.select("best", "b"),
        lambda: charge(ledger, plan, "best", "c", within=within),
    ):
        with pytest.raises(LedgerError, match="ended with trial a, the only one of it that may"):
            refused()
    with pytest.raises(LedgerError, match="not the one that selection best ended with"):
        make_card(ledger, "best", plan, SELECTION.privacy, "b", "dp_accuracy", searched=True)
    assert ledger.path.read_bytes() == before
    card = make_card(ledger, "best", plan, SELECTION.privacy, "a", "dp_accuracy", searched=True)
    assert card["epsilon_released_with_selection"] == TARGET


def test_no_budget_of_a_data_set_depends_on_a_selection(plans, tmp_path):
    """No run of one asks for such a budget, nor finds a ledger with one: its terms differ."""
    with pytest.raises(ConfigError, match=r"cannot be combined with privacy.scope='selection'"):
        load(nested(SELECTION), {"privacy.data_set_budget": 9.0})
    plan = plans["selection"]
    terms = Terms(FINGERPRINT, plan.num_examples, plan.delta, plan.neighboring_relation, 9.0)
    Ledger.open(tmp_path / "ledger", terms)
    (tmp_path / "charged").mkdir()
    (tmp_path / "charged" / RELEASE_ID).write_text("first")
    run_dir, charged = tmp_path / "run", tmp_path / "charged"
    one = Spending(SELECTION, plan, tmp_path / "ledger", "best", run_dir, charged)
    with pytest.raises(LedgerError, match="was begun with"):
        one.reserve(FINGERPRINT, "a")


@pytest.mark.parametrize("budget", [1.3 * TARGET, 2.1 * TARGET])
def test_a_budget_that_meets_a_selection_counts_it_as_one_release(plans, tmp_path, budget):
    """Whatever its number of trials, none but the first of which is ever refused."""
    plan, answers = plans["selection"], []
    for number in (1, 2, 20):
        terms = Terms(FINGERPRINT, plan.num_examples, plan.delta, plan.neighboring_relation, budget)
        ledger = Ledger.open(tmp_path / str(number), terms)
        select(ledger, plan, number)
        try:
            charge(ledger, plans["trial"], "lone", "its identity")
            answers.append(json.loads(ledger.path.read_text().splitlines()[-2])["epsilon_after"])
        except BudgetExceededError as refused:
            answers.append(str(refused))
        summary = ledger.summary()
        assert len([e for e in summary["entries"] if e["run"] == "best"]) == number
        assert summary["epsilon_committed_and_reserved"] <= budget
    assert answers[0] == answers[1] == answers[2]
    if budget > 2 * TARGET:
        assert answers[0] == pytest.approx(2 * TARGET, abs=1e-3)
    else:
        assert "to 4" in answers[0] or "to 3.99" in answers[0]
        assert f"of its budget {budget:g} (spent or reserved 2)" in answers[0]


def test_the_first_trial_of_a_selection_is_refused_where_the_budget_cannot_pay_it(plans, tmp_path):
    plan = plans["selection"]
    terms = Terms(FINGERPRINT, plan.num_examples, plan.delta, plan.neighboring_relation, 3.0)
    ledger = Ledger.open(tmp_path, terms)
    charge(ledger, plans["trial"], "lone", "its identity")
    with pytest.raises(BudgetExceededError, match=r"reserving epsilon 2 for .* of run best"):
        select(ledger, plan, 1)
    assert len(ledger.summary()["entries"]) == 1
