"""Put the checkpoint that a notebook trains into its run folder, where the suite has to make it."""

import os
from functools import partial
from pathlib import Path

import pandas as pd

from src.utils.config import FinetuneConfig
from src.utils.models import packaged, tiny
from src.utils.models.template import TEMPLATE_VERSION
from src.utils.models.wheels import find_package
from src.utils.runs import atomic_folder, hash_json, hash_pairs, move_aside, read_json, write_json
from src.utils.schema import TEXTS


def prepare_base(
    config: FinetuneConfig, pairs: pd.DataFrame, folder: Path, n_steps: int | None = None
) -> Path | None:
    """Put a config's checkpoint into a folder, unless it is there: a plain transformers folder.

    "package:NAME" is taken from the package index. "tiny:modernbert" and "tiny:qwen3" are trained
    on the texts of the battles, not on the votes, in `n_steps` optimiser steps (`tiny.N_STEPS`); 0
    keeps their weights random.

    Returns:
        The folder, or None if `checkpoint` is on the hub or in a folder of its own.
    """
    if not config.has_own_base:
        return None
    if config.is_tiny:
        kind = tiny.find_kind(config.checkpoint)
        steps = tiny.N_STEPS[kind] if n_steps is None else n_steps
        made_from = [kind, config.seed, steps, tiny.VERSION, TEMPLATE_VERSION]
        key = hash_json([*made_from, hash_pairs(pairs[["id", *TEXTS]])])
        make = partial(tiny.make_tiny, kind, pairs, config.seed, steps)
    else:
        key = find_package(config.checkpoint)[1].sha256
        make = partial(packaged.read_package, config.checkpoint)
    if swap_base(folder, key):
        return folder
    model, tokenizer = make()
    with atomic_folder(folder) as tmp:
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        write_json(tmp / "made_from.json", key)
    return folder


def swap_base(folder: Path, key: str) -> bool:
    """Let a folder hold the checkpoint made from `key`, if there is one; return whether it does.

    Another one that is in the way is kept in `earlier/` beside it: adapters were trained on it.
    """

    def place_of(one: str) -> Path:
        return folder.parent / "earlier" / f"{folder.name}-{one}"

    made_from = folder / "made_from.json"
    found = read_json(made_from) if made_from.exists() else ""
    if folder.exists() and found != key:
        move_aside(folder, place_of(found or "damaged"))
    if found != key and place_of(key).exists():
        os.replace(place_of(key), folder)
        found = key
    return found == key
