"""What a sweep claims, and when: nothing of its choice while trials of it are still to come."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from test_trials_of_other_code import sweep_of, trial

from core.errors import ConfigError
from core.io.files import write_json
from core.io.locks import locked
from core.privacy.accounting.rounding import upward
from core.privacy.ledger.ledger import Ledger, events_of
from core.privacy.ledger.terms import Key, Terms
from core.privacy.plan.plan import make_plan
from core.publish.release import release_card
from sweep.__main__ import main
from sweep.config.sweep import SweepConfig, dump_sweep
from sweep.results.driver import LOCK
from sweep.results.table import (
    claimed_row,
    load_rows,
    planned_epsilon,
    print_results,
    withdraw_card,
    write_card,
)

DATA = hashlib.sha256(b"data").hexdigest()
CLAIMS = ("privacy:", "given beforehand", "the release with its selection")


def sweep_with(folder: Path, finished: int, **overrides: object) -> SweepConfig:
    """A sweep of four trials, of which some have finished, charged to the ledger by a driver."""
    ledger = {"runtime.ledger": str(folder / "ledger")}
    sweep = sweep_of(folder, num_trials=4, **ledger, **overrides)
    write_json(sweep.folder / "sweep.json", dump_sweep(sweep))
    plan = make_plan(sweep.run)
    terms = Terms(DATA, plan.num_examples, plan.delta, plan.neighboring_relation, None)
    book = Ledger.open(folder / "ledger", terms)
    book.take_over(sweep.name, "driver", 1)
    for number in range(finished):
        name = f"trial{number}"
        run_dir, _ = trial(sweep, name, "this")
        write_json(run_dir / "privacy.json", plan.summary())
        key = Key(sweep.name, name, "all", 0, plan.dp_sgd.num_steps)
        book.commit(book.reserve(key, events_of(plan)), plan.dp_sgd.num_steps)
        scores = {"accuracy": 0.5 + number / 10, "fid_cnn": 9.0, "seconds": 1.0}
        origin = {"identity": name, "fingerprint": DATA, "name": sweep.name}
        write_json(run_dir / "evaluation.json", {**scores, **origin})
    return sweep


def shown(sweep: SweepConfig, capsys: pytest.CaptureFixture[str]) -> str:
    print_results(sweep, load_rows(sweep), 0, "here")
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_sweep_that_runs_says_what_is_planned_and_claims_nothing(tmp_path, capsys):
    sweep = sweep_with(tmp_path, finished=1)
    rows = load_rows(sweep)
    planned = planned_epsilon(rows, 4)
    assert planned > 1.5 * planned_epsilon(rows)
    with locked(sweep.folder / LOCK):
        told = shown(sweep, capsys)
        assert main(["ls", "--storage", str(tmp_path)]) == 0
        listed = capsys.readouterr().out
    assert (
        "sweep: running, 1 of 4 trials ended, so nothing is claimed yet: all together are "
        f"planned to spend epsilon {upward(planned)} compare:"
    ) in told
    assert "eps so far" in told
    assert f"{upward(planned_epsilon(rows))} so far" in listed
    assert not [claim for claim in (*CLAIMS, "card:") if claim in told + listed]


def test_one_that_was_cut_off_says_how_to_end_it(tmp_path, capsys):
    sweep = sweep_with(tmp_path, finished=3)
    trial(sweep, "begun", "this")
    told = shown(sweep, capsys)
    assert f"sweep {sweep.name}: 4 trials, 0 points pruned" in told
    assert "unfinished" in told, "a pipe has the width of the table"
    assert "…" not in told
    assert "sweep: not finished, 3 of 4 trials ended, so nothing is claimed yet" in told
    assert "; the same command goes on, or ends the sweep here with num_trials=3 compare:" in told
    assert not [claim for claim in CLAIMS if claim in told]


def test_what_has_ended_is_claimed_and_taken_back_where_it_goes_on(tmp_path, capsys):
    sweep = sweep_with(tmp_path, finished=4)
    rows = load_rows(sweep)
    assert "card:" not in shown(sweep, capsys), "there is none yet"
    (released, _) = claimed_row(sweep, rows)
    assert released == rows[-1]
    write_card(sweep, rows, released, True)
    told = shown(sweep, capsys)
    assert "The choice among 4 trials used their results" in told
    assert f"card: {sweep.folder / 'privacy_card.md'}" in told
    more = sweep.model_copy(update={"num_trials": 6})
    withdraw_card(more, rows)
    assert not [*sweep.folder.glob("privacy_card.*"), *sweep.folder.glob("trials/*/selected.json")]
    assert claimed_row(more, rows)[0] is None


def test_the_only_trial_of_a_sweep_was_never_given_beforehand(tmp_path):
    """Also where its bundle is made while the sweep goes on."""
    sweep = sweep_with(tmp_path, finished=1)
    (row,) = load_rows(sweep)
    of_trial = release_card(row.config, row.run_dir)
    of_sweep = write_card(sweep, [row], row, False)
    for card in (of_trial, of_sweep):
        assert "It is so far the only one of its sweep" in card["statement"]
        assert card["hyperparameters_chosen_by"] == "by a sweep, so far in its only trial"


def test_a_file_that_states_less_than_the_plan_spends_is_not_released(tmp_path):
    (row,) = load_rows(sweep_with(tmp_path, finished=1))
    plan = json.loads(row.folder.plan_file.read_text())
    write_json(row.folder.plan_file, {**plan, "epsilon": plan["epsilon"] / 2})
    with pytest.raises(ConfigError, match=r"does not agree with the configuration in epsilon:"):
        release_card(row.config, row.run_dir)


def test_a_trial_of_a_covered_search_was_not_chosen_by_scores_that_are_not_private(tmp_path):
    """Not even where it is not the best, so that no sweep has noted what chose it."""
    for scope, covered in (("sweep", True), ("trial", False)):
        settings = {"privacy.scope": scope, "dataset.public": True}
        sweep = sweep_with(tmp_path / scope, finished=2, **settings)
        row = load_rows(sweep)[0]
        by = release_card(row.config, row.run_dir)["hyperparameters_chosen_by"]
        assert ("which are not private" in by) is not covered
        assert ("scores that this guarantee covers" in by) is covered


def test_a_scope_that_covers_all_trials_claims_at_any_time(tmp_path):
    settings = {"privacy.scope": "sweep", "dataset.public": True}
    sweep = sweep_with(tmp_path, finished=1, **settings)
    rows = load_rows(sweep)
    assert claimed_row(sweep, rows)[0] == rows[0]
