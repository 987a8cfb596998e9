"""MLflow's own pages, as a person who compares trials meets them: real server, real browser."""

import re
import shutil
from typing import NamedTuple

import pytest
from mlflow_servers import mlflow_server, postgresql
from recorded_sweep import record

from sweep.results.find import open_sweep
from sweep.results.table import Row, load_rows
from sweep.tracking.client import how_to_compare

# MLflow's page asks for users wherever there is no login, and cares not; on a busy machine it draws
# its charts once before they have a size (an SVG attribute is then not a number). That the charts
# end up right is tested below.
HARMLESS = re.compile(
    r"/users/current|GPU stall due to ReadPixels|AG Grid: since|<\w+> attribute .*NaN"
)


class Site(NamedTuple):
    """Where a sweep was recorded."""

    store: str
    links: dict[str, str]
    rows: list[Row]
    parent_id: str


@pytest.fixture(scope="module")
def site(request, storage, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    # A copy, as recording a complete sweep marks what may be released.
    sweep = open_sweep(shutil.copytree(storage, folder / "runs"), "small")
    every = load_rows(sweep)
    rows = [*every[:4], next(row for row in every if row.state == "failed")]

    def recorded(store: str):
        with mlflow_server(folder, store) as uri:
            parent_id = record(sweep, rows, uri)
            told = how_to_compare(uri, sweep.experiment, sweep.name)
            links = dict(re.findall(r"^  (\w+): (http\S+)$", told, re.MULTILINE))
            yield Site(request.param, links, rows, parent_id)

    if request.param == "sqlite":
        yield from recorded(f"sqlite:///{folder}/mlflow.db")
    else:
        with postgresql() as store:
            yield from recorded(store)


def on(store: str) -> pytest.MarkDecorator:
    """Where a page is looked at: each on one store, as the pages know nothing of it."""
    return pytest.mark.parametrize("site", [store], indirect=True)


@pytest.fixture
def page(browser):
    """An empty page of a new visitor; afterwards nothing may have failed in it, or left here."""
    context = browser.new_context(viewport={"width": 2200, "height": 2600})
    page = context.new_page()
    troubles: list[str] = []

    def on_console(message) -> None:
        text = f"{message.type}: {message.text} {message.location.get('url', '')}"
        if message.type in ("error", "warning") and not HARMLESS.search(text):
            troubles.append(text)

    def on_request(asked) -> None:
        if not asked.url.startswith(("http://127.0.0.1", "data:", "blob:")):
            troubles.append(asked.url)

    page.on("console", on_console)
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on("request", on_request)
    page.set_default_timeout(90_000)
    yield page
    context.close()
    assert troubles == []


def visit(page, address: str) -> None:
    """Opens a page and closes the panel that MLflow opens beside it for a new visitor."""
    page.goto(address)
    page.locator('button[aria-label="Close"]').first.click()


@on("sqlite")
def test_the_charts_open_without_set_up(site, page, artifacts):
    visit(page, site.links["charts"])
    finished = [row for row in site.rows if row.state == "finished"]
    for row in site.rows:
        page.get_by_role("link", name=row.trial).first.wait_for()
    order = [row.trial for row in sorted(finished, key=lambda r: -r.scores["accuracy"])]
    # By the place on the page: the rows of the list stand in any order in its source.
    links = [page.get_by_role("link", name=name).first for name in (order[0], order[-1])]
    assert links[0].bounding_box()["y"] < links[1].bounding_box()["y"]
    for title in (
        "Settings and results",
        "Objective by setting",
        "Pictures",
        "Loss of both stages",
    ):
        page.get_by_text(title).first.wait_for()
    page.wait_for_function("document.querySelectorAll('.scatterlayer .points path').length >= 12")
    page.wait_for_function(
        """n => [...document.images].filter(i =>
            i.src.includes('get-artifact') && i.complete && i.naturalWidth > 10).length >= n""",
        arg=len(finished) + sum(row.config.warm_up_steps > 0 for row in finished),
    )
    text = page.inner_text("body")
    for words in ("samples", "central_images", "warm_up/loss", "private_training/loss"):
        assert words in text
    for axis in ("stage_split", "accuracy", "fid_cnn"):
        assert axis in page.locator("svg.parcoords, .parcoords").first.text_content()
    assert "No image logged at this step" not in text
    page.screenshot(path=artifacts / f"mlflow charts {site.store}.png")


@on("postgresql")
def test_the_table_compares_numbers(site, page, artifacts):
    visit(page, site.links["table"])
    finished = [row for row in site.rows if row.state == "finished"]
    page.get_by_text(f"Comparing {len(finished)} Runs").wait_for()
    page.get_by_text("gpu_hours").first.wait_for()
    text = page.inner_text("body")
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", text)]
    for row in finished:
        assert row.trial in text
        for value in (row.config.stage_split, row.config.central_images.noise_multiplier):
            assert str(value) in text
        for value in (row.scores["accuracy"], row.plan.noise_multiplier):
            assert min(abs(number - value) for number in numbers) <= 5.1e-4  # The page rounds.
    for name in ("epsilon_trial", "epsilon_central_share", "gpu_hours", "fid_cnn", "seconds"):
        assert name in text
    page.screenshot(path=artifacts / f"mlflow table {site.store}.png")


@on("postgresql")
def test_a_trial_says_what_it_was_trained_on_and_what_ran(site, page, artifacts):
    winner = best_of(site)
    visit(page, site.links["charts"].replace("compareRunsMode=CHART&", ""))
    page.get_by_role("link", name=winner.trial).first.click()
    page.get_by_text("privacy.accuracy").first.wait_for()
    text = page.inner_text("body")
    assert "non-private" in text
    assert re.search(r"digits \([0-9a-f]{8}\)", text)
    assert "System metrics" in text
    page.screenshot(path=artifacts / f"mlflow trial {site.store}.png")


@on("postgresql")
def test_the_best_generator_is_registered(site, page, artifacts):
    winner = best_of(site)
    visit(page, site.links["charts"].split("#")[0] + "#/models/small/versions/1")
    page.get_by_text("differentially private").first.wait_for()
    page.wait_for_function(r"/@\s*best/.test(document.body.innerText)")  # Asked for later.
    assert winner.trial in page.inner_text("body")
    page.screenshot(path=artifacts / f"mlflow model {site.store}.png")


def best_of(site: Site) -> Row:
    return max((r for r in site.rows if r.scores), key=lambda row: row.scores["accuracy"])
