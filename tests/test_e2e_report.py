"""The toy pipeline's report in a real browser: figures, sorting, filtering, dark mode, a phone, print, no network."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

FIGURES = {
    "time", "memory", "sft-loss", "sft-held-out", "rm-loss", "rm-train-accuracy", "rm-accuracy", "rm-by-rating",
    "rm-by-source", "rm-by-safety-bin", "rm-calibration", "potential", "ppo-reward", "ppo-frontier", "ppo-gated",
    "ppo-kl", "ppo-entropy", "ppo-lengths", "ppo-cut-off", "ppo-explained",
}  # fmt: skip
FIGURES_OF_RUNS = {
    "scores-rm-helpfulness", "scores-rm-safety", "length-rm-helpfulness", "length-rm-safety", "kept-",
    "policies-scores-eval", "policies-rates-eval", "policies-gains-eval",
}  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium of the system; the tests are skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the dev extra has it)")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)} (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(pipeline: Path) -> Path:
    """What `align run` left beside the runs."""
    return pipeline / "report.html"


@pytest.fixture
def open_page(browser: Any, report: Path) -> Iterator[Any]:
    """`open_page(width=1280, dark=False)`: the report; fails on console messages and on requests for anything else."""
    troubles: list[str] = []
    contexts = []

    def open_report(width: int = 1280, *, dark: bool = False) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda message: troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("request", lambda request: troubles.append(request.url) if request.url != report.as_uri() else None)
        page.goto(report.as_uri())
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert not troubles


def test_every_figure_is_there_with_a_size_a_caption_and_a_label(open_page):
    page = open_page()
    figures = page.eval_on_selector_all(
        "figure",
        """found => found.map(figure => {
            const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
            return {id: figure.id, width: box.width, height: box.height, title: figure.querySelector("h3").textContent,
                    caption: figure.querySelector("figcaption").textContent, label: svg.getAttribute("aria-label"),
                    texts: svg.querySelectorAll("text").length};
        })""",
    )
    found = {figure["id"] for figure in figures}
    assert found >= FIGURES
    for prefix in FIGURES_OF_RUNS:
        assert any(name.startswith(prefix) for name in found), prefix
    for figure in figures:
        assert figure["width"] > 200 and figure["height"] > 60, figure
        assert figure["title"] == figure["label"] and figure["caption"].endswith("."), figure
        assert figure["texts"] > 2, figure


def test_a_click_or_a_key_on_a_columns_name_sorts_the_table(open_page):
    page = open_page()
    table = page.locator("#eval table.sortable")

    def column(place: int) -> list[str]:
        return table.locator(f"tbody tr td:nth-child({place})").all_inner_texts()

    assert column(1) == ["base", "sft", "rs", "ppo"]
    header = table.locator("th").nth(0)
    header.locator("button").click()
    assert column(1) == ["base", "ppo", "rs", "sft"] and header.get_attribute("aria-sort") == "ascending"
    header.locator("button").focus()
    page.keyboard.press("Enter")
    assert column(1) == ["sft", "rs", "ppo", "base"] and header.get_attribute("aria-sort") == "descending"
    reward = table.locator("th").nth(3)
    assert "gated reward" in reward.inner_text()
    reward.locator("button").click()
    numbers = [float(text.split()[0]) for text in column(4)]
    assert numbers == sorted(numbers) and len(set(numbers)) > 2  # by number: as text, "+4" would stand before "-1"
    assert header.get_attribute("aria-sort") == "none"


def test_answers_are_filtered_by_text_and_by_kind_of_prompt(open_page):
    page = open_page()
    part = page.locator("#answers details.answers").first
    shown = part.locator("article.asked:visible")
    assert shown.count() == 8
    part.locator("button.more").click()
    assert shown.count() == 60
    part.locator("select").select_option("safety")
    assert shown.count() == part.locator("article.asked[data-kind=safety]").count() == 30
    prompt = shown.first.locator("p.prompt").inner_text()
    part.locator("input[type=search]").fill(prompt.upper())
    texts = [text.lower() for text in shown.all_inner_texts()]
    assert 0 < len(texts) < 30 and all(prompt.lower() in text for text in texts)
    part.locator("input[type=search]").fill("no answer says this")
    assert shown.count() == 0 and part.locator("output").inner_text() == "0 of 0 shown"


def test_every_policys_answer_stands_beside_the_others(open_page):
    page = open_page()
    first = page.locator("#answers article.asked").first
    names = [name.split()[0] for name in first.locator(".answer h4").all_inner_texts()]
    assert names == ["base", "sft", "rs", "ppo"]
    tops = {box["y"] for answer in first.locator(".answer").all() if (box := answer.bounding_box())}
    assert len(tops) == 1
    assert all("reward" in text for text in first.locator(".scores").all_inner_texts())


def test_dark_mode_changes_paper_and_ink_and_print_is_light(open_page):
    look = """() => [getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.querySelector("#ppo-reward svg text")).fill]"""
    light_page, dark_page = open_page(), open_page(dark=True)
    light, dark = light_page.evaluate(look), dark_page.evaluate(look)
    assert light[0] == "rgb(255, 255, 255)"
    assert sum(map(int, dark[0][4:-1].split(","))) < 120  # nearly black
    assert sum(map(int, light[1][4:-1].split(","))) < 250 < 600 < sum(map(int, dark[1][4:-1].split(",")))
    dark_page.emulate_media(media="print", color_scheme="dark")
    assert dark_page.evaluate(look) == light
    assert not dark_page.locator("nav").is_visible()


def test_a_phone_needs_no_sideways_scrolling_and_its_text_is_large_enough(open_page):
    page = open_page(380)
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    for details in page.locator("details").all():
        details.evaluate("element => element.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    heights = page.eval_on_selector_all("figure svg text", "texts => texts.map(t => t.getBoundingClientRect().height)")
    assert min(heights) > 8


def test_a_report_of_two_pipelines_tells_their_runs_apart(pipeline, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pipeline, other, ignore=shutil.ignore_patterns("model", "report.html"))
    out = tmp_path / "both.html"
    done = subprocess.run(
        [sys.executable, "-m", "alignment.cli.main", "report", str(pipeline), str(other), "--out", str(out)],
        capture_output=True, text=True, cwd=ROOT, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0 and str(out) in done.stderr, done.stderr
    page = out.read_text(encoding="utf-8")
    assert "runs/sft" in page and "other/sft" in page and "16 of 16" in page
    assert "Held-out prompts: runs/eval, other/eval" in page
