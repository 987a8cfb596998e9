"""A grid: every point once, none by results; what is published fits it, and is compared by rank."""

import dataclasses
import itertools

import optuna
import pytest
from optuna.trial import TrialState
from test_report_parts import row

from core.config import short_digest
from core.errors import ConfigError, InfeasibleError
from sweep.config.grid import CANNOT_BE_PAID, grid_points
from sweep.config.sweep import dump_sweep, load_sweep
from sweep.report import heatmap
from sweep.report.heatmap import agreement, heat_maps
from sweep.search.feasible import print_plan, with_num_trials
from sweep.search.search import FeasibleSearch
from sweep.search.study import open_storage, pruned_points

COUNT, NOISE = "central_images.per_class", "central_images.noise_multiplier"
SWEEP = """
name: grid
base: {root}/core/configs/digits.yaml
sampler: grid
objective:
  metric: fid_cnn
search_space:
  central_images.per_class:
    choices: [1, 5, 50]
  central_images.noise_multiplier:
    choices: [2.0, 5.0, 9.0]
published:
  source: "a test"
  metric: fid
  rows: central_images.per_class
  columns: central_images.noise_multiplier
  values:
    at_1: [3.0, 2.0, 1.5]
    at_5: [4.0, 3.5, null]
    at_50: [cannot_be_paid, 9.0, 8.0]
"""
DEAR = ({COUNT: 50, NOISE: 2.0}, {COUNT: 50, NOISE: 5.0})
FREE = {f"at_{n}": [1, 2, "free"] for n in (1, 5, 50)}
GRID = [{COUNT: count, NOISE: noise} for count in (1, 5, 50) for noise in (2.0, 5.0, 9.0)]


@pytest.fixture
def sweep_of(tmp_path, request, monkeypatch):
    """A function that loads the sweep; the budget cannot pay two of its nine points."""

    def check_feasible(config):
        central = config.central_images
        if {COUNT: central.per_class, NOISE: central.noise_multiplier} in DEAR:
            raise InfeasibleError("too dear: lower central_images.per_class")

    monkeypatch.setattr("sweep.search.feasible.check_feasible", check_feasible)
    path = tmp_path / "grid.yaml"
    path.write_text(SWEEP.format(root=request.config.rootpath))
    return lambda **keys: load_sweep(path, {"storage_path": str(tmp_path), **keys})


def searched(sweep, number: int, finished=()) -> tuple[list, list]:
    """Points of so many trials in a new driver, and those that it pruned."""
    pruned: list[dict] = []
    ended = {short_digest(sweep.trial_config(point)): [0.5] for point in finished}
    search = FeasibleSearch(sweep, ended, lambda point, _: pruned.append(point))
    return [search.suggest(str(i)) for i in range(number)], pruned


def test_every_point_comes_once_and_what_cannot_be_paid_is_pruned(sweep_of):
    sweep = with_num_trials(sweep_of())
    assert sweep.num_trials == 7
    points, pruned = searched(sweep, 7)
    assert sorted(points, key=GRID.index) == [point for point in GRID if point not in DEAR]
    assert sorted(pruned, key=GRID.index) == list(DEAR)
    assert sorted(pruned_points(sweep), key=GRID.index) == list(DEAR)


@pytest.mark.parametrize("stops", [(1,), (2, 3, 6)])
def test_neither_results_nor_restarts_change_the_order(sweep_of, stops):
    undisturbed, _ = searched(sweep_of(name="undisturbed"), 7)
    points, pruned, bounds = [], [], (0, *stops, 7)
    for begin, end in itertools.pairwise(bounds):
        new, left_out = searched(sweep_of(), end - begin, points)
        points, pruned = points + new, pruned + left_out
    assert points == undisturbed
    assert sorted(pruned, key=GRID.index) == list(DEAR)
    other, _ = searched(sweep_of(name="other", search_seed=1), 7)
    assert other != undisturbed
    assert sorted(other, key=GRID.index) == sorted(undisturbed, key=GRID.index)


def test_a_result_reaches_no_later_point(sweep_of):
    orders = []
    for score in (0.0, 9.0):
        sweep = sweep_of(name=f"score{score:.0f}")
        search = FeasibleSearch(sweep, {}, lambda *_: None)
        points = []
        for i in range(7):
            points.append(search.suggest(str(i)))
            search.on_trial_complete(str(i), {"training_iteration": 1, "fid_cnn": score * i})
        orders.append(points)
    assert orders[0] == orders[1]


def test_an_interrupted_point_comes_again_and_no_other(sweep_of):
    sweep = sweep_of()
    first, _ = searched(sweep, 3)
    again, pruned = searched(sweep, 5, [first[0], first[2]])
    assert again[0] == first[1]
    assert not pruned
    assert len({str(point) for point in first + again}) == 7
    study = optuna.load_study(study_name="grid", storage=open_storage(sweep.folder))
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.COMPLETE) == 2


def test_a_point_that_a_driver_died_asking_for_is_asked_for_again(sweep_of):
    sweep = sweep_of()
    searched(sweep, 0)
    study = optuna.load_study(
        study_name="grid",
        storage=open_storage(sweep.folder),
        sampler=FeasibleSearch(sweep, {}, lambda *_: None)._ot_study.sampler,
    )
    study.ask()  # Without a value for any key.
    points, pruned = searched(sweep, 7)
    assert sorted(points + pruned, key=GRID.index) == GRID


def test_more_trials_may_be_asked_for_later(sweep_of):
    few, _ = searched(sweep_of(num_trials=2), 2)
    more, _ = searched(sweep_of(num_trials=7), 5, few)
    assert few + more == searched(sweep_of(name="undisturbed"), 7)[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({f"search_space.{COUNT}.choices": [1, 5, 5]}, r"choices=\[1, 5, 5\] names a value twice"),
        ({"num_trials": 10}, r"num_trials=10 exceeds the grid of 9 points"),
        ({"search_space.stage_split.low": 0.1, "search_space.stage_split.high": 0.2,
          "published": None}, r"stage_split is an interval, of which sampler='grid' knows no"),
        ({f"search_space.{COUNT}.choices": [1, 5]}, r"must hold at_1, at_5 with 3 figures each"),
        ({"published.rows": "stage_split"}, r"rows='stage_split' .* two keys of a search_space"),
        ({"published.values": FREE}, r"published\.values holds \['free'\]"),
        ({"published.metric": ""}, r"published\.metric="),
        ({"published": {"rows": COUNT}}, r"missing key 'published\.source'"),
        (
            {"privacy.scope": "selection", "privacy.dp_accuracy_stddev": 50,
             "objective.metric": "dp_accuracy"},
            r"is not proven for sampler='grid', which takes each point once: set sampler=random",
        ),
    ],
)  # fmt: skip
def test_grids_that_make_no_sense_are_refused(sweep_of, overrides, message):
    with pytest.raises(ConfigError, match=message):
        sweep_of(**overrides)


def test_more_than_the_budget_can_pay_is_refused(sweep_of):
    with pytest.raises(ConfigError, match=r"num_trials=8 exceeds the 7 of 9 points"):
        with_num_trials(sweep_of(num_trials=8))
    dear = {f"search_space.{COUNT}.choices": [50], f"search_space.{NOISE}.choices": [2.0, 5.0]}
    with pytest.raises(ConfigError, match=r"no point of the grid can be tried.* too dear"):
        with_num_trials(sweep_of(published=None, **dear))


def test_the_target_of_a_whole_sweep_is_shared_by_all_points_of_its_grid(sweep_of):
    """A share is reserved for each point before any is known to be too dear, which is safe."""
    scope = {"privacy.scope": "sweep", "privacy.dp_accuracy_stddev": 50}
    run = sweep_of(**scope, **{"objective.metric": "dp_accuracy"}).run
    assert run.privacy.num_shares == 9
    assert not run.privacy.adaptive


def trials(sweep, score):
    return [
        dataclasses.replace(
            row(str(i), 0.5, score(i)), config=sweep.trial_config(point)
        )
        for i, point in enumerate(GRID)
        if point not in DEAR
    ]  # fmt: skip


def test_maps_show_scores_and_why_there_is_none(sweep_of):
    sweep = sweep_of()
    rows = trials(sweep, lambda i: 10.0 + i)
    rows[0] = dataclasses.replace(rows[0], state="failed", scores={})
    own, published = heat_maps(sweep, rows[:-1], list(DEAR))
    assert own.cells == [
        ["failed", 11.0, 12.0],
        [13.0, 14.0, 15.0],
        ["cannot be paid", "cannot be paid", "not tried"],
    ]
    assert published.cells[1:] == [[4.0, 3.5, "not published"], ["cannot be paid", 9.0, 8.0]]
    assert own.metric == "fid_cnn"
    assert published.metric == "fid"
    marks = {trace["name"]: trace["marker"]["symbol"] for trace in own.figure.data[2:]}
    assert set(marks) == {"failed", "cannot be paid", "not tried"}
    assert own.figure.data[1]["text"] == ["11", "12", "13", "14", "15"]
    assert own.table.lines[0] == ["1", "failed", "11", "12"]
    assert "13" in str(own.table.lines[1])


def test_agreement_is_that_of_ranks(sweep_of):
    sweep = sweep_of()
    # Common cells: published 3, 2, 1.5, 4, 3.5, 8.
    same = dict(zip((0, 1, 2, 3, 4, 8), (30, 20, 10, 50, 40, 90), strict=True))
    maps = heat_maps(sweep, trials(sweep, lambda i: float(same.get(i, 0))), list(DEAR))
    assert "fid_cnn of this sweep and fid as published, over 6 common cells: 1.00" in agreement(
        maps
    )
    # Two neighbours exchanged: 1 - 6 * 2 / (6 * 35).
    swapped = same | {0: 20, 1: 30}
    maps = heat_maps(sweep, trials(sweep, lambda i: float(swapped.get(i, 0))), list(DEAR))
    assert ": 0.94." in agreement(maps)
    maps = heat_maps(sweep, trials(sweep, lambda i: -float(same.get(i, 0))), list(DEAR))
    assert ": -1.00." in agreement(maps)
    assert "the same in all" in agreement(heat_maps(sweep, trials(sweep, lambda _: 1.0), []))
    assert "3 cells in common" in agreement(
        heat_maps(sweep, trials(sweep, lambda i: float(i))[:3], [])
    )
    assert agreement(heat_maps(sweep, [], [])) == ""


def test_other_searches_have_no_map(sweep_of):
    quickstart = load_sweep("tests/data/sweep.yaml", {})
    assert heat_maps(quickstart, [], []) == []
    unpublished = sweep_of(published=None)
    (own,) = heat_maps(unpublished, trials(unpublished, float), [])
    assert own.metric == "fid_cnn"


def test_the_noise_factor_is_solved_by_the_plan(monkeypatch):
    """Without training: mnist at full size costs a fifteenth more for 250 images at noise 20."""
    sweep = load_sweep("sweep/configs/mnist_budget_grid.yaml", {})
    own, published = heat_maps_of_corner(sweep, monkeypatch)
    assert own.metric == published.metric == "noise_factor"
    assert own.cells[2][3] == pytest.approx(1.058, abs=2e-3)  # Published: 1.07.
    assert published.cells[0] == [1.47, 1.02, 1.004, "not published"]
    assert published.cells[1][0] == "cannot be paid"


def heat_maps_of_corner(sweep, monkeypatch):
    """Solves one cell for all, as each takes a second."""
    solve = heatmap._noise_factor

    def corner(config):
        central = config.central_images
        last = (central.per_class, central.noise_multiplier) == (250, 20.0)
        return solve(config) if last else 2.0

    monkeypatch.setattr(heatmap, "_noise_factor", corner)
    return heat_maps(sweep, [], [])


def test_the_published_grid_of_time_and_frequency_is_complete():
    sweep = load_sweep("sweep/configs/mnist_time_frequency_grid.yaml", {})
    assert len(grid_points(sweep.choices)) == 25
    published = dump_sweep(sweep)["published"]["values"]
    assert sum(map(len, published.values())) == 25
    assert CANNOT_BE_PAID not in str(published)


def test_a_plan_of_a_grid_names_its_trials_and_costs_one_that_can_be_paid(
    sweep_of, capsys, monkeypatch
):
    monkeypatch.setattr("sweep.search.feasible._print_grid", lambda *_: None)
    print_plan(sweep_of(**{"privacy.target_epsilon": 3.0}))
    text = capsys.readouterr().out
    assert "7 trials of 2 workers" in text
    assert "epsilon of one trial in the middle of the space" in text
