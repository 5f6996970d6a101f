"""Page through battles in Jupyter, and try a battle of one's own: two small widgets.

A page without a kernel (the gallery, a code host, a headless run) gets a fixed selection instead.
"""

import os
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import display

from src.utils.schema import LABEL_NAMES
from src.utils.stats.cards import show_battle
from src.utils.stats.scores import row_losses

STATIC = "ARENA_STATIC"  # in the environment of a headless run
ANY = "any"
_ORDERS = ("as in the file", "largest error first", "smallest error first")
_N_CHATBOTS = 100  # in the list; battles of the others are under "any"


def choose_battles(
    pairs: pd.DataFrame,
    vote: str = ANY,
    chatbot: str = ANY,
    kind: str = ANY,
    *,
    kinds: pd.Series | None = None,
    losses: np.ndarray | None = None,
    order: str = _ORDERS[0],
) -> np.ndarray:
    """Choose battles by filters: their positions in `pairs`, (K,) int.

    Args:
        vote: "A wins", "B wins", "tie" or "any"; chatbot: a name, on either side, or "any".
        kind: one of `kinds`, (N,) str, which says what each prompt is about; or "any".
        losses: (N,) float, nats, by which an order of errors sorts.
    """
    kept = np.ones(len(pairs), dtype=bool)
    if vote != ANY:
        kept &= pairs["label"].to_numpy() == LABEL_NAMES.index(vote)
    if chatbot != ANY:
        kept &= (pairs[["model_a", "model_b"]] == chatbot).any(axis=1).to_numpy()
    if kind != ANY and kinds is not None:
        kept &= np.asarray(kinds) == kind
    rows = np.flatnonzero(kept)
    if losses is None or order == _ORDERS[0]:
        return rows
    sign = -1 if order == _ORDERS[1] else 1
    return rows[np.argsort(sign * losses[rows], kind="stable")]


def explore_battles(
    pairs: pd.DataFrame,
    probs: np.ndarray | None = None,
    kinds: pd.Series | None = None,
    n_static: int = 3,
) -> None:
    """Show battles one by one, chosen by vote, chatbot, kind and model error.

    Args:
        pairs: N labelled battles; probs: (N, C) float, what a model predicts of them.
        kinds: (N,) str, what each prompt is about.
        n_static: battles that a page without a kernel shows, spread over the file.
    """
    losses = None if probs is None else row_losses(probs, pairs["label"].to_numpy())

    def show(row: int) -> None:
        title = f"Battle {pairs['id'].iloc[row]}"
        title += "" if losses is None else f": {losses[row]:.2f} nats lost"
        display(show_battle(pairs.iloc[row], None if probs is None else probs[row], title))

    if os.environ.get(STATIC):
        for row in np.linspace(0, len(pairs) - 1, min(n_static, len(pairs)), dtype=int):
            show(row)
        return
    names = pd.concat([pairs["model_a"], pairs["model_b"]]).value_counts().index[:_N_CHATBOTS]
    choices = {"vote": (ANY, *LABEL_NAMES), "chatbot": (ANY, *sorted(names))}
    if kinds is not None:
        choices["kind"] = (ANY, *sorted(pd.unique(kinds)))
    if losses is not None:
        choices["order"] = _ORDERS
    controls: dict[str, Any] = {
        name: widgets.Dropdown(options=options, description=name)
        for name, options in choices.items()
    }
    controls["battle"] = widgets.BoundedIntText(value=1, min=1, description="battle no.")

    def draw(battle: int, **chosen: str) -> None:
        rows = choose_battles(pairs, kinds=kinds, losses=losses, **chosen)
        print(f"{len(rows):,} battles")
        if len(rows):
            show(int(rows[min(battle, len(rows)) - 1]))

    controls["battle"].max = len(pairs)
    out = widgets.interactive_output(draw, controls)
    display(widgets.VBox([widgets.HBox(list(controls.values())), out]))


def try_battle(
    predict: Callable[[pd.DataFrame], np.ndarray], prompt: str, answer_a: str, answer_b: str
) -> None:
    """Show what a model says of a battle that is typed; three texts stand there at first.

    Args:
        predict: one battle of `schema.PAIR_COLUMNS` -> (1, C) float.
    """

    def draw(**texts: str) -> None:
        battle = pd.Series({"id": "yours", **{name: (text,) for name, text in texts.items()}})
        display(show_battle(battle, predict(pd.DataFrame([battle]))[0]))

    texts = {"prompt": prompt, "response_a": answer_a, "response_b": answer_b}
    if os.environ.get(STATIC):
        draw(**texts)
        return
    look = widgets.Layout(width="90%", height="80px")
    boxes: dict[str, Any] = {
        name: widgets.Textarea(
            text,
            description=name.replace("response_", "answer "),
            layout=look,
            continuous_update=False,
        )
        for name, text in texts.items()
    }
    display(widgets.VBox([*boxes.values(), widgets.interactive_output(draw, boxes)]))
