"""The leaderboard: every completed run, compared with others on the same battles alone.

    python -m src.utils.stats.leaderboard [artifacts]

Each run's held-out probabilities are read again: differences to the CPU baseline are paired, their
p-values are corrected for the number of runs, and the best of many is told how much of its lead it
owes to having been chosen. What cannot be known is said in the column `note`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from src.utils import paths
from src.utils.runs import hash_rows, label_member, read_json, write_table
from src.utils.schema import VOTES, list_votes, probs_of
from src.utils.stats.plots import number
from src.utils.stats.scores import bootstrap_means, correct, measure_optimism, p_of_mean, row_losses
from src.utils.stats.tables import to_text

COLUMNS = (
    "rank run model n_pairs seed log_loss log_loss_low log_loss_high versus difference "
    "difference_low difference_high p_holm n_tried optimism nested note accuracy seconds peak_mib "
    "data_hash rows_hash config_hash"
).split()
# Runs of an older version did not note their rows: as many are taken for the same.
SAME_BATTLES = ["data_hash", "rows_hash", "n_pairs"]
DIFFERENCE = ["difference", "difference_low", "difference_high"]
BASELINE, EDA, PAIRS = "02_baseline", "01_eda", "pairs.parquet"
SEARCHES = "searches"
_NOT_RUNS = {"checkpoints", "earlier", "model"}  # folders inside a run
_TOLERANCE = 1e-5  # nats; oof.parquet has float32
_LEAST_P = 0.001  # smaller ones are not told apart
_N_SHOWN = 20  # runs on the same battles that are printed


class _HeldOut(NamedTuple):
    """What a run predicted, and the votes."""

    probs: pd.DataFrame  # by id, one column per class
    battles: pd.DataFrame  # those of 01, by id: label, group, votes

    def losses_on(self, ids: pd.Index) -> np.ndarray:
        """Losses of every vote on the battles `ids`, all of which were held out: (V,) float64."""
        rows, labels = list_votes(self.battles.loc[ids])
        return row_losses(probs_of(self.probs.loc[ids])[rows], labels)


def write_leaderboard(artifacts: Path, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Collect the scores of all completed runs below `artifacts` in its `leaderboard.csv`.

    Returns:
        One row per run, `COLUMNS`: `run` is its folder relative to `artifacts`, `model` its
        `label_member`; `rank` and `n_tried` count the runs on the same held-out rows of the same
        data. `versus` is the CPU baseline trained on the same battles, and `difference` the log
        loss minus the baseline's on the run's own rows (paired, 95 %); `p_holm` is corrected for
        all runs on these rows. `optimism` of the best one: `measure_optimism` among them, in nats.
        `nested`: whether something was chosen by this very score, as far as the folders show.
    """
    artifacts = Path(artifacts)
    table = _collect(artifacts)
    for _, rows in table.groupby(SAME_BATTLES, dropna=False):
        found = _compare(artifacts, rows, n_boot, seed)
        table.loc[rows.index, list(found)] = found
    write_table(artifacts / "leaderboard.csv", table)
    return table


def _collect(artifacts: Path) -> pd.DataFrame:
    rows = []
    for path in sorted(artifacts.rglob("metrics.json")):
        run = path.parent.relative_to(artifacts)
        metrics = read_json(path)
        if "log_loss" in metrics and _NOT_RUNS.isdisjoint(run.parts):
            seed = _read_config(path.parent).get("seed")
            label = label_member(artifacts, run.as_posix())
            rows.append(metrics | {"run": run.as_posix(), "seed": seed, "model": label})
    table = pd.DataFrame(rows).reindex(columns=COLUMNS)
    board = table.groupby(SAME_BATTLES, dropna=False)["log_loss"]
    table["rank"], table["n_tried"] = board.rank(method="min"), board.transform("size")
    table = table.astype(dict.fromkeys(("seed", "n_pairs", "rank", "n_tried"), "Int64"))
    table = table.astype(dict.fromkeys(("versus", "nested", "note"), object))
    return table.sort_values([*SAME_BATTLES, "log_loss", "run"], ignore_index=True)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json(path) if path.exists() else {}


def _compare(artifacts: Path, rows: pd.DataFrame, n_boot: int, seed: int) -> pd.DataFrame:
    """Compare runs on the same battles, best first; the columns that this adds to `rows`."""
    found = pd.DataFrame(index=rows.index, columns=["versus", "note"], dtype=object)
    found[[*DIFFERENCE, "p_holm", "optimism"]] = np.nan
    found["nested"] = [_describe_choice(artifacts, run, rows["run"]) for run in rows["run"]]
    held = {}
    folders = {row: artifacts / run for row, run in rows["run"].items()}
    for row, folder in folders.items():
        try:
            held[row] = _read_held_out(folder)
        except (ValueError, KeyError, OSError) as error:
            found.loc[row, "note"] = f"not compared: {error}"
    if not held:
        return found
    probs, battles = next(iter(held.values()))
    ids = battles.index[battles.index.isin(probs.index)]
    groups = battles.loc[ids, "group"].to_numpy()[list_votes(battles.loc[ids])[0]]
    losses = {row: each.losses_on(ids) for row, each in held.items()}
    best = rows.index[0]
    if best in losses:
        stacked = np.stack(list(losses.values()), axis=1)
        found.loc[best, "optimism"] = measure_optimism(stacked, groups, n_boot, seed)
        if len(losses) < len(rows):
            found.loc[best, "note"] = f"optimism: among {len(losses)} of {len(rows)} runs"
    versus, base = _find_baseline([folders[row] for row in held], ids)
    if base is None:
        found.loc[list(held), "note"] = f"no {BASELINE} that held out all of these battles"
        return found
    found.loc[list(held), "versus"] = versus.relative_to(artifacts).as_posix()
    others = [row for row in held if folders[row] != versus]
    if others:
        gaps = np.stack([losses[row] - base for row in others], axis=1)
        low, high = np.quantile(bootstrap_means(gaps, groups, n_boot, seed), [0.025, 0.975], axis=0)
        found.loc[others, DIFFERENCE] = np.stack([gaps.mean(axis=0), low, high], axis=1)
        found.loc[others, "p_holm"] = [p_of_mean(gap, groups) for gap in gaps.T]
    found["p_holm"] = correct(found["p_holm"])
    return found


def _read_held_out(run: Path) -> _HeldOut:
    """Read a run again; ValueError where its files do not give the score that it states."""
    if not (run / "oof.parquet").exists():
        raise ValueError("no oof.parquet")
    metrics, probs = read_json(run / "metrics.json"), pd.read_parquet(run / "oof.parquet")
    if metrics.get("rows_hash") != hash_rows(probs["id"]):
        raise ValueError("oof.parquet holds other battles than metrics.json scored")
    homes = [folder for folder in run.parents if _is_home(folder)]
    if not homes:
        raise ValueError(f"no {EDA}/{PAIRS} beside it or above")
    held = _HeldOut(probs.set_index("id"), _read_battles(homes[0] / EDA / PAIRS))
    loss = held.losses_on(held.probs.index).mean()
    if abs(loss - metrics["log_loss"]) > _TOLERANCE:
        stated = f"metrics.json states {metrics['log_loss']:.4f}"
        raise ValueError(f"oof.parquet scores {loss:.4f} on the battles of {EDA}, {stated}")
    return held


def _is_home(folder: Path) -> bool:
    """Whether 01 wrote its battles here; a trial has only a link to them."""
    return (folder / EDA / PAIRS).exists() and not (folder / EDA).is_symlink()


def _read_battles(path: Path) -> pd.DataFrame:
    known = pq.read_schema(path).names
    columns = ["id", "label", "group", *(name for name in VOTES if name in known)]
    return pd.read_parquet(path, columns=columns).set_index("id")


def _find_baseline(runs: Sequence[Path], ids: pd.Index) -> tuple[Path, np.ndarray | None]:
    """Find the CPU baseline that held out all of `ids`, nearest to the top; None: there is none."""
    homes = {folder for run in runs for folder in run.parents if _is_home(folder)}
    for home in sorted(homes, key=lambda folder: (len(folder.parts), folder)):
        try:
            held = _read_held_out(home / BASELINE)
            return home / BASELINE, held.losses_on(ids)
        except (ValueError, KeyError, OSError):
            continue
    return Path(), None


def _describe_choice(artifacts: Path, run: str, same: pd.Series) -> str:
    """Say whether a run was chosen by the score that it shows; `same` are those on its battles."""
    folder = artifacts / run
    if (folder / "blend.json").exists():
        n_members = len(read_json(folder / "blend.json")["members"])
        return f"no: best of {n_members} members and their blend"
    searches: dict[str, list[str]] = {}  # name -> trials of this notebook, best first
    for other in same:
        if _name_search(other) and Path(other).name == folder.name:
            searches.setdefault(_name_search(other), []).append(other)
    config = _without_refit(_read_config(folder))
    for trials in searches.values():
        if run in trials:
            return f"no: {'best' if run == trials[0] else 'one'} of {len(trials)} trials"
        if config and config == _without_refit(_read_config(artifacts / trials[0])):
            return f"no: has the settings of the best of {len(trials)} trials"
    return "yes, unless tuned by hand"


def _name_search(run: str) -> str:
    """Name the search that a run is a trial of: "searches/heads-1af7ad", or ""."""
    parts = run.split("/")
    end = parts.index(SEARCHES) + 2 if SEARCHES in parts else 0
    return "/".join(parts[:end])


def _without_refit(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "refit"}


def format_leaderboard(table: pd.DataFrame) -> str:
    """Write the runs of `write_leaderboard` for a terminal, a table per set of battles."""
    texts = [
        "Log loss in nats per battle with 95 % intervals; runs on the same battles are compared."
    ]
    for _, rows in table.groupby(SAME_BATTLES, dropna=False, sort=False):
        texts.append(_format_set(rows))
    return "\n\n".join(texts)


def _format_set(rows: pd.DataFrame) -> str:
    best, versus = rows.iloc[0], rows["versus"].dropna()
    n_pairs = "an unknown number of" if pd.isna(best["n_pairs"]) else f"{best['n_pairs']:,}"
    title = f"{n_pairs} battles, {len(rows)} run" + "s" * (len(rows) > 1)
    if len(versus):
        known = rows[rows["difference"].notna()]
        title += f"; CPU baseline: {versus.iloc[0]}"
        if len(known):
            base = known["log_loss"].iloc[0] - known["difference"].iloc[0]
            title += f", {base:.4f} on these battles"
    columns = ["rank", "model", "log_loss", "log_loss_low", "log_loss_high", *DIFFERENCE, "p_holm"]
    shown = rows[[*columns, "accuracy", "nested", "run", "note"]].head(_N_SHOWN)
    shown = shown.assign(p_holm=shown["p_holm"].map(_write_p))
    formats = {"difference": "{:+.4f}", "accuracy": "{:.1%}"}
    bounds = {"log_loss": ("log_loss_low", "log_loss_high")}
    bounds["difference"] = ("difference_low", "difference_high")
    headers = {"difference": "minus the CPU baseline", "p_holm": "p (Holm)"}
    lines = [title, to_text(shown, formats, intervals=bounds, headers=headers)]
    if len(rows) > _N_SHOWN:
        lines.append(f"… and {len(rows) - _N_SHOWN:,} more in leaderboard.csv")
    return "\n".join([*lines, *describe_optimism(rows)])


def _write_p(p: float) -> str:
    return f"< {_LEAST_P}" if p < _LEAST_P else number(p)


def describe_optimism(table: pd.DataFrame) -> list[str]:
    """Say of each set of battles what being the best of its runs is worth by chance alone."""
    sentences = []
    for _, row in table[table["optimism"].notna() & (table["n_tried"] > 1)].iterrows():
        expected = row["log_loss"] + row["optimism"]
        sentences.append(
            f"Best of {row['n_tried']} on the same {row['n_pairs']:,} battles: chance makes "
            f"{row['run']} look about {row['optimism']:.4f} nats better than it is, so expect "
            f"{expected:.4f} of it rather than {row['log_loss']:.4f}."
        )
    return sentences


def main(arguments: Sequence[str] | None = None) -> int:
    """Rebuild and print the leaderboard of an artifacts folder; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    artifacts = Path(given[0]) if given else paths.artifacts_dir()
    if not any(artifacts.rglob("metrics.json")):
        print(f"{artifacts}: expected finished runs, found none: make run", file=sys.stderr)
        return 1
    table = write_leaderboard(artifacts)
    print(f"{format_leaderboard(table)}\n\nAll numbers: {artifacts / 'leaderboard.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
