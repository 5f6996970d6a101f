"""Notebooks 01, 02 and 05 on battles with odd names, times, languages and several votes."""

import html
import os
import re
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbconvert import HTMLExporter

from src.utils.battles.time_split import PAST
from src.utils.paths import ROOT
from src.utils.runs import read_json
from tests.markup import IMAGE, NAMES, write_markup

pytestmark = pytest.mark.slow
LANGUAGES = ["English", "Polish", IMAGE, "x$_1$"]

# Figures as text, so that what they show can be read.
AS_TEXT = """%matplotlib inline
%config InlineBackend.figure_formats = ["svg"]
import matplotlib
matplotlib.rcParams["svg.fonttype"] = "none"
"""
EXTRAS = f"""
rng = np.random.default_rng(0)
days = rng.uniform(0, 90, len(pairs))
pairs["timestamp"] = pd.Timestamp("2025-04-01", tz="UTC") + pd.to_timedelta(days, unit="D")
pairs["language"] = rng.choice({LANGUAGES!r}, len(pairs))
is_bad = (pairs["label"] == 2) & (rng.random(len(pairs)) < days / 90)
pairs["vote_detail"] = np.where(is_bad, "both_bad", "")
votes = rng.multinomial(3, [0.4, 0.3, 0.3], len(pairs)) + np.eye(3, dtype=int)[pairs["label"]]
pairs[["votes_a", "votes_b", "votes_tie"]] = votes
"""


def run(folder, notebook, parameters, inserted=None):
    """Execute a copy of a notebook, with figures as text and, before a cell, more code."""
    book = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4)
    if inserted:
        before, code = inserted
        place = [cell.id for cell in book.cells].index(before)
        book.cells.insert(place, nbformat.v4.new_code_cell(code))
    book.cells.insert(1, nbformat.v4.new_code_cell(AS_TEXT))
    nbformat.write(book, folder / f"{notebook}.ipynb")
    paths = folder / f"{notebook}.ipynb", folder / f"{notebook}.out.ipynb"
    command = [sys.executable, "-m", "papermill", *paths, "--cwd", ROOT, "--no-progress-bar"]
    for name, value in parameters.items():
        command += ["-p", name, value]
    # As where there is no package index, and never was one.
    alone = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "XDG_CACHE_HOME": str(folder / "cache")}
    environment = os.environ | alone | {"ARENA_ARTIFACTS": str(folder / "artifacts")}
    ran = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return nbformat.read(paths[1], as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extras")
    write_markup(folder / "train.csv", n_rows=640)
    shared = {"PROFILE": "none", "N_BOOTSTRAP": 50}
    first = shared | {"DATA": folder / "train.csv", "SPLIT": "time"}
    return folder / "artifacts", {
        "01": run(folder, "01_eda", first, ("01-eda-06", EXTRAS)),
        "02": run(folder, "02_baseline", shared | {"N_TREES": 20, "WORD_VECTORS": "none"}),
        "05": run(folder, "05_ensemble", shared),
    }


def outputs(book, kind):
    """All outputs of a kind, e.g. text/html."""
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    data = [output.get("data", {}) for cell in cells for output in cell.outputs]
    return [part[kind] for part in data if kind in part]


def test_every_figure_shows_names_literally(executed):
    _, books = executed
    figures = [figure for book in books.values() for figure in outputs(book, "image/svg+xml")]
    assert len(figures) >= 18
    for name in NAMES:
        shown = html.escape(name, quote=False)
        assert sum(shown in figure for figure in figures) >= 3, name
    assert not [figure for figure in figures if "<img" in figure]


def test_every_table_is_escaped_and_kept_from_formulas(executed):
    _, books = executed
    tables = [table for book in books.values() for table in outputs(book, "text/html")]
    assert len(tables) > 10
    assert not [table for table in tables if "<img" in table or "tex2jax_ignore" not in table]
    for language in LANGUAGES:
        shown = html.escape(language, quote=False)
        assert sum(shown in table for table in tables) >= 2, language  # in 01, and sliced in 05
    assert any(html.escape(IMAGE, quote=False) + " costs $5_a$" in table for table in tables)


def test_a_page_has_no_names_as_markup(executed):
    _, books = executed
    for book in books.values():
        page, _ = HTMLExporter().from_notebook_node(book)
        # What a script of data holds is no markup.
        page = re.sub(r'<script type="application/[^"]*json">.*?</script>', "", page, flags=re.S)
        assert "<img src=x" not in page
        for text in outputs(book, "text/markdown"):
            assert not [name for name in (*NAMES, *LANGUAGES[2:]) if name in text]


def test_only_the_newest_battles_are_scored_and_none_trains_on_later_ones(executed):
    artifacts, _ = executed
    pairs = pd.read_parquet(artifacts / "01_eda" / "pairs.parquet")
    is_past = pairs["fold"] == PAST
    last = pairs.groupby("group")["timestamp"].transform("max")
    assert 100 < (~is_past).sum() < 200 and last[is_past].max() < last[~is_past].min()
    held_out = pd.read_parquet(artifacts / "02_baseline" / "oof.parquet")
    assert held_out["id"].tolist() == pairs["id"][~is_past].tolist()
    for name in ("02_baseline", "05_ensemble"):
        assert read_json(artifacts / name / "metrics.json")["n_pairs"] == (~is_past).sum()


def test_the_findings_have_drift_languages_both_bad_and_agreement(executed):
    artifacts, books = executed
    findings = read_json(artifacts / "01_eda" / "bias.json")
    assert {row["outcome"] for row in findings["drift"]} >= {"tie", "both bad"}
    assert {row["level"] for row in findings["languages"]} == set(LANGUAGES)
    assert findings["future"][0]["battles"] > 0
    assert {"longer answers", "a refusal"} & {row["effect"] for row in findings["both_bad"]}
    assert 0.3 < findings["agreement"][0]["agreement"] < 0.5
    assert (artifacts / "01_eda" / "figures" / "drift.png").exists()
    slices = pd.read_csv(artifacts / "05_ensemble" / "slices.csv")["slice"]
    assert slices.str.startswith("time: ").sum() == 4
    assert slices.str.startswith("language in the file: ").sum() >= 4
    (ladder,) = [table for table in outputs(books["05"], "text/html") if "people" in table]
    assert re.search(r"people.*same battle\*", ladder)
    assert np.isfinite(read_json(artifacts / "05_ensemble" / "metrics.json")["log_loss"])
