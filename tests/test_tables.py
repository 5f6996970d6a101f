"""Tables in notebooks: names are shown literally, numbers as people write them."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from src.utils.stats import tables
from src.utils.stats.tables import show, to_text
from tests.markup import IMAGE, NAMES

ESCAPED = IMAGE.replace("<", "&lt;").replace(">", "&gt;")


@pytest.mark.parametrize("name", NAMES)
def test_markup_in_cells_and_headers_is_shown_literally(name):
    page = show(pd.DataFrame({name: [name]})).to_html()
    shown = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert page.count(shown) == 2
    assert "<img" not in page
    assert "tex2jax_ignore" in page and "mathjax_ignore" in page


def test_a_format_of_ones_own_keeps_the_escaping():
    table = pd.DataFrame({"share": [0.5, np.nan], "name": IMAGE})
    page = show(table, {"share": "{:.1%}", "name": "{}"}).to_html()
    assert "50.0\u00a0%" in page and "–" in page
    assert page.count(ESCAPED) == 2 and "<img" not in page


def test_counts_get_separators_and_ids_do_not():
    page = show(pd.DataFrame({"id": [20240501], "n": [12000], "loss": [1.23456]})).to_html()
    assert ">20240501<" in page and ">12,000<" in page and ">1.2346<" in page


def test_whole_numbers_have_no_decimals_though_a_missing_value_made_them_floats():
    page = show(pd.DataFrame({"n": [12000.0, np.nan]})).to_html()
    assert ">12,000<" in page and ">battles<" in page


def test_an_estimate_and_its_bounds_share_a_cell_and_the_best_row_is_bold():
    table = pd.DataFrame({"model": ["a", "b"], "log_loss": [0.92, 0.91], "low": [0.9, 0.89]})
    table = table.assign(high=[0.94, 0.93], gap=[0.0, -0.01], gap_low=[0.0, -0.02], gap_high=0.0)
    intervals = {"log_loss": ("low", "high"), "gap": ("gap_low", "gap_high")}
    page = show(table, digits=2, intervals=intervals, best="log_loss").to_html()
    assert ">0.92 (0.90–0.94)<" in page and ">−0.01 (−0.02 to 0.00)<" in page
    assert ">low<" not in page and ">log loss<" in page
    style = page.partition("<table")[0]
    assert "bold" in style and "row1_col0" in style and "row0_col0 {\n  font" not in style


def test_a_column_without_any_value_is_not_shown():
    page = show(pd.DataFrame({"n": [1], "reason": [None], "note": [""]})).to_html()
    assert "reason" not in page and "note" not in page


def test_an_empty_table_and_rows_that_share_an_index_are_shown():
    assert "name" in show(pd.DataFrame(columns=["name", "n"])).to_html()
    assert show(pd.DataFrame({"n": [7, 8]}, index=[0, 0])).to_html().count("<td") == 2


def test_findings_fill_the_box_that_was_shown_first(monkeypatch):
    shown = []
    box = SimpleNamespace(update=lambda content: shown.append(content.data))
    monkeypatch.setattr(tables, "display", lambda content, display_id: box)
    tables.Findings().fill(["one 50 %", "two"])
    assert shown == ["**In short**\n\n- one 50 %\n- two"]


def test_a_table_for_a_terminal_has_the_cells_of_the_page_in_columns():
    table = pd.DataFrame({"model": ["a", "longer"], "log_loss": [0.5, 12.25], "low": [0.4, 12.0]})
    table = table.assign(high=[0.6, np.nan], empty=np.nan, n=[12000, 7])
    lines = to_text(table, {"log_loss": "{:.2f}"}, intervals={"log_loss": ("low", "high")})
    lines = lines.split("\n")
    assert lines[0].split() == ["model", "log", "loss", "battles"]
    assert lines[1].startswith("a       ") and "0.50 (0.40–0.60)" in lines[1]
    assert lines[1].endswith("12,000") and len({len(line) for line in lines}) == 1
    assert to_text(table[:0]).split("\n")[0].startswith("model")
