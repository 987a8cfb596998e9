"""What the report says before it is drawn: fronts, importance, the edge of the affordable."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from core.config import load
from core.errors import InfeasibleError
from core.io.files import write_json
from core.privacy.plan.plan import PrivacyPlan
from core.privacy.plan.releases import MomentsPlan
from core.record.folder import MetricsLog, RunFolder, write_class_names
from sweep.config.sweep import load_sweep
from sweep.report import effects, write_report
from sweep.report.affordable_map import affordable_map
from sweep.report.curves import curves
from sweep.report.figures import (
    describe,
    easy_name,
    importance_bars,
    pareto_front,
    scatter,
    slices,
)
from sweep.report.page import _class_names
from sweep.results.table import Row, results_table

PLAN = PrivacyPlan.restored(
    {
        "num_examples": 1437,
        "target_epsilon": 10.0,
        "delta": 1e-5,
        "neighboring_relation": "zero_out",
        "scope": "trial",
        "public_data": False,
        "central": None,
        "score": None,
        "dp_sgd": {
            "num_steps": 6,
            "sample_rate": 0.1,
            "noise_multiplier": 1.0,
            "max_grad_norm": 1.0,
            "expected_batch_size": 143,
        },
        "epsilon": 9.9,
        "epsilon_central": 0.0,
        "epsilon_score": 0.0,
    }
)


def row(name: str, accuracy: float, fid: float, folder: Path = Path(), **changes: object) -> Row:
    config = load("core/configs/digits.yaml", {k.replace("__", "."): v for k, v in changes.items()})
    scores = {"accuracy": accuracy, "fid_cnn": fid}
    return Row(name, folder, config, "finished", scores, PLAN, 1.0, "")


@pytest.fixture
def sweep():
    return load_sweep("tests/data/sweep.yaml", {})


def test_the_count_of_a_sweep_is_the_one_that_it_searches(sweep):
    assert sweep.count_key == "central_images.per_class"
    quickstart = load_sweep("sweep/configs/quickstart.yaml", {})
    assert quickstart.count_key == "central_images.num_clusters"
    config = quickstart.run
    plan = dataclasses.replace(PLAN, moments=MomentsPlan.of(config))
    started = Row("a", Path(), config, "finished", {"accuracy": 0.5}, plan, 1.0, "")
    assert easy_name([started]) == "moments"
    assert easy_name([row("b", 0.5, 9)]) == "central images"
    assert f"count {config.central_images.num_clusters}, noise" in describe(started)


def test_rows_of_pictures_have_the_names_of_their_classes(tmp_path):
    winner = row("a", 0.5, 9, tmp_path, dataset__num_classes=10)
    assert _class_names(None) == []
    assert _class_names(winner) == list("0123456789")
    write_class_names(tmp_path, [f"class {label}" for label in range(12)])
    assert _class_names(winner) == [f"class {label}" for label in range(10)]


def test_the_report_shows_which_classes_are_lost_once_the_best_trial_was_inspected(
    sweep, tmp_path, monkeypatch
):
    winner = row("a", 0.5, 9, tmp_path / "run")
    monkeypatch.setattr("sweep.report.page.load_rows", lambda _: [winner])
    monkeypatch.setattr("sweep.report.page.affordable", lambda *_: None)  # Takes half a minute.
    sweep = sweep.model_copy(update={"storage_path": str(tmp_path)})
    page = tmp_path / "report.html"
    write_report(sweep, page)
    assert f"core inspect --run-dir {winner.run_dir}</code>" in page.read_text()
    classes = {"names": ["one", "a <b>"], "synthetic": [[3, 1], [4, 1]], "real": [[4, 0], [0, 5]]}
    write_json(winner.folder.inspection, {"classes": classes})
    write_report(sweep, page)
    text = " ".join(page.read_text().split())
    worst = '<th scope="row">a &lt;b&gt;</th><td>5</td><td>20.0%</td><td>100.0%</td>'
    assert text.index(worst) < text.index('<th scope="row">one</th><td>4</td><td>75.0%</td>')


def test_front_holds_what_no_other_trial_beats():
    rows = [row("a", 0.5, 9), row("b", 0.9, 20), row("c", 0.4, 12), row("d", 0.9, 21)]
    assert [each.trial for each in pareto_front(rows, "fid_cnn")] == ["a", "b"]
    assert pareto_front([], "fid_cnn") == []


def test_points_are_told_apart_by_shape():
    rows = [row("a", 0.5, 9), row("b", 0.9, 20), row("c", 0.1, 30, stage_split=0.0)]
    traces = scatter(rows, rows[1], lambda r: r.scores["fid_cnn"], lambda r: r.scores["accuracy"])
    assert [trace["name"] for trace in traces] == [
        "trial",
        "trial without easy stage",
        "best trial",
    ]
    assert len({trace["marker"]["symbol"] for trace in traces}) == 3
    assert "plain DP-SGD" in traces[1]["text"][0]


def points(number: int, accuracy) -> list[Row]:
    return [
        row(
            str(i),
            accuracy(i),
            9.0,
            stage_split=0.08 * i,
            central_images__per_class=1 + i * 7 % 10,
            central_images__noise_multiplier=1.0 + i * 3 % 10,
        )
        for i in range(number)
    ]


def test_importance_finds_the_parameter_that_matters(sweep, monkeypatch):
    monkeypatch.setattr(effects, "RESAMPLES", 20)  # Of 100, which take ten seconds.
    found = effects.importance(sweep, points(10, lambda i: 0.1 * i))
    assert isinstance(found, dict)
    assert next(iter(found)) == "stage_split"
    assert sum(each.share for each in found.values()) == pytest.approx(1)
    assert [key for key, each in found.items() if each.is_effect] == ["stage_split"]
    assert found == effects.importance(sweep, points(10, lambda i: 0.1 * i))
    effect, rest = effects.told_of_importance(found, "accuracy")
    assert re.match(
        r"stage_split has an effect on accuracy: \d+% of .* \d+ points more than by", effect
    )
    others = [key for key in found if key != "stage_split"]
    assert rest == f"Not told from chance: {', '.join(others)}."
    figure = importance_bars(found)
    (bars,) = figure.data
    assert bars["marker"]["color"] == ["--paper", "--paper", "--trial"]
    assert "points beyond chance" in figure.alt


def test_of_noise_nothing_is_called_an_effect(sweep, monkeypatch):
    """Although one parameter has the largest share, and replicates repeat their settings."""
    monkeypatch.setattr(effects, "RESAMPLES", 20)
    rng = np.random.default_rng(2)
    settings = points(10, lambda _: float(rng.random()))
    again = [dataclasses.replace(row, scores=dict(row.scores)) for row in settings[:4]]
    found = effects.importance(sweep, [*settings, *again])
    assert max(each.share for each in found.values()) > 0.4
    assert all(each.low < 0 for each in found.values())
    (line,) = effects.told_of_importance(found, "accuracy")
    assert line.startswith("Not told from chance: ")


def test_an_effect_is_what_its_interval_excludes_from_zero():
    made = [effects.Importance(0.9, low, 0.8) for low in (0.01, 0.0, -0.2)]
    assert [each.is_effect for each in made] == [True, False, False]


def test_importance_says_why_there_is_none(sweep):
    few = effects.importance(sweep, points(9, lambda i: 0.1 * i))
    assert "at least 10 finished trials" in few
    assert "this sweep has 9" in few
    assert "same accuracy" in effects.importance(sweep, points(10, lambda _: 0.5))


def test_edge_of_the_affordable_is_located(sweep, monkeypatch):
    def pays(config):
        central = config.central_images
        if central.noise_multiplier < 2 * central.per_class**0.5:
            raise InfeasibleError("no")

    monkeypatch.setattr(effects, "check_feasible", pays)
    edge = effects.affordable(sweep, load("core/configs/digits.yaml"))
    assert edge is not None
    assert edge.counts[0] == 1
    assert edge.counts[-1] == 50
    assert edge.excludes_something
    for count, noise in zip(edge.counts, edge.noises, strict=True):
        assert noise == pytest.approx(2 * count**0.5, rel=0.07)


def test_edge_may_lie_outside_the_space(sweep, monkeypatch):
    def broke(_):
        raise InfeasibleError("no")

    around = load("core/configs/digits.yaml")
    monkeypatch.setattr(effects, "check_feasible", broke)
    edge = effects.affordable(sweep, around)
    assert edge is not None
    assert set(edge.noises) == {None}
    monkeypatch.setattr(effects, "check_feasible", lambda _: None)
    edge = effects.affordable(sweep, around)
    assert edge is not None
    assert not edge.excludes_something


def test_there_is_no_edge_without_both_intervals(sweep):
    space = dict(sweep.search_space)
    del space["central_images.noise_multiplier"]
    narrow = sweep.model_copy(update={"search_space": space})
    assert effects.affordable(narrow, load("core/configs/digits.yaml")) is None


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path):
    log = MetricsLog(RunFolder(tmp_path), 0)
    for step, loss in enumerate((0.5, float("nan"), 0.25)):
        log({"step": step, "stage": "private_training", "loss": loss})
    figure = curves([row("a", 0.5, 9, tmp_path)], None)
    assert figure is not None
    assert figure.data[0]["y"] == [0.5, None, 0.25]


def test_curves_survive_a_torn_line(tmp_path):
    lines = [{"step": s, "stage": "warm_up", "loss": 1.0 / s} for s in range(1, 400)]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 400, "st'
    (tmp_path / "metrics.jsonl").write_text(text)
    first = row("a", 0.5, 9, tmp_path)
    figure = curves([first, dataclasses.replace(first, run_dir=tmp_path / "none")], first)
    assert figure is not None
    assert len(figure.data) == 1
    assert 50 < len(figure.data[0]["x"]) <= 120
    assert figure.data[0]["line"]["dash"] == "dot"
    assert curves([], None) is None


@pytest.mark.parametrize(("scores", "contours"), [((0.1, 0.5), 1), ((0.1, 0.1), 0)])
def test_scores_that_are_all_alike_have_no_contours(sweep, scores, contours):
    """Levels between equal numbers would be without end."""
    noises = {"central_images__noise_multiplier": 2.0}, {"central_images__noise_multiplier": 8.0}
    settings = [
        {**noise, "central_images__per_class": n} for n in (2, 5, 9, 20) for noise in noises
    ]
    rows = [row(str(i), scores[i % 2], 9.0, **each) for i, each in enumerate(settings)]
    figure = affordable_map(sweep, rows, rows[0], effects.Boundary([1, 50], [0.5, 0.5], 1.0), [])
    assert sum(trace["type"] == "contour" for trace in figure.data) == contours


def test_contours_are_of_the_mean_of_trials_at_one_point(sweep):
    """Points whose means are equal have none, though their trials differ."""
    points = [
        {"central_images__noise_multiplier": noise, "central_images__per_class": count}
        for noise in (2.0, 8.0)
        for count in (2, 20)
    ]
    rows = [row(f"{i}-{score}", score, 9.0, **p) for i, p in enumerate(points) for score in (0, 1)]
    edge = effects.Boundary([1, 50], [0.5, 0.5], 1.0)
    figure = affordable_map(sweep, rows, rows[0], edge, [])
    assert all(trace["type"] != "contour" for trace in figure.data)
    rows[0] = dataclasses.replace(rows[0], scores={"accuracy": 0.5, "fid_cnn": 9.0})
    figure = affordable_map(sweep, rows, rows[0], edge, [])
    (contour,) = (trace for trace in figure.data if trace["type"] == "contour")
    assert max(z for line in contour["z"] for z in line if z is not None) == pytest.approx(0.75)


def test_choices_stand_as_given_and_two_noises_keep_their_names():
    searched = {
        "frequency.noise_multiplier.choices": [115.0, 20.0, 42.0],
        "method.choices": ["feta_pro"],
    }
    sweep = load_sweep(
        "tests/data/sweep.yaml",
        {f"search_space.{key}": value for key, value in searched.items()},
    )
    axes = [figure.layout["xaxis"] for figure in slices(sweep, [row("a", 0.5, 9)], None)]
    orders = [axis["categoryarray"] for axis in axes if axis["type"] == "category"]
    assert orders == [[115.0, 20.0, 42.0], ["feta_pro"]]
    table = results_table(sweep, [row("a", 0.5, 9)], [], ["accuracy"], 10.0)
    assert "frequency noise_multiplier" in [column.header for column in table.columns]
