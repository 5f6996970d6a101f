"""One table of every finished run, rebuilt from what the run folders hold.

Nothing is appended: the table is made anew each time, so it cannot disagree with the
runs, and a run that was removed leaves it.
"""

from pathlib import Path

import pandas as pd

from src.utils.runs import read_json, write_table

COLUMNS = (
    *("run", "data_hash", "config_hash", "n_pairs", "seed", "log_loss", "log_loss_low", "log_loss_high"),
    *("accuracy", "seconds", "peak_mib"),
)
_SKIPPED = ("checkpoints", "model")  # folders inside a run


def read_leaderboard(artifacts: Path) -> pd.DataFrame:
    """Collect the scores of all finished runs, the best of each data set first.

    Args:
        artifacts: the folder of all run folders; sweeps lie in it too.

    Returns:
        One row a run, `COLUMNS`: `run` is its folder from `artifacts`, `n_pairs` the
        held-out battles, losses in nats per battle with a 95 % interval, memory in MiB.
        What a run did not record is missing. Sorted by data, then by loss: losses on
        different battles cannot be compared.
    """
    artifacts = Path(artifacts)
    rows = [_read_run(path, artifacts) for path in sorted(artifacts.rglob("metrics.json")) if _is_run(path, artifacts)]
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"seed": "Int64", "n_pairs": "Int64"})
    return table.sort_values(["data_hash", "log_loss", "run"], ignore_index=True)


def write_leaderboard(artifacts: Path) -> pd.DataFrame:
    """Write `leaderboard.csv` into `artifacts`, whole or not at all; returns the table."""
    table = read_leaderboard(artifacts)
    write_table(Path(artifacts) / "leaderboard.csv", table)
    return table


def _is_run(path: Path, artifacts: Path) -> bool:
    return not set(path.relative_to(artifacts).parts) & set(_SKIPPED) and "log_loss" in read_json(path)


def _read_run(path: Path, artifacts: Path) -> dict[str, object]:
    metrics, config = read_json(path), path.with_name("config.json")
    settings = read_json(config) if config.exists() else {}
    known = metrics | {"run": path.parent.relative_to(artifacts).as_posix(), "seed": settings.get("seed")}
    return {name: known.get(name) for name in COLUMNS}
