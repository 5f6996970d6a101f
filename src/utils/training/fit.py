"""Train a classifier fold by fold; a run killed at any moment resumes where it was.

A finished model is never removed. Settings that only touch prediction predict again, further folds
and seeds add to what is there, and models of other settings are set aside (`earlier`).
"""

import dataclasses
import math
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate.utils import release_memory
from torch import nn

from src.utils.battles.time_split import PAST
from src.utils.config import FinetuneConfig
from src.utils.models.checkpoints import (
    load_classifier,
    load_finetuned,
    longest_row,
    make_skeleton,
    read_architecture,
)
from src.utils.models.reading import LocalReader
from src.utils.runs import find_damage, read_json, write_json, write_table
from src.utils.schema import FROZEN_COLUMNS, check_pairs, probs_of, probs_table
from src.utils.training.data import add_extra_battles, find_file
from src.utils.training.earlier import BEGUN, RECORD, arrange_models, identify, list_finished
from src.utils.training.frozen_heads import HEAD_COLUMNS, train_head, write_member
from src.utils.training.heldout import Member, predict_heldout
from src.utils.training.processes import on_first, world_size
from src.utils.training.session import SessionOver, end_of_session
from src.utils.training.states import States, read_pace, read_states
from src.utils.training.trainer import HISTORY_COLUMNS, FoldTrainer, list_checkpoints


@dataclass(frozen=True)
class FitResult:
    """Held-out probabilities, and how training went."""

    config: FinetuneConfig  # with every fold that has a model, also of earlier runs
    oof: pd.DataFrame  # id, fold, one float32 column per label; every battle of `config.folds`
    # One row per validation, `HISTORY_COLUMNS`, or per head tried, `HEAD_COLUMNS`; losses in nats.
    history: pd.DataFrame
    swap_gap: float  # of whole folds, mean; see `scores.swap_gap`
    n_train_pairs: int  # mean over the folds, without the refit
    n_parameters: int  # that were trained
    seconds: float  # of training all models, without validation
    tokens_per_second: float  # of training, or of reading a frozen base's states, without padding
    padding_share: float  # of the tokens of training


def fit(
    pairs: pd.DataFrame,
    config: FinetuneConfig,
    run_dir: Path,
    base: Path | None = None,
    session_end: float | None = None,
) -> FitResult:
    """Train one or several models per held-out fold, and predict that fold.

    `run_dir / "model" / "fold_k"` gets the last weights of the model that never saw fold k, and
    its predictions; `fold_k_seed_1` and so on are those of further seeds. With `config.refit` one
    more model, `refit`, learns from every battle. Every epoch reads each battle in both orders;
    with `both_orders=False` it reads one order, drawn at random, and the next epoch the other.
    Models of the same settings that are there are kept, whatever folds and seeds `config` names.

    `pairs` have label, group and fold; `base` is a folder in place of `config.checkpoint`.
    `run_dir` also gets `checkpoints/`, `tensorboard/` and `history.csv`, and `earlier/` where
    models of other settings were in the way.

    With TRAIN `head` every fold is held out, whatever FOLDS says, and the refit is always there:
    all heads share the states of the frozen base (`states`), so that they cost minutes. A trial,
    with MAX_PAIRS, holds out FOLDS alone and reads no battle that its models do not need.

    ValueError if a fold is empty or holds all battles, FloatingPointError if a validation loses
    more than one in a hundred battles to logits that are not finite, SessionOver when
    `session_end` has come before the end: a `time.monotonic()` value, s, by default
    `config.train_deadline_s` from now.
    """
    check_pairs(pairs, FROZEN_COLUMNS)
    is_head = config.train == "head"
    if is_head:
        config = _take_all_folds(config, pairs)
    deadline = time.monotonic() + config.train_hours * 3600 if config.train_hours else math.inf
    if session_end is None:
        session_end = end_of_session(config.train_deadline_s)
    members = prepare_members(pairs, config, run_dir)
    finished = on_first(list_finished)(run_dir)
    to_train = [member.name for member in members if member.name not in finished]
    records: dict[str, dict] = {}
    rows: list[dict] = []  # of all validations so far
    states = None
    if is_head and to_train:
        needed = [member for member in members if member.name in to_train]
        states = _read_states(pairs, needed, run_dir, base, session_end)
    for member in members:
        if member.name in to_train and on_first(time.monotonic)() > session_end:
            raise SessionOver
        if member.name in to_train and states is not None:
            _train_head(pairs, member, run_dir, base, states)
        elif member.name in to_train:
            n_left = len(to_train) - to_train.index(member.name)
            left_s = (deadline - time.monotonic()) / n_left
            ends = (time.monotonic() + left_s, session_end)
            _train_member(pairs, member, run_dir, base, rows, ends)
        on_first(_remove_checkpoints)(run_dir / "checkpoints" / member.name)
        records[member.name] = _read_predicted(pairs, member, run_dir, base, session_end)
        rows += records[member.name]["history"]
    folds = [member for member in members if member.fold is not None]
    of_folds = [records[member.name] for member in folds]
    history = [row for record in of_folds for row in record["history"]]
    seconds = sum(row["seconds"] for row in rows)
    n_tok, n_padded = (sum(row.get(name, 0) for row in rows) for name in ("n_tok", "n_padded"))
    numbers = sorted({member.fold for member in members if member.fold is not None})
    return FitResult(
        config=dataclasses.replace(config, folds=tuple(numbers), refit=len(folds) < len(members)),
        oof=pd.concat([_read_oof(run_dir, folds, k) for k in numbers], ignore_index=True),
        history=pd.DataFrame(history, columns=list(HEAD_COLUMNS if is_head else HISTORY_COLUMNS)),
        swap_gap=float(np.mean([record["swap_gap"] for record in of_folds])),
        n_train_pairs=round(np.mean([record["n_train_pairs"] for record in of_folds])),
        n_parameters=of_folds[0]["n_parameters"],
        seconds=seconds,
        tokens_per_second=of_folds[0].get("tokens_per_second", n_tok / max(seconds, 1e-9)),
        padding_share=(n_padded - n_tok) / max(n_padded, 1),
    )


def _take_all_folds(config: FinetuneConfig, pairs: pd.DataFrame) -> FinetuneConfig:
    if world_size() > 1:
        raise RuntimeError(
            f"train: head needs one process, got {world_size()}; its readers use every GPU of a "
            "machine: run the notebook without torchrun"
        )
    if config.max_pairs:
        return config
    folds = sorted({int(fold) for fold in pairs["fold"]} - {PAST})
    return dataclasses.replace(config, folds=tuple(folds), refit=True)


def _read_states(
    pairs: pd.DataFrame, members: list[Member], run_dir: Path, base: Path | None, session_end: float
) -> States:
    config = members[0].config
    _check_length(make_skeleton(read_architecture(config, base), "joint"), config)
    if config.max_pairs:
        parts = [part for member in members for part in _split(pairs, member.fold, member.config)]
        read = pd.concat([part.astype({"id": object}) for part in parts], ignore_index=True)
    else:
        read = add_extra_battles(pairs, np.zeros(len(pairs), dtype=bool), config)
    return read_states(read, config, run_dir, base, session_end)


def _train_head(
    pairs: pd.DataFrame, member: Member, run_dir: Path, base: Path | None, states: States
) -> None:
    train_pairs, heldout = _split(pairs, member.fold, member.config)
    head, probs, record = train_head(states, train_pairs, heldout, member)
    record["tokens_per_second"] = read_pace(states)
    write_member(head, probs, record, heldout, member, run_dir, base)
    penalties = ", ".join(f"{name} {value:g}" for name, value in record["penalties"].items())
    best = min(row["log_loss"] for row in record["history"])
    print(
        f"{member.name}: penalties {penalties}, chosen at {best:.4f} of "
        f"{len(record['history'])} heads, {record['seconds']:.0f} s",
        flush=True,
    )


def prepare_members(pairs: pd.DataFrame, config: FinetuneConfig, run_dir: Path) -> list[Member]:
    """List the models of all folds and seeds, asked for or there already; the refit comes last.

    Models of other settings are set aside, and those of these settings brought back.
    """
    files = [*config.extra_battles, *([config.soft_labels] if config.soft_labels else [])]
    first = identify(config, pairs, [find_file(file) for file in files])

    def plan(name: str) -> Member:
        """Plan the model of a name: fold_K, fold_K_seed_N or refit."""
        _, fold, _, number = (*name.split("_"), "", "", "")[:4]
        seeded = dataclasses.replace(config, seed=config.seed + int(number or 0))
        identity = {"settings": {**first["settings"], "seed": seeded.seed}, "data": first["data"]}
        return Member(name, int(fold) if fold else None, seeded, identity)

    on_first(arrange_models)(run_dir, lambda name: plan(name).identity)
    asked = [
        f"fold_{fold}_seed_{number}" if number else f"fold_{fold}"
        for number in range(config.n_seeds)
        for fold in config.folds
    ]
    names = list(dict.fromkeys([*asked, *on_first(list_finished)(run_dir)]))
    if config.refit or "refit" in names:
        names = [name for name in names if name != "refit"] + ["refit"]
    return [plan(name) for name in names]


def _read_oof(run_dir: Path, members: list[Member], fold: int) -> pd.DataFrame:
    """The held-out probabilities of a fold, the mean over its seeds."""
    names = [member.name for member in members if member.fold == fold]
    tables = [pd.read_parquet(run_dir / "model" / name / "oof.parquet") for name in names]
    probs = np.mean([probs_of(table) for table in tables], axis=0)
    return probs_table(tables[0]["id"], probs, fold=fold)


def _train_member(
    pairs: pd.DataFrame,
    member: Member,
    run_dir: Path,
    base: Path | None,
    earlier: Sequence[dict],
    ends: tuple[float, float],
) -> None:
    """Train one model; `ends` are the deadline and the end of the session, as for `train`."""
    train_pairs, heldout = _split(pairs, member.fold, member.config)
    model, tokenizer = load_classifier(member.config, base)
    _check_length(model, member.config)
    folder = run_dir / "checkpoints" / member.name
    trainer = FoldTrainer(model, tokenizer, train_pairs, heldout, member, run_dir, earlier)
    begun = {"identity": member.identity, "n_steps": len(trainer.steps)}
    on_first(write_json)(folder / BEGUN, begun)
    trainer.train(find_checkpoint(folder), *ends)
    del trainer, model
    release_memory()


def _remove_checkpoints(folder: Path) -> None:
    for path in list_checkpoints(folder):
        shutil.rmtree(path)


def _read_predicted(
    pairs: pd.DataFrame, member: Member, run_dir: Path, base: Path | None, session_end: float
) -> dict:
    """Read how a finished model was trained; predict again where that is asked for."""
    folder = run_dir / "model" / member.name
    record = on_first(read_json)(folder / RECORD)
    is_there = on_first((folder / "oof.parquet").exists)()
    n_tok = member.config.predict_tokens
    if member.fold is None or (is_there and record["predict_tokens"] == n_tok):
        return record
    print(f"{member.name}: predicts its fold again, at PREDICT_TOKENS {n_tok:,}", flush=True)
    heldout = pairs[pairs["fold"] == member.fold].reset_index(drop=True)
    base = base if member.config.is_frozen else None
    model, tokenizer = load_finetuned(folder, member.config, base)
    reader = LocalReader(model, tokenizer.pad_token_id, packing=member.config.packing)
    prediction = predict_heldout(reader, tokenizer, heldout, member, session_end=session_end)
    record |= {"predict_tokens": n_tok, "swap_gap": prediction.swap_gap}
    table = probs_table(heldout["id"], prediction.probs, fold=member.fold)
    on_first(write_table)(folder / "oof.parquet", table)
    on_first(write_json)(folder / RECORD, record)
    del model, reader
    release_memory()
    return record


@on_first
def find_checkpoint(folder: Path) -> Path | None:
    """The newest intact checkpoint in a folder; damaged ones are named and removed."""
    for path in list_checkpoints(folder):
        damage = find_damage(path)
        if damage is None:
            return path
        warnings.warn(f"{path} is damaged and will not be used: {damage}", stacklevel=2)
        shutil.rmtree(path)
    return None


def _split(
    pairs: pd.DataFrame, fold: int | None, config: FinetuneConfig
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Battles to train on, and those held out."""
    is_heldout = (pairs["fold"] == fold).to_numpy()
    if fold is not None and (is_heldout.all() or not is_heldout.any()):
        raise ValueError(
            f"folds: expected fold {fold} to hold some of the {len(pairs)} battles and not all, "
            f"got {int(is_heldout.sum())}; the folds are {sorted(pairs['fold'].unique().tolist())}"
        )
    train_pairs = add_extra_battles(pairs, is_heldout, config)
    if config.max_pairs and len(train_pairs) > config.max_pairs:
        rng = np.random.default_rng(config.seed)
        rows = np.sort(rng.choice(len(train_pairs), config.max_pairs, replace=False))
        train_pairs = train_pairs.iloc[rows]
    return train_pairs.reset_index(drop=True), pairs[is_heldout].reset_index(drop=True)


def _check_length(model: nn.Module, config: FinetuneConfig) -> None:
    limit = longest_row(model.get_base_model() if config.uses_lora else model)
    names = ("predict_tokens",) if config.train == "head" else ("max_tokens", "predict_tokens")
    for name in names:
        if limit and getattr(config, name) > limit:
            raise ValueError(
                f"{name}: expected at most {limit}, the longest input of {config.checkpoint}, "
                f"got {getattr(config, name)}; set {name.upper()} to {limit} or less"
            )
