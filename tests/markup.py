"""Names that a figure reads as a formula and a page as HTML, and a file of battles with them."""

import json
from pathlib import Path

import numpy as np

from src.utils.battles.demo import make_battles
from src.utils.schema import LABELS, MODELS, TEXTS

IMAGE = "<img src=x onerror=alert(1)>"
NAMES = ("alpha$\\frac{$7b", "beta$x_1$y", "gamma & sons", "delta_chat^2", IMAGE)


def write_markup(path: Path, n_rows: int = 400) -> None:
    """Write demo battles in the competition's layout, with such names and texts."""
    battles, _ = make_battles(n_rows, seed=3)
    rng = np.random.default_rng(0)
    rows = battles[["id"]].copy()
    for name in TEXTS:
        texts = [(f"{IMAGE} costs $5_a$ ", *turns[1:]) for turns in battles[name]]
        mixed = zip(texts, battles[name], rng.random(n_rows) < 0.5, strict=True)
        chosen = [marked if is_marked else turns for marked, turns, is_marked in mixed]
        rows[name] = [json.dumps(turns) for turns in chosen]
    first = rng.integers(len(NAMES), size=n_rows)
    second = (first + rng.integers(1, len(NAMES), size=n_rows)) % len(NAMES)
    for column, places in zip(MODELS, (first, second), strict=True):
        rows[column] = np.array(NAMES)[places]
    for place, label in enumerate(LABELS):
        rows[label] = (battles["label"] == place).astype(int)
    rows.to_csv(path, index=False)
