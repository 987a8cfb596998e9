"""The report of a grid, beside a published one: a file, opened in a real browser."""

from pathlib import Path

import optuna
import pytest
import torch
from scipy.stats import spearmanr

from core.config import nested, short_digest, yaml_subset
from core.generation.png import write_grid
from core.io.files import write_json
from core.privacy.plan.plan import make_plan
from sweep.__main__ import main
from sweep.config.grid import grid_points
from sweep.config.sweep import dump_sweep, load_sweep
from sweep.search.study import distributions, open_storage

ROOT = Path(__file__).resolve().parents[2]
COUNT, NOISE = "central_images.per_class", "central_images.noise_multiplier"
SWEEP = f"""
name: grid
base: {ROOT}/core/configs/digits.yaml
sampler: grid
objective:
  metric: fid_cnn
search_space:
  central_images.noise_multiplier:
    choices: [2.0, 5.0]
  central_images.per_class:
    choices: [1, 5, 400]
published:
  source: "Someone et al. 2020, table 3"
  metric: fid
  rows: central_images.noise_multiplier
  columns: central_images.per_class
  values:
    at_2.0: [31.1, 27.7, cannot_be_paid]
    at_5.0: [16.8, 15.9, 10.6]
"""
SCORES = [23.25, 24.5, None, 21.0, 22.75, 20.5]
PICTURES = {
    "central_images": "Central images",
    "frequency": "Frequency stage",
    "synthetic": "Synthetic images",
}
DEAR = {NOISE: 2.0, COUNT: 400}
VIEWS = {
    "light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "is_mobile": True},
}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The report of a grid as a real sweep leaves it; one point was pruned."""
    folder = tmp_path_factory.mktemp("grid")
    (folder / "grid.yaml").write_text(SWEEP)
    sweep = load_sweep(folder / "grid.yaml", {"storage_path": str(folder / "runs")})
    write_json(sweep.folder / "sweep.json", {**dump_sweep(sweep), "num_trials": 5})
    plan = make_plan(sweep.run).summary()
    for point, score in zip(grid_points(sweep.choices), SCORES, strict=True):
        config = sweep.trial_config(point)
        trial = sweep.folder / "trials" / short_digest(config)
        if score is not None:
            result = {"accuracy": 0.5, "fid_cnn": score, "seconds": 1.0, "fingerprint": "0" * 64}
            write_json(trial / "evaluation.json", result)
            for number, name in enumerate(PICTURES):
                images = torch.full((20, 1, 8, 8), 80 * number, dtype=torch.uint8)
                write_grid(trial / name / "grid.png", images, torch.arange(20) % 10)
            (trial / "config.yaml").write_text(yaml_subset.dump(nested(config)))
            write_json(trial / "privacy.json", plan)
    study = optuna.create_study(study_name="grid", storage=open_storage(sweep.folder))
    state, space = optuna.trial.TrialState.PRUNED, distributions(sweep)
    study.add_trial(optuna.trial.create_trial(state=state, params=DEAR, distributions=space))
    assert main(["report", "--name", "grid", "--storage", str(folder / "runs")]) == 0
    return sweep.folder / "report.html"


@pytest.mark.parametrize("name", VIEWS)
def test_both_grids_stand_in_the_page(browser, report, artifacts, name):
    context = browser.new_context(**VIEWS[name])
    page = context.new_page()
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(report.as_uri())
    page.wait_for_selector("#grid-published .main-svg")
    drawn = {
        each: page.locator(f"#{each}").text_content() for each in ("grid-own", "grid-published")
    }
    for text, figures in (
        (drawn["grid-own"], SCORES),
        (drawn["grid-published"], (31.1, 27.7, 16.8, 15.9, 10.6)),
    ):
        assert all(f"{figure:.4g}" in text for figure in figures if figure is not None)
        assert "cannot be paid" in text
    assert page.locator(".pair figcaption").all_inner_texts() == list(PICTURES.values())
    page.locator("#grid summary").click()
    told = page.locator("#grid").inner_text()
    assert "Someone et al. 2020, table 3" in told
    rho = spearmanr([23.25, 24.5, 21.0, 22.75, 20.5], [31.1, 27.7, 16.8, 15.9, 10.6]).statistic
    assert f"fid_cnn of this sweep and fid as published, over 5 common cells: {rho:.2f}." in told
    rows = page.locator("#grid tbody tr").all_inner_texts()
    assert [row.split("\t") for row in rows] == [
        ["2.0", "23.25", "24.5", "cannot be paid"],
        ["5.0", "21", "22.75", "20.5"],
        ["2.0", "31.1", "27.7", "cannot be paid"],
        ["5.0", "16.8", "15.9", "10.6"],
    ]
    assert page.evaluate("document.documentElement.scrollWidth") <= VIEWS[name]["viewport"]["width"]
    links = page.evaluate("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
    assert links == page.evaluate("[...document.querySelectorAll('section')].map(s => s.id)")
    page.locator("#grid").screenshot(path=artifacts / f"grid {name}.png")
    assert troubles == []
    context.close()
