"""Train a classifier fold by fold, so that it can be killed at any moment and goes on where it was."""

import dataclasses
import gc
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from src.utils.config import FinetuneConfig
from src.utils.models.checkpoints import load_classifier, longest_row, quiet_transformers
from src.utils.models.template import TEMPLATE_VERSION
from src.utils.runs import find_damage, hash_file, hash_json, hash_pairs, read_json, write_json
from src.utils.schema import FROZEN_COLUMNS, check_pairs, probs_of, probs_table
from src.utils.training.data import add_extra_battles, find_file
from src.utils.training.processes import on_first, shard, world_size
from src.utils.training.trainer import HISTORY_COLUMNS, FoldTrainer


@dataclass(frozen=True)
class FitResult:
    """What training left behind.

    Attributes:
        oof: id, fold, one float32 column per label: every battle of the folds in
            `config.folds`, predicted by the model that did not see its fold.
        history: one row a validation, columns `HISTORY_COLUMNS`; losses in nats per battle,
            `train_loss` over the steps since the row before.
        n_train_pairs: battles trained on, mean over folds, the refit aside.
        n_parameters: weights that were trained.
        seconds: of training, validation aside, all models.
        tokens_per_second: real tokens (no padding) of training.
        padding_share: share of the tokens of training that were padding.
    """

    oof: pd.DataFrame
    history: pd.DataFrame
    n_train_pairs: int
    n_parameters: int
    seconds: float
    tokens_per_second: float
    padding_share: float


def fit(
    pairs: pd.DataFrame, config: FinetuneConfig, run_dir: Path, base: Path | None = None
) -> FitResult:
    """Train one model per held-out fold, or several, and predict that fold.

    The best weights of fold k, by log loss on it, lie in `run_dir / "model" / "fold_k"`,
    those of its further seeds in `fold_k_seed_1` and so on. With `config.refit` one more
    model learns from every battle, for the share of the steps that served the others best
    on average, and lies in `refit`. Each epoch reads every battle once, in an order drawn
    at random; the next epoch reads it in the other order. A model that was finished, or
    begun, with the same settings and battles is taken up again; anything else found there
    is removed. `run_dir / "tensorboard"` has the curves of each.

    Args:
        pairs: battles with label, group and fold.
        config: settings; `config.folds` are held out one after the other.
        run_dir: gets `model/`, `checkpoints/` and `tensorboard/`.
        base: folder of the base, in place of what `config.checkpoint` names.

    Returns:
        Held-out probabilities and how training went.

    Raises:
        ValueError: a fold of the config is empty or is all there is.
        FloatingPointError: validation gave logits that are not finite.
    """
    check_pairs(pairs, FROZEN_COLUMNS)
    members, refit = _plan_members(pairs, config)
    _remove_stale(run_dir, {member.name: member.key for member in (*members, *refit)})
    folds = [_fit_member(pairs, member, run_dir, base) for member in members]
    stop_share = float(np.mean([done["best_share"] for done in folds]))
    whole = [_fit_member(pairs, member, run_dir, base, stop_share) for member in refit]
    seconds, n_tok, n_padded = (
        sum(done[name] for done in folds + whole) for name in ("seconds", "n_tok", "n_padded")
    )
    return FitResult(
        oof=pd.concat(
            [_read_oof(run_dir, members, fold) for fold in config.folds], ignore_index=True
        ),
        history=pd.DataFrame(
            [row for done in folds for row in done["history"]], columns=list(HISTORY_COLUMNS)
        ),
        n_train_pairs=round(np.mean([done["n_train_pairs"] for done in folds])),
        n_parameters=folds[0]["n_parameters"],
        seconds=seconds,
        tokens_per_second=n_tok / max(seconds, 1e-9),
        padding_share=1 - n_tok / n_padded,
    )


@dataclass(frozen=True)
class _Member:
    """One model to train."""

    name: str  # of its folders
    fold: int | None  # held out; None of the refit
    config: FinetuneConfig  # with a seed of its own
    key: str  # of all that it follows from


def _plan_members(
    pairs: pd.DataFrame, config: FinetuneConfig
) -> tuple[list[_Member], list[_Member]]:
    """The models of the folds, and that of the refit where it is asked for."""
    configs = [
        dataclasses.replace(config, seed=config.seed + place) for place in range(config.n_seeds)
    ]
    keys = [_make_key(pairs, one) for one in configs]
    members = [
        _Member(
            f"fold_{fold}" + (f"_seed_{place}" if place else ""), fold, configs[place], keys[place]
        )
        for fold in config.folds
        for place in range(config.n_seeds)
    ]
    # When the refit stops follows from all the others.
    refit = _Member("refit", None, config, hash_json([keys, list(config.folds)]))
    return members, [refit] if config.refit else []


def _read_oof(run_dir: Path, members: list[_Member], fold: int) -> pd.DataFrame:
    tables = [
        pd.read_parquet(_model_dir(run_dir, one.name) / "oof.parquet")
        for one in members
        if one.fold == fold
    ]
    return probs_table(
        tables[0]["id"], np.mean([probs_of(table) for table in tables], axis=0), fold=fold
    )


# ---- what lies where ---------------------------------------------------------


def _model_dir(run_dir: Path, name: str) -> Path:
    return run_dir / "model" / name


def _checkpoint_dir(run_dir: Path, name: str) -> Path:
    return run_dir / "checkpoints" / name


def _make_key(pairs: pd.DataFrame, config: FinetuneConfig) -> str:
    # What other models there are changes none of them; one that several processes trained is taken by one.
    apart = ("folds", "n_seeds", "refit", "n_processes")
    settings = {name: value for name, value in config.to_json().items() if name not in apart}
    files = [*config.extra_battles, *([config.soft_labels] if config.soft_labels else [])]
    hashes = [hash_file(find_file(file)) for file in files]
    return hash_json([settings, hash_pairs(pairs), TEMPLATE_VERSION, *hashes])


@on_first
def _remove_stale(run_dir: Path, keys: dict[str, str]) -> None:
    # Whoever predicts with this run takes every model that lies here.
    kept = {name for name, key in keys.items() if _has_key(_checkpoint_dir(run_dir, name), key)}
    for kind in ("model", "checkpoints", "tensorboard"):
        for folder in (*(run_dir / kind).glob("fold_*"), *(run_dir / kind).glob("refit")):
            if folder.name not in kept:
                shutil.rmtree(folder)


def _has_key(folder: Path, key: str) -> bool:
    return (folder / "key.json").exists() and read_json(folder / "key.json") == key


@on_first
def _last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is what was written; damaged and half-written ones are named and removed."""
    for path in sorted(folder.glob("checkpoint-*"), key=_step_of, reverse=True):
        damage = find_damage(path)
        if damage is None:
            return path
        warnings.warn(f"{path} is damaged and will not be used: {damage}", stacklevel=2)
        shutil.rmtree(path)
    return None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


# ---- one model ----------------------------------------------------------------


def _fit_member(
    pairs: pd.DataFrame, member: _Member, run_dir: Path, base: Path | None, stop_share: float = 1.0
) -> dict[str, object]:
    folder, config = _checkpoint_dir(run_dir, member.name), member.config
    done = _read_done(run_dir, member.name)
    if done:
        return done
    train_pairs, heldout = _split(pairs, member.fold, config)
    is_parted = False
    model, tokenizer = load_classifier(config, base)
    _check_length(model, config)
    if is_parted:
        shard(model)
    trainer = FoldTrainer(
        model,
        tokenizer,
        train_pairs,
        heldout,
        member.fold,
        config,
        model_dir=_model_dir(run_dir, member.name),
        checkpoint_dir=folder,
        log_dir=run_dir / "tensorboard" / member.name,
        stop_share=stop_share,
    )
    world = {"n_processes": world_size(), "packed": trainer.is_packed}
    _begin(folder, member.key, world)
    with quiet_transformers():
        trainer.go_on(_last_whole_checkpoint(folder))
    done = trainer.describe() | {"n_train_pairs": len(train_pairs)}
    _finish(folder, done)
    del trainer, model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return done


@on_first
def _read_done(run_dir: Path, name: str) -> dict[str, object] | None:
    path = _checkpoint_dir(run_dir, name) / "done.json"
    is_done = path.exists() and (_model_dir(run_dir, name) / "origin.json").exists()
    return read_json(path) if is_done else None


@on_first
def _begin(folder: Path, key: str, world: dict[str, object]) -> None:
    if any(folder.glob("checkpoint-*")):
        _check_same_world(folder, world)
    write_json(folder / "world.json", world)
    write_json(folder / "key.json", key)


def _check_same_world(folder: Path, world: dict[str, object]) -> None:
    # Steps are counted in the batches of all processes, and each has dice and weights of its own. Whether
    # batches are packed is up to the version of transformers, too.
    begun = read_json(folder / "world.json")
    if begun != world:
        raise ValueError(
            f"{folder}: begun with {_name_values(begun)}, got {_name_values(world)}; go on with the former, "
            "or remove the folder to begin anew"
        )


def _name_values(values: dict[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


@on_first
def _finish(folder: Path, done: dict[str, object]) -> None:
    write_json(folder / "done.json", done)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


def _split(
    pairs: pd.DataFrame, fold: int | None, config: FinetuneConfig
) -> tuple[pd.DataFrame, pd.DataFrame]:
    is_heldout = (pairs["fold"] == fold).to_numpy()
    if fold is not None and (is_heldout.all() or not is_heldout.any()):
        raise ValueError(
            f"folds: expected fold {fold} to hold some of the {len(pairs)} battles and not all, "
            f"got {int(is_heldout.sum())}; there are folds {sorted(pairs['fold'].unique().tolist())}"
        )
    train_pairs = add_extra_battles(pairs, is_heldout, config)
    if config.max_pairs and len(train_pairs) > config.max_pairs:
        rng = np.random.default_rng(config.seed)
        train_pairs = train_pairs.iloc[
            np.sort(rng.choice(len(train_pairs), config.max_pairs, replace=False))
        ]
    return train_pairs.reset_index(drop=True), pairs[is_heldout].reset_index(drop=True)


def _check_length(model: nn.Module, config: FinetuneConfig) -> None:
    limit = longest_row(model.get_base_model() if config.lora_rank else model)
    for name in ("max_tokens", "predict_tokens"):
        if limit and getattr(config, name) > limit:
            raise ValueError(
                f"{name}: expected at most {limit}, what {config.checkpoint} reads, got {getattr(config, name)}; "
                f"set {name.upper()} to {limit} or less"
            )
