"""Notebook 01 on a handful of rows without names, and its benchmark's two ways of counting."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.eda import SAME, make_battles, measure_row
from src.utils.battles.demo import make_battles as make_demo_battles
from src.utils.battles.style import PAIR_FEATURES, STYLE_FEATURES, measure_style
from src.utils.paths import ROOT
from src.utils.schema import LABELS, TEXTS


@pytest.mark.slow
@pytest.mark.parametrize("n_rows", [1, 40])
def test_01_runs_on_few_rows_without_names_and_estimates_nothing_wild(tmp_path, n_rows):
    battles, _ = make_demo_battles(n_rows, seed=3)
    rows = battles[["id"]].assign(**{name: battles[name].map(json.dumps) for name in TEXTS})
    rows = rows.assign(
        **{name: (battles["label"] == place).astype(int) for place, name in enumerate(LABELS)}
    )
    rows.to_csv(tmp_path / "rows.csv", index=False)
    command = [sys.executable, "-m", "src.utils.suite.run", "--only", "01", "--profile", "full"]
    command += ["--data", tmp_path / "rows.csv", "--artifacts", tmp_path]
    ran = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    findings = json.loads((tmp_path / "01_eda" / "bias.json").read_text())
    assert findings["n_pairs"] == n_rows and findings["strengths"] == []
    assert all(row["size"] is None or abs(row["size"]) < 20 for row in findings["verdict"])
    assert len(list((tmp_path / "01_eda" / "figures").glob("*.png"))) == 11
    executed = (tmp_path / "notebooks" / "01_eda.ipynb").read_text()
    assert "In short" in executed and "No chatbot is ranked" in executed


def test_the_row_wise_way_counts_the_same(demo_pairs):
    fast, slow = measure_style(demo_pairs.head(40)), demo_pairs.head(40).apply(measure_row, axis=1)
    for name in SAME:
        for side in "ab":
            np.testing.assert_allclose(
                slow[f"{name}_{side}"].astype(float), fast[f"{name}_{side}"], rtol=1e-5
            )
    assert {f"{name}_a" for name in STYLE_FEATURES} | set(PAIR_FEATURES) <= set(slow.columns)


def test_the_benchmark_makes_battles_as_long_as_the_competitions(monkeypatch):
    for path in ([], ["nowhere"]):
        if path:
            monkeypatch.setattr("benchmarks.eda.REAL", [ROOT / path[0]])
        battles, _ = make_battles(400, np.random.default_rng(0))
        lengths = [
            sum(len(turn or "") for name in TEXTS for turn in row[name])
            for _, row in battles.iterrows()
        ]
        assert 2200 < np.mean(lengths) < 4200  # 180 MB over 57,477 battles
