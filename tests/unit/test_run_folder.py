"""The folder of a run gives back what was written, and names what is damaged."""

import math

import pytest

from core.commands.run import result_lines
from core.config import load
from core.errors import ConfigError
from core.io.files import write_json
from core.pipeline.context import Reporter
from core.privacy.plan.plan import make_plan
from core.record.folder import MetricsLog, Result, RunFolder

CONFIG = load({}, {"method": "non_private"})


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_claimed_folder_gives_back_configuration_and_plan(folder):
    plan = make_plan(CONFIG)
    assert folder.agreed_plan(CONFIG) == (plan, False)
    folder.claim(CONFIG, plan, {})
    assert folder.config() == CONFIG
    assert folder.plan() == plan
    other = load({}, {"method": "non_private", "seed": 1})
    assert folder.agreed_plan(other) == (plan, False)  # Nothing was charged yet.
    write_json(folder.identity, {})
    assert folder.agreed_plan(CONFIG) == (plan, True)
    with pytest.raises(ConfigError, match=r"another configuration \(seed: 0 -> 1\)"):
        folder.agreed_plan(other)


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_damaged_plan_is_named_to_whoever_reads_it(folder, content):
    folder.claim(CONFIG, make_plan(CONFIG), {})
    folder.plan_file.write_text(content)
    with pytest.raises(ConfigError, match=r"privacy\.json' cannot be read .*: restore it, or"):
        folder.plan()


@pytest.mark.parametrize("stage", ["done", "stopped"])
def test_a_result_comes_back_with_its_origin(folder, stage):
    report = {"step": 4, "stage": stage, "epsilon": math.inf}
    result = Result(report, "identity", "fingerprint", "NaN", {"loss": "non-private"}, None)
    assert folder.result() is None
    folder.end(result)
    assert folder.result() == result
    assert result.is_stopped == folder.stopped.exists() == (not folder.evaluation.exists())
    path = folder.stopped if result.is_stopped else folder.evaluation
    assert path.stat().st_mode & 0o777 == 0o600


def test_costs_and_scores_of_a_run_are_told_apart(folder):
    folder.claim(CONFIG, make_plan(CONFIG), {})
    scores = {"accuracy": 0.75, "dp_accuracy": 0.5}
    costs = {"epsilon": 1.0, "epsilon_dp_sgd": 0.5, "noise_multiplier": 0.8}
    report = {"step": 4, "stage": "done", **scores, **costs, "seconds": 3.2}
    folder.end(Result(report, tags={"accuracy": "non-private", "dp_accuracy": "dp(epsilon +0.01)"}))
    told = [" ".join(line.split()) for line in result_lines(folder, report)][1:]
    middle = told.index("Scores are computed from real images:")
    assert told[:middle] == [
        "Costs follow from the plan alone, and are public:",
        *("epsilon 1", "epsilon_dp_sgd 0.5", "noise_multiplier 0.8"),
    ]
    assert told[middle + 1 :] == [
        *("accuracy 0.75 non-private", "dp_accuracy 0.5 dp(epsilon +0.01)", "time: 3 s"),
    ]


def test_a_failure_comes_back(folder):
    assert folder.failure() is None
    folder.fail("identity", "reason")
    assert folder.failure() == ("identity", "reason")
    assert folder.result() is None


def test_early_scores_are_those_of_the_identity(folder):
    assert folder.early_scores() == {}
    folder.keep_early_scores("mine", "early_fid", {0.1: 3.0, 1 / 3: 2.0})
    assert folder.early_scores() == folder.early_scores("mine") == {0.1: 3.0, 1 / 3: 2.0}
    assert folder.early_scores("other") == {}


@pytest.mark.parametrize("torn", ['{"step": 2, "sta', "2", '"'])
def test_a_torn_last_line_is_no_report(folder, torn):
    MetricsLog(folder, 0)({"step": 1, "stage": "warm_up"})
    with folder.metrics.open("a") as file:
        file.write(torn)
    assert list(folder.reports()) == [{"step": 1, "stage": "warm_up"}]


def test_what_the_run_began_with_is_known_by_its_digest(folder):
    assert folder.begun_with() == ("", "")
    write_json(folder.identity, {"computed by": {"code of core": "c"}})
    digest, code = folder.begun_with()
    assert (len(digest), code) == (64, "c")


def test_notes_stand_in_the_next_report_alone(folder):
    told: list[dict] = []
    report = Reporter(told.append, 4)
    report.note(["first", "second"])
    for step in (1, 2):
        report({"step": step, "stage": "warm_up"})
    assert [each.get("note") for each in told] == ["first; second", None]
    report.begin_log(folder, 0)
    report({"step": 3, "stage": "warm_up"})
    report.tell({"step": 4, "stage": "warm_up"})
    assert [each["step"] for each in folder.reports()] == [3]
    assert [each["step"] for each in told] == [1, 2, 3, 4]
