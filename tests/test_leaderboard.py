import pandas as pd

from src.utils.runs import LEADERBOARD_COLUMNS, read_leaderboard, write_json, write_leaderboard


def make_run(folder, loss, data="d", **more):
    write_json(folder / "config.json", {"seed": 7})
    scores = {
        "log_loss": loss,
        "accuracy": 0.5,
        "n_pairs": 10,
        "data_hash": data,
        "config_hash": "c",
        "seconds": 1.0,
    }
    write_json(folder / "metrics.json", scores | more)


def test_every_finished_run_is_a_row_the_best_of_its_data_first(tmp_path):
    make_run(tmp_path / "02_baseline", 1.05, log_loss_low=1.0, log_loss_high=1.1)
    make_run(tmp_path / "searches" / "ridge" / "0" / "02_baseline", 1.02, peak_mib=100.0)
    make_run(tmp_path / "03_modernbert", 0.9, data="e")
    (tmp_path / "04_qwen").mkdir()
    table = write_leaderboard(tmp_path)
    assert table["run"].tolist() == ["searches/ridge/0/02_baseline", "02_baseline", "03_modernbert"]
    assert tuple(table.columns) == LEADERBOARD_COLUMNS and table["seed"].tolist() == [7] * 3
    written = pd.read_csv(tmp_path / "leaderboard.csv")
    assert written["log_loss"].tolist() == [1.02, 1.05, 0.9]
    assert written["log_loss_low"].isna().tolist() == [True, False, True]


def test_what_is_no_run_of_a_model_is_left_out(tmp_path):
    make_run(tmp_path / "03_modernbert" / "model" / "fold_0", 1.0)
    write_json(tmp_path / "01_eda" / "metrics.json", {"n_pairs": 10})
    assert read_leaderboard(tmp_path).empty
    make_run(tmp_path / "02_baseline", 1.0)
    assert len(read_leaderboard(tmp_path)) == 1


def test_a_run_that_was_removed_leaves_the_table(tmp_path):
    make_run(tmp_path / "02_baseline", 1.0)
    write_leaderboard(tmp_path)
    (tmp_path / "02_baseline" / "metrics.json").unlink()
    assert write_leaderboard(tmp_path).empty
