"""Score a submission on battles whose votes are known: intervals, comparisons, slices.

    python -m src.utils.delivery.score submission.csv --labels battles.csv

A submission has id and a probability per class, as CSV, gzip or parquet; `oof.parquet` of a run is
one, too. Battles with votes are of any layout that is read, or `pairs.parquet` of 01. Votes may be
in a file of their own: id, and label (0, 1, 2), winner, or a column per class.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from src.utils import paths
from src.utils.battles import layouts, style
from src.utils.battles.files import read_table
from src.utils.battles.readers import SEED, add_groups_and_folds, load_pairs
from src.utils.runs import read_pairs, write_json
from src.utils.schema import FROZEN_COLUMNS, LABELS, TEXTS, TIE, count_votes, list_votes
from src.utils.stats import scores
from src.utils.stats.extras import slice_extras
from src.utils.stats.plots import percent, with_interval
from src.utils.stats.tables import to_text

PRIOR, LENGTH = "the class prior", "length alone"
N_FOLDS = 5  # of the class prior and of length alone, which learn from the labelled battles
MIN_SLICE = 30  # battles
_USAGE = (
    'make score SUBMISSION=submission.csv LABELS="a.csv b.csv" '
    "[AGAINST=other.csv] [PARTIAL=1] [WRITE=scores.json]"
)
_RULED_OUT = 0.001  # a probability that no battle deserves
_ROUNDED = 2e-3  # a row of three decimals may miss a sum of 1 by so much
_N_SHOWN = 3  # ids that a message lists


def read_submission(path: Path) -> pd.DataFrame:
    """Read a submission: its class columns, float64, by id (text).

    Raises:
        ValueError: a column is missing, an id is blank or repeated, a cell is no probability, or a
            row does not sum to 1; the message names file, row (from 1), id and column.
    """
    table = read_table(path)
    missing = [name for name in ("id", *LABELS) if name not in table.columns]
    if missing:
        raise ValueError(
            f"{path}: expected columns {['id', *LABELS]} in the header, missing {missing}, found "
            f"{list(table.columns)}; rename them, or name the file of predictions"
        )
    ids = _read_ids(path, table)
    probs = table[list(LABELS)].apply(pd.to_numeric, errors="coerce").astype(np.float64)
    probs.index = pd.Index(ids, name="id")
    wrong = np.argwhere(~((probs >= 0) & (probs <= 1)).to_numpy())
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"{path}: row {row + 1}, id {ids[row]}, column {LABELS[column]}: expected a "
            f"probability from 0 to 1, found {table[LABELS[column]].iloc[row]!r:.40}; so in "
            f"{len({*wrong[:, 0]}):,} of {len(probs):,} rows; predict these battles again"
        )
    sums = probs.sum(axis=1).to_numpy()
    is_off = np.abs(sums - 1) > _ROUNDED
    if is_off.any():
        row = is_off.argmax()
        raise ValueError(
            f"{path}: row {row + 1}, id {ids[row]}, columns {list(LABELS)}: expected a sum of 1, "
            f"found {sums[row]:.4f}; so in {is_off.sum():,} of {len(sums):,} rows; divide each row "
            "by its sum if these are weights"
        )
    return probs.div(sums, axis=0)


def _read_ids(path: Path, table: pd.DataFrame) -> list[str]:
    ids = table["id"].astype(str).str.strip()
    ids = ids.str.replace(r"^(\d+)\.0$", r"\1", regex=True)  # a spreadsheet wrote 17 as 17.0
    blank = np.flatnonzero(ids.str.casefold().isin(("", "nan", "none")))
    if len(blank):
        raise ValueError(f"{path}: row {blank[0] + 1}, column id: expected an id, found a blank")
    double = ids[ids.duplicated(keep=False)]
    if len(double):
        rows = (double.index[double == double.iloc[0]] + 1).tolist()
        raise ValueError(
            f"{path}: column id: expected each id once, found {double.iloc[0]} in rows "
            f"{rows[:_N_SHOWN]}; {double.nunique():,} ids are repeated; keep one row of each"
        )
    return ids.tolist()


def read_labelled(files: Sequence[Path]) -> pd.DataFrame:
    """Read battles with their votes from one or several files; see the module.

    Returns:
        id (text), label, group, fold, counts of votes where there are any, and the texts, unless
        votes alone are known; then each battle is a group of its own.

    Raises:
        ValueError: no file holds votes, a vote cannot be read, or votes and battles do not match.
    """
    headers = {path: list(read_table(path, header_only=True).columns) for path in files}
    if len(files) == 1 and {*FROZEN_COLUMNS} <= {*headers[files[0]]}:
        pairs = read_pairs(files[0])
        return pairs.assign(id=pairs["id"].astype(str))
    votes = [path for path in files if _has_votes_alone(headers[path])]
    battles = [path for path in files if path not in votes]
    if not votes:
        _check_votes(battles, headers)
        pairs = load_pairs(battles)[0]
    else:
        known = pd.concat(map(_read_votes, votes), ignore_index=True)
        if known["id"].duplicated().any():
            first = known.loc[known["id"].duplicated(), "id"].iloc[0]
            raise ValueError(f"{votes[-1]}: expected one vote per id, found several of id {first}")
        if not battles:
            folds = np.arange(len(known)) % N_FOLDS
            return known.assign(group=np.arange(len(known)), fold=folds)
        pairs = load_pairs(battles, labelled=False)[0]
        pairs["id"] = pairs["id"].astype(str)
        pairs = pairs.merge(known, on="id", validate="many_to_one")
        if pairs.empty:
            raise ValueError(
                f"{votes[0]}: expected votes on the battles of {battles[0]}, found no id in common"
            )
    pairs = add_groups_and_folds(pairs, N_FOLDS)
    return pairs.assign(id=pairs["id"].astype(str))


def _has_votes_alone(columns: Sequence[str]) -> bool:
    return "id" in columns and {*TEXTS, *layouts.CONVERSATIONS, "chosen"}.isdisjoint(columns)


def _check_votes(battles: Sequence[Path], headers: dict[Path, list[str]]) -> None:
    for path in battles:
        if not layouts.has_votes(headers[path]):
            layouts.find_layout(path, headers[path], labelled=False)  # no battles at all
            raise ValueError(
                f"{path}: expected votes, columns {list(LABELS)} or winner, found battles without; "
                'name the file of their votes beside it: LABELS="battles.csv votes.csv"'
            )


def _read_votes(path: Path) -> pd.DataFrame:
    """Read a file of votes alone: id and label."""
    table = read_table(path)
    ids = table["id"].astype(str).str.strip()
    if "label" in table.columns:
        labels = pd.to_numeric(table["label"], errors="coerce")
        wrong = np.flatnonzero(~labels.isin(range(len(LABELS))))
        if len(wrong):
            found = table["label"].iloc[wrong[0]]
            raise ValueError(
                f"{path}: row {wrong[0] + 1}, id {ids[wrong[0]]}, column label: expected 0 (A "
                f"wins), 1 (B wins) or 2 (tie), found {found!r:.40}; so in "
                f"{len(wrong):,} of {len(table):,} rows"
            )
        return pd.DataFrame({"id": ids, "label": labels.astype(np.int64)})
    fitting = [each for each in layouts.LAYOUTS[:2] if {*each.votes} <= {*table.columns}]
    if not fitting:
        raise ValueError(
            f"{path}: expected votes, column label or winner or columns {list(LABELS)}, found "
            f"{list(table.columns)}"
        )
    found = layouts.read_labels(path, table, fitting[0], SEED)["label"]
    return pd.DataFrame({"id": ids, "label": found.astype(np.int64)})


def choose_battles(
    labelled: pd.DataFrame, submissions: dict[str, pd.DataFrame], partial: bool = False
) -> pd.DataFrame:
    """Choose the labelled battles that every submission predicts: all, or with `partial` those.

    Raises:
        ValueError: a submission lacks some of them, without `partial`, or all.
    """
    kept = labelled
    for name, probs in submissions.items():
        there = kept["id"].isin(probs.index)
        if there.all():
            continue
        lacking = kept.loc[~there, "id"].tolist()
        counts = f"found {there.sum():,} of {len(kept):,}, without {lacking[:_N_SHOWN]}"
        if not there.any():
            first = probs.index[:_N_SHOWN].tolist()
            raise ValueError(
                f"{name}: column id: expected ids of the battles in LABELS, {counts}; its own are "
                f"{first}: these are other battles; name the file that they are from"
            )
        if not partial:
            raise ValueError(
                f"{name}: column id: expected every battle that has a vote, {counts}; add them, or "
                "score the others alone with PARTIAL=1"
            )
        kept = kept[there]
    return kept.reset_index(drop=True)


def score_submission(
    pairs: pd.DataFrame,
    models: Mapping[str, np.ndarray],
    labelled: pd.DataFrame,
    n_boot: int = 1000,
    seed: int = SEED,
) -> dict[str, Any]:
    """Score the first of `models`, name -> (N, C), on N battles `pairs`, all or some of `labelled`.

    The class prior and length alone learn from the votes of the other folds of `labelled`, which
    are those of `read_labelled`.

    Returns:
        n_pairs, n_votes, n_prompts (0: unknown); what `scores.score` returns; log_loss_low and
        _high; n_ruled_out (votes given less than 0.001); mean_p_tie; share_of_ties with _low and
        _high; and three tables: `models`, whose `difference` is the submission minus that model
        (paired), `classes` and `slices`. Nats per vote, 95 % intervals.
    """
    own = next(iter(models))
    rows, labels = list_votes(pairs)
    votes = _Votes(rows, labels, pairs["group"].to_numpy()[rows], {"n_boot": n_boot, "seed": seed})
    probs, has_texts = models[own][rows], {*TEXTS} <= {*pairs.columns}
    # Length alone needs every vote in the battles that it learns from.
    is_enough = has_texts and count_votes(labelled).sum(axis=0).min() >= N_FOLDS
    known, places = dict(models), pd.Index(labelled["id"]).get_indexer(pairs["id"])
    if is_enough:
        known[LENGTH] = scores.predict_by_length(labelled)[places]
    compared = _compare_models(pairs, known, labelled, votes)
    first = compared[compared["model"] == own].iloc[0]
    low, high = scores.bootstrap_interval(labels == TIE, votes.groups, **votes.bootstrap)
    classes = scores.score_classes(probs, labels, votes.groups, **votes.bootstrap)
    result: dict[str, Any] = {"n_pairs": len(pairs), "n_votes": len(labels)}
    result["n_prompts"] = int(pairs["group"].nunique()) if has_texts else 0
    result |= scores.score(probs, labels)
    result |= {"log_loss_low": first["low"], "log_loss_high": first["high"]}
    result["n_ruled_out"] = int((probs[np.arange(len(labels)), labels] < _RULED_OUT).sum())
    result |= {"mean_p_tie": probs[:, TIE].mean(), "share_of_ties": (labels == TIE).mean()}
    result |= {"share_of_ties_low": low, "share_of_ties_high": high, "models": compared}
    result |= {"classes": classes, "slices": pd.DataFrame()}
    if is_enough:
        known[PRIOR] = scores.prior_of(labelled)[places]
        result["slices"] = _compare_slices(pairs, known, votes)
    return result


class _Votes(NamedTuple):
    """Every vote on some battles: its row, its class, its group, (V,) each; how to resample."""

    rows: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    bootstrap: dict[str, int]


def _compare_models(
    pairs: pd.DataFrame, models: Mapping[str, np.ndarray], labelled: pd.DataFrame, votes: _Votes
) -> pd.DataFrame:
    own = next(iter(models))
    table = scores.compare_runs(models, pairs, labelled, None, own, **votes.bootstrap)
    table = pd.concat([table[1:], table[:1]], ignore_index=True)  # the class prior comes last
    # Its difference is that model minus the submission: turned round.
    turned = -table[["difference", "difference_high", "difference_low"]].to_numpy()
    table[["difference", "difference_low", "difference_high"]] = turned
    return table.assign(difference=table["difference"].mask(table["model"] == own))


def _compare_slices(
    pairs: pd.DataFrame, models: Mapping[str, np.ndarray], votes: _Votes
) -> pd.DataFrame:
    """Compare the first model with the others on slices of battles, the worst slice first."""
    counts = style.measure_style(pairs)
    kinds = style.classify_prompts(pairs, counts)
    slices = style.slice_battles(counts) | slice_extras(pairs)
    slices |= {f"prompt: {kind}": np.asarray(kinds == kind) for kind in kinds.categories}
    kept = {n: s[votes.rows] for n, s in slices.items() if MIN_SLICE <= s.sum() < len(pairs)}
    losses = {n: scores.row_losses(probs[votes.rows], votes.labels) for n, probs in models.items()}
    own = losses.pop(next(iter(models)))
    table = scores.compare_slices(own, losses, kept, votes.groups, **votes.bootstrap)
    return table.sort_values("log_loss", ascending=False, ignore_index=True)


def format_scores(result: Mapping[str, Any]) -> str:
    """Write what `score_submission` returns for a terminal."""
    n_votes = "" if result["n_votes"] == result["n_pairs"] else f", {result['n_votes']:,} votes"
    prompts = f"over {result['n_prompts']:,} prompts"
    if not result["n_prompts"]:
        prompts = "without prompts, so too narrow where battles share one"
    title = f"{result['n_pairs']:,} battles{n_votes}. Log loss in nats per vote, 95 % intervals"
    formats = {"log_loss": "{:.4f}", "difference": "{:+.4f}"}
    formats |= dict.fromkeys(("accuracy", "ece", "predicted", "recall", "precision"), "{:.1%}")
    headers = {"difference": "submission minus it", "n": "votes", "predicted": "mean probability"}
    bounds = {"log_loss": ("low", "high"), "difference": ("difference_low", "difference_high")}
    within = {name: (f"{name}_low", f"{name}_high") for name in ("log_loss", "recall")}
    classes = result["classes"].drop(columns="share")
    texts = [f"{title} {prompts}:\n{to_text(result['models'], formats, 4, bounds, headers)}"]
    texts.append(to_text(classes, formats, 4, within, headers))
    low, high = result["share_of_ties_low"], result["share_of_ties_high"]
    texts.append(
        f"Calibration: confidence and accuracy differ by {100 * result['ece']:.1f} points (ECE). "
        f"P(tie) is {percent(result['mean_p_tie'])} on average; "
        f"{with_interval(result['share_of_ties'], low, high, '{:.1%}')} of the votes are ties."
    )
    if result["n_ruled_out"]:
        texts[-1] += (
            f" Of {result['n_ruled_out']:,} votes the submission was sure that they would not come "
            f"(P below {_RULED_OUT}); each costs 7 to 35 nats: mix it with the class prior."
        )
    slices = result["slices"].rename(columns={"log_loss": "submission"})
    if slices.empty:
        texts.append(f"No slices: they need texts, and {N_FOLDS} votes of each class or more.")
    else:
        first = slices.columns[3]
        name = first if first == LENGTH else "against"
        headers = {first: name, "difference": f"submission minus {name}"}
        bounds = {"difference": ("low", "high")}
        texts.append(to_text(slices, {"difference": "{:+.3f}"}, 3, bounds, headers))
    return "\n\n".join(texts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Score a submission from the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="make score", usage=_USAGE)
    add = parser.add_argument
    add("submission", type=Path, help="csv, csv.gz or parquet: id and a column per class")
    add("--labels", required=True, help="files of battles with votes, as after DATA=")
    add("--against", type=Path, help="another submission, compared on the same battles")
    add("--partial", action="store_true", help="leave out battles that a submission lacks")
    add("--write", type=Path, help="file.json for all numbers")
    given = parser.parse_args(arguments)
    try:
        result = _score_files(given)
    except (ValueError, OSError) as error:
        print(f"make score: {error}", file=sys.stderr)
        return 1
    print(f"\n{format_scores(result)}")
    if given.write:
        write_json(given.write, _to_json(result))
    return 0


def _score_files(given: argparse.Namespace) -> dict[str, Any]:
    files = [given.submission, *([given.against] if given.against else [])]
    submissions = {str(path): read_submission(path) for path in files}
    labelled = read_labelled(paths.find_raw_data(given.labels).train)
    pairs = choose_battles(labelled, submissions, given.partial)
    if len(pairs) < len(labelled):
        print(f"scored in part: {len(pairs):,} of {len(labelled):,} battles with votes")
    for name, probs in submissions.items():
        if n_more := len(probs) - len(pairs):
            print(f"{name}: {n_more:,} of {len(probs):,} rows are of other battles and left out")
    models = {name: probs.loc[pairs["id"]].to_numpy() for name, probs in submissions.items()}
    return score_submission(pairs, models, labelled)


def _to_json(result: dict[str, Any]) -> dict[str, Any]:
    """Numbers as JSON knows them, tables as rows, missing as null."""
    content = {}
    for name, value in result.items():
        if isinstance(value, pd.DataFrame):
            content[name] = json.loads(value.to_json(orient="records", double_precision=15))
        else:
            content[name] = value if isinstance(value, int) else float(value)
    return content


if __name__ == "__main__":
    sys.exit(main())
