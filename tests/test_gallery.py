"""The pages that people read without running anything: true, small, linked, and not stale."""

import base64
import io
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from docs import card, gallery, pages, site
from docs.quotes import Quotes
from src.utils.paths import REAL_DATA, ROOT
from src.utils.runs import read_json, write_json
from tests.conftest import NO_REAL_DATA, REAL_TRAIN

MANIFEST = read_json(gallery.MANIFEST)
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kaggle_kernel/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SECRET = "My grandmother keeps seven goats behind the old windmill and nobody knows why."


# ── one page ──────────────────────────────────────────────────────────────────────────


def make_png():
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(noise).save(written, format="PNG")
    return written.getvalue()


def shown(**data):
    return new_output("display_data", data={name.replace("_", "/"): x for name, x in data.items()})


@pytest.fixture
def page(tmp_path):
    return pages.Page(tmp_path / "01_eda.md", "01 · Votes", "9 real battles", ["above"])


def write(page, *cells):
    """Write a page of cells and their outputs, as of a run; return its text and findings."""
    first = new_markdown_cell("# 01 · Votes\n\nWhy?\n\n| | |\n|---|---|\n| reads | all |")
    source, executed = new_notebook(cells=[first]), new_notebook(cells=[first])
    for cell, outputs in cells:
        source.cells.append(cell)
        ran = nbformat.from_dict(dict(cell))
        if cell.cell_type == "code":
            ran.outputs = outputs
        executed.cells.append(ran)
    findings = page.write(source, executed)
    return page.path.read_text(), findings


def test_findings_come_first_and_once(page):
    box = shown(text_markdown="**In short**\n\n- The longer wins.\n- Ties are\n  rare.")
    text, findings = write(
        page, (new_markdown_cell("## Who wins?"), []), (new_code_cell("fill()", id="a"), [box])
    )
    assert findings == ["The longer wins.", "Ties are rare."]
    assert text.startswith("# 01 · Votes: 9 real battles\n\nabove\n\n**In short**")
    assert text.count("The longer wins.") == 1 and "[Who wins?](#who-wins)" in text


def test_code_is_folded_and_printed_text_is_not(page):
    printed = new_output("stream", name="stdout", text="10%\r100%\nnine battles\n")
    cells = [(new_code_cell(f"x = {i}", id=f"c{i}"), [printed] if i else []) for i in range(2)]
    text, _ = write(page, *cells)
    folded = re.search(r"<details><summary>code.*?</details>", text, re.DOTALL)[0]
    assert "x = 0" in folded and "x = 1" in folded and "nine battles" not in folded
    assert "10%" not in text.replace("100%", "")


def test_a_figure_is_a_small_file_beside_the_page(page):
    picture = shown(image_png=base64.b64encode(make_png()).decode())
    text, _ = write(page, (new_code_cell("plot()", id="fig"), [picture]))
    assert "](01_eda/fig.png)" in text
    written = page.path.with_suffix("") / "fig.png"
    with Image.open(written) as picture:
        assert picture.mode == "P"
    assert written.stat().st_size < len(make_png())


def test_a_text_of_a_real_battle_is_left_out_and_places_are_hidden(page):
    page.is_quoted = lambda text: bool(Quotes([SECRET]).find(text))
    page.hide = {"/home/me/arena": "artifacts"}
    outputs = [
        shown(text_html=f"<p>{SECRET.replace('goats', '<b>goats</b>')}</p>"),
        shown(text_plain="kept in /home/me/arena/01_eda"),
    ]
    text, _ = write(page, (new_code_cell("show()", id="a"), outputs))
    assert "windmill" not in text and pages.LEFT_OUT in text
    assert "kept in artifacts/01_eda" in text


def test_a_cell_tagged_as_text_shows_nothing_of_real_battles(page):
    cell = new_code_cell("show()", id="a", metadata={"tags": [pages.TEXT_TAG]})
    outputs = [shown(text_html="<p>hello</p>"), shown(text_html="<p>bye</p>")]
    assert "hello" in write(page, (cell, outputs))[0]
    page.has_no_texts = True
    text, _ = write(page, (cell, outputs))
    assert "hello" not in text and text.count(pages.LEFT_OUT) == 1


def test_html_keeps_alignment_and_bold_without_style_sheets():
    html = """<style>#T_r0 { text-align: left; font-weight: bold }</style>
    <table id="T"><tr><th>name</th><th>n</th></tr>

    <tr><td id="T_r0">one</td><td id="T_r1">1,234</td></tr></table>
    <script>alert(1)</script><div style="white-space:pre-wrap">a
b</div>"""
    clean = pages.clean_html(html)
    assert '<td align="left"><b>one</b></td><td align="right">1,234</td>' in clean
    assert '<th align="left">name</th><th align="right">n</th>' in clean
    assert "\n" not in clean and "alert" not in clean and "a<br/>b" in clean


# ── texts of real battles ─────────────────────────────────────────────────────────────


def test_a_sentence_is_found_in_any_markup_and_a_short_prompt_whole():
    quotes = Quotes([SECRET, "How do magnets really work?"])
    assert quotes.find(f"Before. {SECRET[15:70]} After.")
    assert quotes.find("|My| grand|mother| keeps| seven| goats| be|hind| the| old| wind|mill|")
    assert quotes.find("&quot;how do MAGNETS really work&quot;")
    assert not quotes.find("Nobody knows how magnets work; the goats are behind the windmill.")
    assert not quotes.find(f"```python\n{SECRET}\n```\n")


def test_no_page_repeats_a_real_battle_and_all_are_small(capsys):
    if not REAL_DATA.is_dir():
        pytest.skip(NO_REAL_DATA)
    source = gallery.Source("real", ROOT, [], [], tuple(REAL_TRAIN))
    gallery.check_gallery(Quotes(gallery.read_texts([source])))
    assert "MiB" in capsys.readouterr().out


# ── what is committed ─────────────────────────────────────────────────────────────────


def test_every_page_shows_its_notebook_and_the_recorded_scores():
    entries = MANIFEST["pages"]
    if not REAL_DATA.is_dir():  # who has no real battles cannot make these pages again
        entries = {page: entry for page, entry in entries.items() if page.startswith("demo/")}
    assert {f"demo/{name}" for name in gallery.NAMES} <= entries.keys()
    assert gallery.find_stale(entries) == [], "make gallery"


def test_a_changed_notebook_or_score_makes_its_page_stale():
    recorded = read_json(ROOT / "benchmarks/results/demo.json")["runs"]["02_baseline"]
    now = {"notebook": gallery.hash_notebook("02_baseline"), "log_loss": recorded["log_loss"]}
    entry = MANIFEST["pages"]["demo/02_baseline"] | now
    assert gallery.find_stale({"demo/02_baseline": entry}) == []
    changes = [{"notebook": "other"}, {"log_loss": entry["log_loss"] + 0.01}]
    for change in changes:
        (line,) = gallery.find_stale({"demo/02_baseline": entry | change})
        assert line.startswith("demo/02_baseline")


@pytest.fixture
def at_hand(tmp_path, monkeypatch):
    """Three files of real battles at hand, and no finished run."""
    monkeypatch.setenv("ARENA_ARTIFACTS", str(tmp_path / "artifacts"))
    files = [tmp_path / f"arena_{number}.csv" for number in range(3)]
    for path in files:
        path.touch()
    monkeypatch.setattr(gallery, "REAL_FILES", files)
    return files


def test_real_pages_come_from_all_rows_at_hand_and_real_weights(at_hand):
    demo, real = gallery.find_sources("", "")
    assert demo.options == ["--data", "demo", "--profile", "demo"]
    assert list(real.train) == at_hand and real.artifacts.name == "real"
    assert real.options[-2:] == ["--profile", "pocket"]
    assert set(gallery.FEW_ROWS) < set(real.options)


def test_what_is_typed_comes_before_what_is_at_hand(at_hand):
    real = gallery.find_sources(str(at_hand[1]), "small")[1]
    assert list(real.train) == at_hand[1:2]
    assert real.options == ["--data", str(at_hand[1]), "--profile", "small"]
    assert gallery.find_sources("", "small")[1].options[-1] == "small"


def test_a_finished_run_of_real_battles_is_shown_where_none_are_at_hand(at_hand, monkeypatch):
    monkeypatch.setattr(gallery, "REAL_FILES", [])
    assert [source.kind for source in gallery.find_sources("", "")] == ["demo"]
    real = gallery.artifacts_dir() / "real"
    write_json(real / "settings.json", {"DATA": str(at_hand[0])})
    assert gallery.find_sources("", "")[1].options == ["--data", str(at_hand[0])]


def test_readme_and_the_first_page_show_what_the_pages_say():
    readme = (ROOT / "README.md").read_text()
    for name, part in gallery.make_parts(MANIFEST).items():
        assert f"<!-- {name}: made by make gallery -->\n{part}\n<!-- end of {name} -->" in readme
    first = (gallery.GALLERY / "README.md").read_text()
    assert gallery.format_notebooks(MANIFEST["pages"], "") in first


@pytest.mark.parametrize("name", gallery.NAMES)
def test_a_notebook_links_its_neighbours_and_its_results(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    assert gallery.make_links(name) in notebook.cells[0].source, "make gallery AS_IS=1"
    for address in re.findall(r"\]\(([^)]+)\)", gallery.make_links(name)):
        assert (ROOT / "notebooks" / address).exists(), address


def test_a_page_links_its_neighbours():
    for name in gallery.NAMES[1:-1]:
        text = (gallery.GALLERY / "demo" / f"{name}.md").read_text()
        place = gallery.NAMES.index(name)
        for other in (gallery.NAMES[place - 1], gallery.NAMES[place + 1]):
            assert f"({other}.md)" in text.split("\n## ")[0]


def visible_words(markdown):
    text = re.sub(r"<[^>]*>|\]\([^)]*\)", " ", markdown)
    return re.findall(r"[^\W\d_][\w'-]*", text)


def test_readme_is_read_in_some_minutes():
    assert len(visible_words((ROOT / "README.md").read_text())) <= 900


def find_links(text):
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose)
    return [one or other for one, other in links]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    for link in find_links(path.read_text(encoding="utf-8")):
        address, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", address) or address.startswith("../../actions/"):
            continue  # of the web
        target = (path.parent / address).resolve() if address else path
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [site.make_anchor(title) for title in titles], link


# ── the site, the picture ─────────────────────────────────────────────────────────────


def test_the_site_holds_every_page_and_its_links_lead_to_pages(tmp_path):
    written = site.make_site(tmp_path, "https://host/repository/blob/main")
    assert tmp_path / "index.html" in written
    assert len(written) == len(list((ROOT / "docs").rglob("*.md"))) + 1
    for path in written:
        for link in re.findall(r"(?:href|src)=\"([^\"]+)\"", path.read_text()):
            address = link.partition("#")[0]
            if address and not re.match(r"[a-z]+:", address) and "/actions/" not in address:
                assert (path.parent / address).exists(), f"{path}: {link}"
    assert "https://host/repository/blob/main/LICENSE" in (tmp_path / "index.html").read_text()


def test_the_workflow_makes_the_site_with_a_pinned_package():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "pages.yml").read_text())
    steps = workflow["jobs"]["publish"]["steps"]
    commands = "\n".join(step.get("run", "") for step in steps)
    assert re.search(r"^python -m docs\.site build/site", commands, re.MULTILINE)
    (wanted,) = re.findall(r"grep '\^([\w-]+)==' requirements.txt", commands)
    assert re.search(rf"^{wanted}==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    imported = re.findall(r"^(?:import|from) (\w+)", Path(site.__file__).read_text(), re.MULTILINE)
    assert set(imported) <= {*sys.stdlib_module_names, wanted.removesuffix("-py").replace("-", "_")}
    paths = [step["with"]["path"] for step in steps if "pages-artifact" in step.get("uses", "")]
    assert paths == ["build/site"]


def test_a_heading_has_the_anchor_of_a_code_host():
    assert '<h2 id="who-wins-a-or-b">' in site.make_page("# T\n\n## Who wins, `A` or B?\n")


def test_the_card_is_drawn_only_with_a_finished_run_and_a_browser(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ARENA_ARTIFACTS", str(tmp_path))
    assert not card.draw_card()
    assert "battle_card.png" in capsys.readouterr().out
    assert Path(card.PICTURE).stat().st_size < 200_000
