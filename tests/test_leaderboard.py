"""The leaderboard: runs are compared on the same battles, and the best of many is not flattered."""

import numpy as np
import pandas as pd
import pytest

from src.utils import runs
from src.utils.schema import probs_table
from src.utils.stats import leaderboard
from src.utils.stats.leaderboard import format_leaderboard, write_leaderboard
from src.utils.stats.scores import log_loss, paired_difference, row_losses
from tests.votes import blur, make_votes

N = 1500
IDS, GROUPS = np.arange(N) + 1000, np.arange(N) // 2
TRUTH, LABELS = make_votes(N)
BASE = blur(TRUTH, 0.3)


@pytest.fixture
def folder(tmp_path):
    """Battles of 01, in another order than that of the runs, and the CPU baseline."""
    battles = pd.DataFrame({"id": IDS, "label": LABELS, "group": GROUPS, "prompt": "x"})
    runs.write_table(tmp_path / "01_eda/pairs.parquet", battles[::-1])
    make_run(tmp_path / "02_baseline", BASE)
    return tmp_path


def make_run(folder, probs, rows=slice(None), config=None, **changed):
    loss = log_loss(probs[rows], LABELS[rows])
    metrics = {"log_loss": loss, "accuracy": 0.5, "n_pairs": len(IDS[rows]), "data_hash": "d"}
    oof = probs_table(IDS[rows], probs[rows], fold=0)
    runs.write_run(folder, config=config or {"seed": 7}, oof=oof, metrics=metrics | changed)


def read_board(folder):
    return write_leaderboard(folder, n_boot=200).set_index("run")


def test_it_has_every_completed_run_the_best_of_its_data_first(folder):
    make_run(folder / "search/ridge/0/02_baseline", TRUTH, peak_mib=100.0)
    make_run(folder / "03_modernbert", TRUTH, data_hash="e")
    make_run(folder / "03_modernbert/model/fold_0", TRUTH)  # part of a run
    make_run(folder / "03_modernbert/earlier/0123/fold_0", TRUTH)  # set aside
    runs.write_json(folder / "01_eda/metrics.json", {"n_pairs": 10})  # not a model
    (folder / "04_qwen").mkdir()
    table = read_board(folder)
    assert table.index.tolist() == ["search/ridge/0/02_baseline", "02_baseline", "03_modernbert"]
    assert table["rank"].tolist() == [1, 2, 1] and table["seed"].tolist() == [7] * 3
    written = pd.read_csv(folder / "leaderboard.csv")
    assert written["run"].tolist() == table.index.tolist()
    assert written["n_tried"].tolist() == [2, 2, 1]


def test_a_difference_is_paired_on_the_rows_of_the_run_alone(folder):
    half, probs = slice(0, N, 2), blur(TRUTH, 0.6, seed=2)
    make_run(folder / "03_modernbert", probs, half)
    table = read_board(folder)
    found = table.loc["03_modernbert"]
    losses = [row_losses(each, LABELS)[half] for each in (probs, BASE)]
    expected = paired_difference(*losses, GROUPS[half], n_boot=200)
    columns = ["difference", "difference_low", "difference_high"]
    np.testing.assert_allclose(
        found[columns].astype(float), [expected[key] for key in ("mean", "low", "high")], atol=0.01
    )
    assert found["difference"] == pytest.approx(expected["mean"], abs=1e-6)
    assert found["versus"] == "02_baseline" and found["p_holm"] < 0.001
    assert table["rank"].tolist() == [1, 1] and table["difference"].isna()["02_baseline"]


def test_p_values_are_corrected_for_the_runs_on_the_same_rows(folder):
    slightly = blur(TRUTH, 0.45, seed=3)
    make_run(folder / "03_modernbert", slightly)
    alone = read_board(folder).loc["03_modernbert", "p_holm"]
    for number in range(3):
        make_run(folder / f"try{number}/04_qwen", BASE)
    assert 0 < alone < 0.25
    assert read_board(folder).loc["03_modernbert", "p_holm"] == pytest.approx(4 * alone)


def test_the_best_of_equals_owes_its_lead_to_chance_and_a_clear_winner_does_not(folder):
    for number in range(6):
        make_run(folder / f"try{number}/03_modernbert", blur(TRUTH, 0.8, seed=number + 10))
    table = read_board(folder)
    assert table["optimism"].iloc[0] < 0.001 and table["optimism"].iloc[1:].isna().all()
    runs.shutil.rmtree(folder / "02_baseline")
    table = read_board(folder)
    assert table["optimism"].iloc[0] > 0.005
    printed = format_leaderboard(table.reset_index())
    assert "Best of 6" in printed and f"{table['optimism'].iloc[0]:.4f}" in printed


def test_what_a_search_or_05_chose_is_not_nested(folder):
    for number, config in enumerate([{"a": 1}, {"a": 2}, {"a": 3}]):
        trial = folder / f"searches/toy-0/{number}/03_modernbert"
        make_run(trial, blur(TRUTH, 0.2 + 0.2 * number), config=config)
        (trial.parent / "01_eda").symlink_to(folder / "01_eda")
    make_run(folder / "03_modernbert", TRUTH, config={"a": 1, "refit": True})
    make_run(folder / "other/03_modernbert", TRUTH, config={"a": 2})
    make_run(folder / "05_ensemble", TRUTH)
    blend = {"members": ["02_baseline", "03_modernbert"], "weights": [0.5, 0.5]}
    runs.write_json(folder / "05_ensemble/blend.json", blend)
    nested = read_board(folder)["nested"]
    assert "best of 3 trials" in nested["searches/toy-0/0/03_modernbert"]
    assert "one of 3 trials" in nested["searches/toy-0/2/03_modernbert"]
    assert "settings of the best of 3 trials" in nested["03_modernbert"]
    assert nested["05_ensemble"].startswith("no: best of 2 members")
    assert nested[["02_baseline", "other/03_modernbert"]].str.startswith("yes").all()


def test_trials_of_the_baseline_are_compared_with_the_baseline_itself(folder):
    trial = folder / "searches/toy-0/0/02_baseline"
    make_run(trial, TRUTH)
    (trial.parent / "01_eda").symlink_to(folder / "01_eda")
    found = read_board(folder).loc["searches/toy-0/0/02_baseline"]
    assert found["versus"] == "02_baseline" and found["difference"] < 0
    runs.shutil.rmtree(folder / "02_baseline")
    found = read_board(folder).loc["searches/toy-0/0/02_baseline"]
    assert "no 02_baseline" in found["note"], "a trial is no baseline of its own"


def forget_battles(path):
    runs.write_table(path, pd.read_parquet(path).iloc[900:])


@pytest.mark.parametrize(
    ("break_run", "note"),
    [
        (lambda run: (run / "oof.parquet").unlink(), "no oof.parquet"),
        (lambda run: make_run(run, TRUTH, log_loss=0.5), "metrics.json states 0.5"),
        (lambda run: runs.write_json(run / "metrics.json", {"log_loss": 0.5}), "other battles"),
        (lambda run: forget_battles(run.parent / "01_eda/pairs.parquet"), "not in index"),
        (lambda run: (run / "oof.parquet").write_text("no parquet"), "oof.parquet"),
    ],
)
def test_a_run_that_cannot_be_read_again_is_ranked_but_not_compared(folder, break_run, note):
    run = folder / "sub/03_modernbert"
    runs.shutil.copytree(folder / "01_eda", folder / "sub/01_eda")
    make_run(run, TRUTH)
    make_run(folder / "04_qwen", blur(TRUTH, 0.2))
    break_run(run)
    table = read_board(folder)
    found = table.loc["sub/03_modernbert"]
    assert note in found["note"] and np.isnan(found["difference"])
    assert found["rank"] == 1
    assert table.loc["04_qwen", "difference"] < 0


def test_without_a_baseline_of_these_rows_it_says_so(folder):
    make_run(folder / "02_baseline", BASE, slice(0, N, 2))
    make_run(folder / "03_modernbert", TRUTH)
    found = read_board(folder).loc["03_modernbert"]
    assert "02_baseline" in found["note"] and np.isnan(found["difference"])


def test_every_vote_on_a_battle_counts_once(folder):
    votes = np.random.default_rng(0).multinomial(3, [1 / 3] * 3, N)
    battles = pd.read_parquet(folder / "01_eda/pairs.parquet")[::-1]
    battles[["votes_a", "votes_b", "votes_tie"]] = votes
    runs.write_table(folder / "01_eda/pairs.parquet", battles)
    for name, probs in (("02_baseline", BASE), ("03_modernbert", TRUTH)):
        loss = -(votes * np.log(probs)).sum() / votes.sum()
        make_run(folder / name, probs, log_loss=float(loss))
    table = read_board(folder)
    gap = table.loc["03_modernbert", "log_loss"] - table.loc["02_baseline", "log_loss"]
    assert table.loc["03_modernbert", "difference"] == pytest.approx(gap, abs=1e-5)


def test_runs_on_other_rows_of_the_same_data_are_ranked_apart(folder):
    few = slice(0, 100)
    make_run(folder / "03_modernbert", blur(TRUTH, 0.8), few)
    make_run(folder / "05_ensemble", TRUTH, few)
    ranks = read_board(folder)["rank"]
    assert ranks.to_dict() == {"02_baseline": 1, "05_ensemble": 1, "03_modernbert": 2}


def test_a_removed_run_disappears(folder):
    assert len(read_board(folder)) == 1
    (folder / "02_baseline/metrics.json").unlink()
    assert read_board(folder).empty


def test_the_command_prints_a_table_per_set_of_battles(folder, capsys):
    make_run(folder / "03_modernbert", blur(TRUTH, 0.8))
    make_run(folder / "04_qwen", TRUTH, slice(0, 100))
    assert leaderboard.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "1,500 battles, 2 runs" in printed and "100 battles, 1 run;" in printed
    assert "< 0.001" in printed and "nested" in printed
    assert leaderboard.main([str(folder / "01_eda")]) == 1
    assert "01_eda" in capsys.readouterr().err
