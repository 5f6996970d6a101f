"""Split battles by time: a model learns from the past and is scored on the future.

Fold 0 is the newest part of the battles. All others have the fold `PAST`: every model trains on
them, none is scored on them, so that nothing is ever trained on later battles. Prompts stay
together: a prompt that was asked in the newest part belongs to fold 0 with all its battles.
"""

import numpy as np
import pandas as pd

PAST = -2  # trained on, never held out; -1 is the fold of extra battles


def hold_out_newest(pairs: pd.DataFrame, n_folds: int = 5) -> pd.DataFrame:
    """Make the newest 1 / `n_folds` of the battles fold 0, and all that is older `PAST`.

    `pairs` have `group` and `timestamp` (UTC), as from `readers`.

    Returns:
        The same rows with other folds (int8). Every battle of `PAST` is older than the last
        battle of each prompt in fold 0.

    Raises:
        ValueError: a time is missing, or nothing is left to train on; the message says how many.
    """
    if reason := why_no_split(pairs):
        raise ValueError(f"SPLIT=time: {reason}: give files with times, or set SPLIT=prompt")
    moments, sizes = np.unique(_last_asked(pairs), return_counts=True)
    # The cut is between two moments, so that equal times are on one side.
    n_newer = sizes[::-1].cumsum()[::-1][1:]
    cut = moments[1:][np.abs(n_newer - len(pairs) / n_folds).argmin()]
    return pairs.assign(fold=np.where(_last_asked(pairs) >= cut, 0, PAST).astype(np.int8))


def why_no_split(pairs: pd.DataFrame) -> str:
    """Say what was expected and found where `hold_out_newest` cannot split; else empty."""
    n_missing = pairs["timestamp"].isna().sum() if "timestamp" in pairs.columns else len(pairs)
    if n_missing:
        return f"expected a timestamp for each of {len(pairs):,} battles, got {n_missing:,} without"
    n_moments = len(np.unique(_last_asked(pairs)))
    if n_moments < 2:
        return f"expected prompts that were last asked at several moments, got {n_moments}"
    return ""


def _last_asked(pairs: pd.DataFrame) -> np.ndarray:
    """When the prompt of each battle was asked last: (N,) datetime64, UTC."""
    times = pd.to_datetime(pairs["timestamp"], utc=True).dt.tz_convert(None)
    return times.groupby(pairs["group"]).transform("max").to_numpy()


def describe_time_split(pairs: pd.DataFrame) -> str:
    """Say in a sentence what is trained on and what is scored, after `hold_out_newest`."""
    times = pd.to_datetime(pairs["timestamp"], utc=True)
    is_past = (pairs["fold"] == PAST).to_numpy()
    end = times[is_past].max()
    scored = times[~is_past]
    text = (
        f"Trained on {is_past.sum():,} battles until {end:%Y-%m-%d %H:%M} UTC, "
        f"scored on {len(scored):,}"
    )
    n_earlier = (scored <= end).sum()
    if n_earlier:
        text += f"; {n_earlier:,} of these are earlier, but share a prompt with a later one"
    return f"{text}."
