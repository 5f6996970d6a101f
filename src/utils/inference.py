"""Test battles to a submission that is valid from the first minute on.

The floor answers for every battle before any neural network is loaded, and
`submission.csv` is written at once. Each further member replaces it by a better one
(written whole, then renamed). A member that fails or runs out of time costs
quality, never rows.
"""

import gc
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from src.utils.artifacts import read_json, write_table
from src.utils.baseline import load_baseline
from src.utils.config import DecoderConfig
from src.utils.metrics import Blend, apply_blend
from src.utils.models import load_finetuned
from src.utils.predict import predict_probs
from src.utils.schema import LABELS
from src.utils.submission import check_submission, make_submission


@dataclass(frozen=True)
class MemberTiming:
    """What one member of the blend did for the submission."""

    member: str
    status: str  # "whole", "partly" (time ran out), "failed" or "absent"
    n_reached: int  # battles that it predicted
    seconds: float
    note: str = ""


class Submission:
    """The file `submission.csv`, upgraded as better probabilities arrive.

    Args:
        path: of the file.
        ids: (N,) ids of the test battles.
        sample_ids: (M,) ids that the competition expects, in its order.
    """

    def __init__(self, path: Path, ids: np.ndarray, sample_ids: np.ndarray) -> None:
        self.path, self._ids, self._sample_ids = path, ids, sample_ids

    def write(self, probs: np.ndarray) -> Path:
        """Write (N, C) probabilities, read them back, and check them as the competition would."""
        write_table(self.path, make_submission(self._ids, probs, self._sample_ids))
        check_submission(pd.read_csv(self.path, dtype={"id": str}), self._sample_ids)
        return self.path


def predict_submission(
    pairs: pd.DataFrame,
    runs: Mapping[str, Path | None],
    blend: Blend,
    submission: Submission,
    *,
    deadline_s: float,
) -> tuple[np.ndarray, list[MemberTiming]]:
    """Predict every battle with every member that time allows, the cheap ones first.

    Args:
        pairs: N test battles, `schema.PAIR_COLUMNS`.
        runs: member name -> its finished run folder, or None where there is none.
        blend: weights of the members; those that are missing are left out, row by row.
        submission: written after each member.
        deadline_s: seconds from now that must not be passed. When the projected finish of a
            network passes it, it gives up its second readings, then rows.

    Returns:
        (N, C) float64 probabilities, rows sum to 1, and what each member did.

    Raises:
        RuntimeError: not one member could predict every battle, so there is nothing to submit.
    """
    deadline = time.monotonic() + deadline_s
    members: dict[str, np.ndarray] = {}
    timings = []
    for name in sorted(blend.members, key=lambda name: _is_network(runs.get(name))):
        probs, timing = _run_member(name, runs.get(name), pairs, deadline)
        timings.append(timing)
        if probs is not None:
            members[name] = probs
            if np.any([np.isfinite(member).all(axis=1) for member in members.values()], axis=0).all():
                submission.write(apply_blend(blend, members))
    if not members:
        notes = "; ".join(f"{timing.member}: {timing.note}" for timing in timings)
        raise RuntimeError(f"submission: expected at least one member of the blend to predict, got none ({notes})")
    return apply_blend(blend, members), timings


def _run_member(
    name: str, run: Path | None, pairs: pd.DataFrame, deadline: float
) -> tuple[np.ndarray | None, MemberTiming]:
    if run is None:
        return None, MemberTiming(name, "absent", 0, 0.0, "no finished run; execute its notebook")
    start = time.monotonic()
    predict: Callable = _predict_network if _is_network(run) else _predict_floor
    try:
        probs = predict(run, pairs, deadline)
    except Exception as error:  # whatever a damaged model does, the others must still submit
        traceback.print_exc()
        seconds = round(time.monotonic() - start, 2)
        return None, MemberTiming(name, "failed", 0, seconds, f"{type(error).__name__}: {error}")
    n_reached = int(np.isfinite(probs).all(axis=1).sum())
    status = "whole" if n_reached == len(pairs) else "partly"
    return probs, MemberTiming(name, status, n_reached, round(time.monotonic() - start, 2))


def _is_network(run: Path | None) -> bool:
    return run is not None and "checkpoint" in read_json(run / "config.json")


def _predict_floor(run: Path, pairs: pd.DataFrame, deadline: float) -> np.ndarray:
    return load_baseline(run / "model").predict_probs(pairs)


def _predict_network(run: Path, pairs: pd.DataFrame, deadline: float) -> np.ndarray:
    """Mean over the models of the folds, each as far as time allowed: (N, C), NaN where none reached."""
    config = DecoderConfig.from_json(read_json(run / "config.json"))
    folders = sorted((run / "model").glob("fold_*"))
    if not folders:
        raise FileNotFoundError(f"{run / 'model'}: expected a folder fold_<k> per trained fold, found none")
    total, n_models = np.zeros((len(pairs), len(LABELS))), np.zeros((len(pairs), 1))
    for folder in folders:
        model, tokenizer = load_finetuned(folder, config)
        probs = predict_probs(
            model,
            tokenizer,
            pairs,
            max_tokens=config.max_tokens,
            tokens_per_batch=config.tokens_per_batch,
            deadline=deadline,
            progress=f"{run.name} {folder.name}",
        )
        reached = np.isfinite(probs).all(axis=1, keepdims=True)
        total, n_models = total + np.where(reached, probs, 0), n_models + reached
        del model
        _free_memory()
    with np.errstate(invalid="ignore"):
        return total / n_models


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe_timing(timings: list[MemberTiming], *, n_pairs: int, seconds: float, deadline_s: float) -> dict:
    """What goes into `timing.json`: totals, and one entry a member."""
    return {
        "n_pairs": n_pairs,
        "seconds": round(seconds, 2),
        "deadline_s": deadline_s,
        "members": [asdict(timing) for timing in timings],
    }
