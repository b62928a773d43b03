"""The documentation: it builds without a warning, and what it says of the code is so."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.cli.pipeline import load_pipeline
from alignment.converters import STRENGTHS, convert_file
from alignment.data import load_pairs, write_rows
from alignment.data_report import KINDS, parse_row, row_kind
from alignment.dialogue import Message
from alignment.layouts import CONVERTERS, Options
from sft.context_distillation import summarize as summarize_distillation
from sft.gatt_evaluation import adherence_table
from sft.instructions import PoolRow

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def build(docs: Path, site: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(docs), str(site)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.e2e
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    built = build(DOCS, tmp_path / "site")
    assert (built.returncode, built.stderr) == (0, "")
    for page in DOCS.glob("*.md"):
        html = (tmp_path / "site" / f"{page.stem}.html").read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img)[^>]* (?:src|href)=\"([^\"]*)\"", html)
        assert loaded and not [place for place in loaded if "//" in place], page.name


@pytest.mark.e2e
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("conf.py", "ppo.md"):
        shutil.copy(DOCS / name, tmp_path / "docs")
    links = "[nowhere](nowhere.md) and [no such heading](ppo.md#no-such-heading)"
    (tmp_path / "docs" / "index.md").write_text(f"# Links\n\n{links}\n", encoding="utf-8")
    built = build(tmp_path / "docs", tmp_path / "site")
    assert built.returncode == 1
    assert re.search(r"index.md:3: WARNING.*nowhere\.md", built.stderr)
    assert re.search(r"index.md:3: WARNING.*no-such-heading", built.stderr)


def test_the_configuration_page_is_what_the_settings_say():
    page = runpy.run_path(str(DOCS / "write_configuration.py"))["page"]()
    assert text_of("configuration.md") == page, "run: python docs/write_configuration.py"


def test_the_ratio_to_vllm_says_how_vllm_was_run():
    assert "enforce_eager=True" in (ROOT / "benchmarks" / "sampling.py").read_text(encoding="utf-8")
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert re.search(r"\| vLLM \(eager, not compiled\)[^|]*\| \d\.\d\dx", readme), "beside the ratio itself"


def defined_in(path: Path) -> set[str]:
    """Names of a module, and of its classes as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_every_row_of_the_paper_map_names_a_function_and_a_test_that_exist():
    rows = [line.split("|")[1:-1] for line in text_of("paper-map.md").splitlines() if re.match(r"\| [^-]", line)]
    rows = [row for row in rows if row[1].strip() != "function"]
    assert len(rows) > 40
    for paper, functions, tests in rows:
        for cell, pattern in ((functions, r"`(\S+\.py):([\w.]+)`"), (tests, r"`(tests/\S+\.py)::(\w+)`")):
            found = re.findall(pattern, cell)
            assert found, f"{paper.strip()}: {cell.strip()}"
            for path, name in found:
                assert name in defined_in(ROOT / path), f"{path}: {name}"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_files_of_the_repository_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:alignment|sft|reward_models|rlhf|recipes|tests|benchmarks|docs)/[\w./-]+\.\w+)", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


def anchors(page: Path) -> set[str]:
    """Anchors of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_from_outside_the_site_lead_somewhere(name):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", (ROOT / name).read_text(encoding="utf-8"))
    assert links or name != "README.md"
    for path, anchor in links:
        assert (ROOT / path).is_file(), path
        assert not anchor or anchor in anchors(ROOT / path), f"{path}#{anchor}"


def section_of_formats(heading: str) -> str:
    """A section of data-formats.md."""
    return re.search(rf"^## {heading}$(.*?)(?=^## )", text_of("data-formats.md"), re.M | re.S).group(1)


def examples_below(heading: str) -> list[dict]:
    """The JSON examples of a section of data-formats.md."""
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", section_of_formats(heading), re.S)]


@pytest.mark.parametrize(
    ("heading", "kind"),
    [("Demonstrations", "demonstrations"), ("Pairs", "pairs"), ("Prompts", "prompts"), ("Candidates", "candidates")],
)
def test_the_example_rows_load_and_show_known_fields(heading, kind):
    examples = examples_below(heading)
    assert examples
    for row in examples:
        assert type(parse_row(row)) is KINDS[kind] and set(row) <= KINDS[kind].FIELDS
    section = section_of_formats(heading)
    assert all(f"`{name}`" in section for name in KINDS[kind].FIELDS), "every field is explained"


def test_a_table_becomes_pairs_by_the_code_of_its_section(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = '"Why, ""oh why""?\nNow.",Because.,No.,better\nHow?,So.,Hm.,\n'  # as a spreadsheet writes it
    (tmp_path / "mine.csv").write_text("\ufeffquestion,better,worse,rating\n" + rows, encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", section_of_formats("Your own layout"), re.S)
    exec(compile(code, "page", "exec"), {})
    first, second = load_pairs(["pairs.jsonl"]).rows
    assert first.prompt == (Message("user", 'Why, "oh why"?\nNow.'),)
    assert (first.chosen, first.rejected, first.rating) == ("Because.", "No.", "better")
    assert (second.chosen, second.rating) == ("So.", None)


def test_the_fields_that_are_said_to_be_kept_of_plain_texts_are_kept(tmp_path):
    section = " ".join(section_of_formats("Your own layout").split())
    kept = re.search(r"(`rating`.*?) are kept", section).group(1)
    values = {"rating": "better", "margin": 0.5, "chosen_safe": True, "rejected_safe": False, "is_safety": True}
    values["source"] = "mine"
    assert re.findall(r"`(\w+)`", kept) == list(values)
    plain = {
        "pairs": ({"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}, values),
        "demonstrations": ({"prompt": "Hi", "completion": "Hello."}, {"source": "mine"}),
        "prompts": ({"prompt": "Hi"}, {"is_safety": True, "category": "crime", "source": "mine"}),
    }
    for kind, (row, more) in plain.items():
        mine, out = tmp_path / f"{kind}.jsonl", tmp_path / f"{kind}-made.jsonl"
        write_rows(mine, [{**row, **more, "annotator": 3}])
        convert_file(str(mine), "trl", out)
        made = json.loads(out.read_text(encoding="utf-8"))
        assert row_kind(made) == kind and more.items() <= made.items() and "annotator" not in made


def test_the_example_instructions_load():
    assert len([PoolRow.from_json(row) for row in examples_below("Instructions")]) == 2


def test_every_layout_has_an_example_that_converts():
    rows = re.findall(r"^\| `([\w-]+)` \| `(\{.*\})`", text_of("data-formats.md"), re.M)
    assert {layout for layout, _ in rows} == set(CONVERTERS)
    for layout, example in rows:
        bins = dict.fromkeys(STRENGTHS.get(layout, ()), (1.0, 2.0, 3.0))
        converted = list(CONVERTERS[layout](json.loads(example), Options(rating_bins=bins)))
        assert [parse_row(row) for row in converted], layout


def test_the_example_pipeline_with_its_rounds_is_in_order(tmp_path, monkeypatch):
    text = "".join(re.findall(r"```yaml\n(.*?)```", text_of("pipelines.md"), re.S))
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"[\w-]+\.jsonl", text):
        (tmp_path / name).touch()
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    plan = load_pipeline(tmp_path / "mine.yaml", [])
    names = [stage.name for stage in plan.stages]
    assert names[:5] == ["sft", "rm-helpfulness", "rm-safety", "distil", "sft-safe"] and names[-2:] == ["rs-4", "eval"]
    assert list(plan.stages[-1].config.policies) == ["sft", "rs-1", "rs-2", "rs-3", "rs-4"]


def test_the_figures_of_stages_without_steps_are_explained():
    row = {"category": "crime", "distilled": "no", "is_finished": True, "score_plain": 0.0, "score_distilled": 1.0}
    row |= {"is_history_cut": False, "has_template": True}
    assert all(f"`{name}`" in text_of("distillation.md") for name in summarize_distillation([row]))
    dialogue = {"kept": [True], "finished": [True], "kinds": ["ending"]}
    [figures] = adherence_table({"one": [dialogue]}, [1]).values()
    assert all(f"`{name}`" in text_of("evaluation.md") for name in figures)
