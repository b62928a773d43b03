"""The toy pipeline's report in a real browser: figures, sorting, filtering, dark mode, a phone, print, no network."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import align
from run_folders import policy_figures, write_run

from alignment.report.page import write_report

pytestmark = pytest.mark.e2e
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

FIGURES = {
    "time", "memory", "sft-loss", "sft-held-out", "rm-loss", "rm-train-accuracy", "rm-accuracy", "rm-by-rating",
    "rm-by-source", "rm-by-safety-bin", "rm-calibration", "potential", "ppo-reward", "ppo-frontier", "ppo-gated",
    "ppo-kl", "ppo-entropy", "ppo-lengths", "ppo-cut-off", "ppo-explained", "ppo-scores", "ppo-value-loss",
    "ppo-policy-loss",
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


# What the toy pipeline does not measure, on its models: tuned temperatures, held-out prompts and a guard in PPO and in
# the evaluation, dialogues of Ghost Attention.
MORE_STAGES = """
runs: {folder}/more
defaults:
  model: {{dtype: float32}}
  run: {{seed: 0, device: cpu, num_threads: 1}}
  sampling: {{max_new_tokens: 8, max_rows: 64}}
  rewards: {{helpfulness: "{toy}/rm-helpfulness", safety: "{toy}/rm-safety"}}
stages:
  reject:
    model: {toy}/sft
    prompts: {{prompts: "toy:prompts.train", max_prompts: 24}}
    sampling: {{num_candidates: 4, temperature_grid: [0.7, 1.0, 1.3], temperature_prompts: 8}}
  ppo:
    model: {toy}/rs
    prompts: {{prompts: "toy:prompts.train", max_prompts: 64}}
    train: {{max_steps: 3, batch_size: 16, minibatch_size: 8}}
    evaluation: {{prompts: "toy:prompts.heldout", max_prompts: 16, every: 1, guard: "{toy}/rm-helpfulness"}}
  eval:
    policies: {{sft: "{toy}/sft", ppo: "${{ppo}}"}}
    prompts: {{prompts: "toy:prompts.heldout", max_prompts: 16}}
    guard: {toy}/rm-safety
  memory:
    stage: eval
    kind: gatt
    policies: {{before: toy, after: "{toy}/sft"}}
    prompts: {{prompts: "toy:prompts.heldout", max_prompts: 4, turns: 3, max_prompt_length: 400}}
    report_turns: [1, 2, 3]
"""
FIGURES_OF_MORE = {
    "temperatures", "potential", "ppo-held-out", "ppo-violations", "policies-scores-eval", "policies-gains-eval",
    "adherence-memory", "adherence-kinds-memory",
}  # fmt: skip


@pytest.fixture(scope="module")
def report_of_more(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of stages with everything measured that the toy pipeline leaves out."""
    folder = tmp_path_factory.mktemp("more")
    (folder / "more.yaml").write_text(MORE_STAGES.format(folder=folder, toy=pipeline), encoding="utf-8")
    done = align("run", folder / "more.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "more" / "report.html"


@pytest.fixture
def open_page(browser: Any, report: Path) -> Iterator[Any]:
    """`open_page(width=1280, dark=False, path=report)`: fails on console messages and on requests for anything else."""
    troubles: list[str] = []
    contexts = []

    def open_report(width: int = 1280, *, dark: bool = False, path: Path = report) -> Any:
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
        page.on("request", lambda request: troubles.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert not troubles


def check_figures(page: Any) -> set[str]:
    """The names of all figures, each with a size, a caption and a label."""
    figures = page.eval_on_selector_all(
        "figure",
        """found => found.map(figure => {
            const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
            return {id: figure.id, width: box.width, height: box.height, title: figure.querySelector("h3").textContent,
                    caption: figure.querySelector("figcaption").textContent, label: svg.getAttribute("aria-label"),
                    texts: svg.querySelectorAll("text").length};
        })""",
    )
    for figure in figures:
        assert figure["width"] > 200 and figure["height"] > 60, figure
        assert figure["title"] == figure["label"] and figure["caption"].endswith("."), figure
        assert figure["texts"] > 2, figure
    return {figure["id"] for figure in figures}


def test_every_figure_is_there_with_a_size_a_caption_and_a_label(open_page):
    found = check_figures(open_page())
    assert found >= FIGURES
    for prefix in FIGURES_OF_RUNS:
        assert any(name.startswith(prefix) for name in found), prefix


def test_temperatures_held_out_prompts_the_guard_and_dialogues_have_their_figures(open_page, report_of_more):
    page = open_page(path=report_of_more)
    found = check_figures(page)
    for prefix in FIGURES_OF_MORE:
        assert any(name.startswith(prefix) for name in found), prefix
    for name, series in (
        ("ppo-held-out", "guard"),
        ("policies-scores-eval", "guard"),
        ("policies-gains-eval", "guard"),
    ):
        assert series in page.locator(f"figure[id^={name}] svg").text_content(), name
    headings = page.locator("#answers details.answers > summary").all_inner_texts()
    assert any("Dialogues of memory" in heading for heading in headings)
    assert any("Held-out prompts along ppo" in heading for heading in headings)
    assert not page.locator(".warnings", has_text="Not shown").count()


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
    [place] = [place for place, name in enumerate(table.locator("th").all_inner_texts(), start=1) if "KL" in name]
    for _ in range(2):  # the first policy has no distance from itself: it stays last, both ways
        table.locator("th").nth(place - 1).locator("button").click()
        assert column(1)[-1] == "base" and column(place)[-1] == "–"


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


def test_a_search_looks_into_prompts_earlier_turns_and_answers_only(open_page, tmp_path):
    def rows(reward: float) -> list[dict]:
        earlier = [{"role": "user", "content": "Good morning"}, {"role": "assistant", "content": "Hello"}]
        return [
            {
                "prompt": [*earlier, {"role": "user", "content": question}],
                "response": [{"role": "assistant", "content": answer}],
                "is_safety": True,
                "source": "somebody",
                "reward": reward,
                "helpfulness": reward,
            }
            for question, answer in (("Why so", "Because"), ("How much", "A lot"))
        ]

    policies = {name: policy_figures() for name in ("base", "tuned")}
    answers = {"answers_base": rows(0.0), "answers_tuned": rows(1.0)}
    folder = write_run(tmp_path / "eval", "eval", {"prompts": 2, "policies": policies}, **answers)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["settings"] = {"policies": {name: {} for name in policies}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    part = open_page(path=write_report([folder])).locator("#answers details.answers").first
    found = {"why so": 1, "BECAUSE": 1, "good morning": 2, "hello": 2}
    nowhere = ("assistant", "earlier turn", "safety prompt", "somebody", "tuned", "highest", "reward", "helpfulness")
    for words, count in {**found, **dict.fromkeys(nowhere, 0)}.items():
        part.locator("input[type=search]").fill(words)
        assert part.locator("output").inner_text() == f"{count} of {count} shown", words


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


def test_on_paper_everything_is_open_and_afterwards_as_it_was(open_page):
    page = open_page()
    shown, closed = "article.asked:not([hidden])", "details:not([open])"
    few = page.locator(shown).count()
    folded = page.locator(closed).count()
    assert folded and few < page.locator("article.asked").count()
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")  # a second one forgets nothing
    assert page.locator(closed).count() == 0
    assert page.locator(shown).count() == page.locator("article.asked").count()
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert (page.locator(closed).count(), page.locator(shown).count()) == (folded, few)


def test_every_table_fits_a_sheet_of_paper(open_page, report_of_more, pipeline, tmp_path):
    """Letter is the narrower one: 940 pixels across between its margins."""
    for path in (report_of_more, write_report_of_two(pipeline, tmp_path / "a-pipeline-whose-name-has-forty-letters")):
        page = open_page(940, path=path)
        page.emulate_media(media="print")
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        widths = page.eval_on_selector_all(
            "table", "tables => tables.map(t => [t.scrollWidth, t.parentElement.clientWidth])"
        )
        assert widths and all(table <= room + 1 for table, room in widths), widths


def test_a_phone_needs_no_sideways_scrolling_and_its_text_is_large_enough(open_page):
    page = open_page(380)
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    for details in page.locator("details").all():
        details.evaluate("element => element.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    heights = page.eval_on_selector_all("figure svg text", "texts => texts.map(t => t.getBoundingClientRect().height)")
    assert min(heights) > 8


def write_report_of_two(pipeline: Path, other: Path) -> Path:
    """The report of a pipeline and its copy `other`, beside the copy."""
    shutil.copytree(pipeline, other, ignore=shutil.ignore_patterns("model", "report.html", "*.tmp"))
    out = other.parent / "both.html"
    done = align("report", pipeline, other, "--out", out)
    assert done.returncode == 0 and str(out) in done.stderr, done.stderr
    return out


def test_on_a_phone_a_long_name_leaves_room_for_what_stands_beside_it(open_page, pipeline, tmp_path):
    out = write_report_of_two(pipeline, tmp_path / "a-pipeline-whose-name-has-forty-letters")
    page = open_page(380, path=out)
    page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    sizes = page.eval_on_selector_all(
        ".scroll",
        """boxes => boxes.map(box => [box.clientWidth, Math.max(
            0, ...[...box.querySelectorAll("td.name")].map(cell => cell.getBoundingClientRect().width))])""",
    )
    assert any(widest for _, widest in sizes)
    assert all(widest < width / 2 for width, widest in sizes), sizes


def test_a_report_of_two_pipelines_tells_their_runs_apart(pipeline, tmp_path):
    page = write_report_of_two(pipeline, tmp_path / "other").read_text(encoding="utf-8")
    assert "runs/sft" in page and "other/sft" in page and "16 of 16" in page
    assert "Held-out prompts: runs/eval, other/eval" in page
