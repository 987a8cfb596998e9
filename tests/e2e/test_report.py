"""The report as a person meets it: a file, opened in a real browser, without a network."""

import json
import re
from pathlib import Path

import pytest

from core.privacy.accounting.rounding import upward
from core.privacy.plan.plan import composed_epsilon
from sweep.__main__ import main
from sweep.results.find import open_sweep
from sweep.results.table import best, load_rows

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: the extra `dev`")
VIEWS = {
    "light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "color_scheme": "light",
        "is_mobile": True,
        "has_touch": True,
    },
}


@pytest.fixture(autouse=True, scope="module")
def _few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweep.report.effects.RESAMPLES", 10)  # Of 100, which take ten seconds.
        yield


@pytest.fixture(scope="module")
def report(storage) -> Path:
    assert main(["report", "--name", "small", "--storage", str(storage)]) == 0
    return storage / "small" / "report.html"


@pytest.fixture(scope="module", params=VIEWS)
def view(request, browser, report, artifacts):
    """Name of the view, the open page, and what went wrong on the way or left the machine."""
    context = browser.new_context(**VIEWS[request.param])
    page = context.new_page()
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on("request", lambda asked: troubles.append(asked.url) if _leaves(asked.url) else None)
    page.goto(report.as_uri())
    page.wait_for_selector("#curves .main-svg")
    page.screenshot(path=artifacts / f"report {request.param}.png", full_page=True)
    yield request.param, page, troubles
    context.close()


def _leaves(url: str) -> bool:
    return not url.startswith(("file:", "data:", "blob:"))


@pytest.fixture
def sweep(storage):
    return open_sweep(storage, "small")


def test_nothing_breaks_and_nothing_is_fetched(view):
    _, page, troubles = view
    assert troubles == []
    policy = page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    assert "default-src 'none'" in policy


def test_the_file_can_be_mailed(report):
    assert report.stat().st_size < 8e6
    text = report.read_text()
    assert text.count("<!DOCTYPE html>") == 1
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"http", text)


def test_the_answer_comes_first(view, sweep):
    _, page, _ = view
    rows = load_rows(sweep)
    winner = best(sweep, rows)
    heading = page.locator("h2").first
    assert heading.inner_text() == f"Best trial: {winner.trial}"
    answer = page.locator("#answer").inner_text()
    assert f"{winner.scores['accuracy']:.4g}\nnon-private" in answer
    trained = [row.plan for row in rows if row.state == "finished"]
    assert f"epsilon of one trial\n{upward(max(plan.epsilon for plan in trained))}" in answer
    assert f"\n{upward(composed_epsilon(trained))}" in answer
    assert "differentially private. The choice among" in answer
    assert "This page is not private." in page.locator("header").inner_text()


def pictures_of_best(sweep) -> int:
    """How many pictures the best trial has; plain DP-SGD has no central images to show."""
    winner = best(sweep, load_rows(sweep))
    assert winner is not None
    return sum(grid.exists() for grid in (winner.folder.grid, winner.folder.central_grid))


def test_pictures_are_there_and_described(view, sweep):
    _, page, _ = view
    pictures = page.evaluate(
        "[...document.images].map(i => [i.complete && i.naturalWidth > 0, i.alt, i.clientWidth])"
    )
    assert len(pictures) == pictures_of_best(sweep) + 12
    assert "a row is a class, from the top: 0, 1, 2, 3" in page.locator("main").inner_text()
    for loaded, alt, width in pictures:
        assert loaded
        assert alt.startswith(("Central images of trial", "Synthetic images of trial"))
        assert width > 20


def test_figures_show_what_they_should(view):
    _, page, _ = view
    plots = page.evaluate(
        """[...document.querySelectorAll('.plot')].map(p => [
            p.id, p.getAttribute('aria-label'), p.querySelector('.main-svg')?.clientHeight ?? 0,
            p.data.reduce((n, t) => n + (t.x?.length ?? 0), 0), p.textContent])"""
    )
    found = {name: text for name, _, _, _, text in plots}
    slices = {f"slice-{i}" for i in range(5)}
    assert set(found) == {"pareto", "importance", "map", "budget", "curves", *slices}
    for _, alt, height, points, _ in plots:
        assert alt
        assert height > 100
        assert points > 0
    assert "Pareto front" in found["pareto"]
    assert "trial without easy stage" in found["pareto"]
    assert "%" in found["importance"]
    assert "the budget cannot pay" in found["map"]
    assert "pruned without compute" in found["map"]
    assert "central images alone" in found["budget"]
    assert "other trials, warm-up" in found["curves"]
    kinds = page.evaluate("document.getElementById('map').data.map(t => t.type)")
    assert "contour" in kinds


@pytest.mark.parametrize("view", ["light", "dark"], indirect=True)  # A phone has no pointer.
def test_a_hover_names_the_trial(view):
    _, page, _ = view
    page.locator("#pareto").scroll_into_view_if_needed()
    page.locator("#pareto .scatterlayer .points path").last.hover(force=True)
    page.wait_for_selector("#pareto .hovertext")
    assert re.search(r"[0-9a-f]{8}", page.locator("#pareto .hovertext").first.text_content())
    page.mouse.move(0, 0)


def test_every_section_says_what_it_promises(view):
    _, page, _ = view
    told = {s: page.locator(f"#{s}").inner_text() for s in ("trials", "problems", "setting")}
    assert "idx needs a folder" in told["problems"]
    assert "python" in told["setting"]
    assert "1 to 400, logarithmic" in told["setting"]
    assert page.locator("#trials tbody tr").count() == 13
    assert page.locator("#trials article").count() == 12
    privacy = page.locator("#privacy").inner_text()
    for words in ("one image with its label", "Not covered", "PLD", "does not cover those metrics"):
        assert words in privacy
    links = page.evaluate("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
    assert links == page.evaluate("[...document.querySelectorAll('section')].map(s => s.id)")


def test_a_narrow_screen_needs_no_sideways_scrolling(view):
    name, page, _ = view
    width = VIEWS[name]["viewport"]["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    rights = page.evaluate(
        "[...document.querySelectorAll('.plot, img, article, .tiles > div')]"
        ".map(e => e.getBoundingClientRect().right)"
    )
    assert max(rights) <= width


def test_text_is_legible(view):
    """Contrast of at least 4.5 to the page (WCAG 2, AA), of HTML and of plots."""
    name, page, _ = view
    check_contrast(page, dark=name == "dark")


@pytest.mark.parametrize("view", ["light"], indirect=True)
def test_plots_follow_the_theme(view):
    _, page, _ = view
    page.emulate_media(color_scheme="dark")
    ink = page.evaluate("getComputedStyle(document.body).color")
    sync_api.expect(page.locator("#pareto .xtick text").first).to_have_css("fill", ink)
    check_contrast(page, dark=True)
    page.emulate_media(color_scheme="light")


def check_contrast(page, dark: bool) -> None:
    paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (paper < 0.05) if dark else (paper > 0.9)
    colours = page.evaluate(
        """Object.fromEntries([
            ...[...document.querySelectorAll('p, h2, dt, dd, th, td, caption, nav a, summary, li')]
                .map(e => [getComputedStyle(e).color, e.tagName]),
            ...[...document.querySelectorAll('.plot .xtick text, .plot .legendtext')]
                .map(e => [getComputedStyle(e).fill, 'plot'])])"""
    )
    assert len(colours) >= 3
    for colour, where in colours.items():
        bright, dim = sorted((luminance(colour), paper), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (colour, where)


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`."""
    values = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_without_scripts_the_tables_remain(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("#trials tbody tr").count() == 13
    assert "Best trial" in page.locator("#answer").inner_text()
    context.close()


def test_a_sweep_without_results_has_a_report_too(browser, storage, tmp_path):
    path = tmp_path / "new.html"
    assert main(["report", "--name", "new", "--storage", str(storage), "--out", str(path)]) == 0
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    assert page.locator("h2").first.inner_text() == "No trial has finished yet"
    assert errors == []
    page.close()


def test_a_lost_ledger_is_said_and_hides_nothing_else(report, storage, tmp_path):
    ledger = storage / "ledger"
    hidden = ledger.rename(tmp_path / "hidden")
    try:
        path = tmp_path / "lost.html"
        main(["report", "--name", "small", "--storage", str(storage), "--out", str(path)])
    finally:
        hidden.rename(ledger)
    text = path.read_text()
    assert "The ledger could not be read" in text
    assert json.dumps("pareto") in text


def test_pictures_that_would_make_the_file_too_large_are_named_instead(
    report, sweep, storage, tmp_path, monkeypatch
):
    monkeypatch.setattr("sweep.report.page.GALLERY_BYTES", 0)
    path = tmp_path / "slim.html"
    main(["report", "--name", "small", "--storage", str(storage), "--out", str(path)])
    text = path.read_text()
    assert text.count("Picture left out to keep this file small") == 12
    assert text.count("data:image/webp") == pictures_of_best(sweep)
