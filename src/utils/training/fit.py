"""Train a classifier fold by fold; a run killed at any moment resumes where it was."""

import dataclasses
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate.utils import release_memory
from torch import nn

from src.utils.config import FinetuneConfig
from src.utils.models.checkpoints import load_classifier, longest_row, quiet_transformers
from src.utils.models.template import TEMPLATE_VERSION
from src.utils.runs import find_damage, hash_file, hash_json, hash_pairs, read_json, write_json
from src.utils.schema import FROZEN_COLUMNS, check_pairs, probs_of, probs_table
from src.utils.training.data import add_extra_battles, find_file
from src.utils.training.processes import on_first
from src.utils.training.trainer import HISTORY_COLUMNS, FoldTrainer, Member, list_checkpoints

# They decide which models there are and who trains them, not what a model becomes.
_NOT_IN_KEY = ("folds", "n_seeds", "refit", "n_processes")


@dataclass(frozen=True)
class FitResult:
    """Held-out probabilities, and how training went."""

    oof: pd.DataFrame  # id, fold, one float32 column per label; every battle of `config.folds`
    history: pd.DataFrame  # one row per validation, `HISTORY_COLUMNS`; losses in nats per battle
    n_train_pairs: int  # mean over the folds, without the refit
    n_parameters: int  # that were trained
    seconds: float  # of training all models, without validation
    tokens_per_second: float  # of training, without padding
    padding_share: float  # of the tokens of training


def fit(
    pairs: pd.DataFrame, config: FinetuneConfig, run_dir: Path, base: Path | None = None
) -> FitResult:
    """Train one or several models per held-out fold, and predict that fold.

    `run_dir / "model" / "fold_k"` gets the weights that had the lowest log loss on fold k, and
    `fold_k_seed_1` and so on those of further seeds. With `config.refit` one more model, `refit`,
    learns from every battle, for the average share of steps at which the others were best. Every
    epoch reads each battle in both orders; with `both_orders=False` it reads one order, drawn at
    random, and the next epoch the other. A model that was finished or begun with the same
    settings and battles is kept or resumed; all other models in `run_dir` are removed.

    `pairs` have label, group and fold; `base` is a folder in place of `config.checkpoint`.
    `run_dir` also gets `checkpoints/`, `tensorboard/` and `history.csv`.

    ValueError if a fold is empty or holds all battles, FloatingPointError if validation gives
    logits that are not finite.
    """
    check_pairs(pairs, FROZEN_COLUMNS)
    members = plan_members(pairs, config)
    _remove_stale(run_dir, members)
    folds = [member for member in members if member.fold is not None]
    results: list[dict] = []
    rows: list[dict] = []  # of all validations so far
    for member in folds:
        results.append(_fit_member(pairs, member, run_dir, base, rows))
        rows += results[-1]["history"]
    history = pd.DataFrame(rows, columns=list(HISTORY_COLUMNS))
    n_train_pairs = float(np.mean([result["n_train_pairs"] for result in results]))
    if config.refit:
        best = [min(one["history"], key=lambda row: row["log_loss"]) for one in results]
        stop_share = float(np.mean([row["epoch"] for row in best])) / config.n_epochs
        refit = dataclasses.replace(members[-1], stop_share=stop_share)
        rows += _fit_member(pairs, refit, run_dir, base, rows)["history"]
    seconds = sum(row["seconds"] for row in rows)
    n_tok = sum(row["n_tok"] for row in rows)
    return FitResult(
        oof=pd.concat([_read_oof(run_dir, folds, k) for k in config.folds], ignore_index=True),
        history=history,
        n_train_pairs=round(n_train_pairs),
        n_parameters=results[0]["n_parameters"],
        seconds=seconds,
        tokens_per_second=n_tok / max(seconds, 1e-9),
        padding_share=1 - n_tok / sum(row["n_padded"] for row in rows),
    )


def plan_members(pairs: pd.DataFrame, config: FinetuneConfig) -> list[Member]:
    """The models of all folds and seeds, then the refit if it is asked for."""
    files = [*config.extra_battles, *([config.soft_labels] if config.soft_labels else [])]
    data = [hash_pairs(pairs), TEMPLATE_VERSION, *(hash_file(find_file(file)) for file in files)]
    members, keys = [], []
    for number in range(config.n_seeds):
        seeded = dataclasses.replace(config, seed=config.seed + number)
        settings = {k: v for k, v in seeded.to_json().items() if k not in _NOT_IN_KEY}
        keys.append(hash_json([settings, *data]))
        for fold in config.folds:
            name = f"fold_{fold}_seed_{number}" if number else f"fold_{fold}"
            members.append(Member(name, fold, seeded, keys[-1]))
    if config.refit:  # where it stops depends on all other models
        members.append(Member("refit", None, config, hash_json([keys, list(config.folds)])))
    return members


@on_first
def _remove_stale(run_dir: Path, members: list[Member]) -> None:
    """Remove the models of other settings: whoever predicts with this run uses all it finds."""
    keys = {member.name: member.key for member in members}
    for kind in ("model", "tensorboard", "checkpoints"):  # which hold the keys: last
        for folder in [*(run_dir / kind).glob("fold_*"), *(run_dir / kind).glob("refit")]:
            path = run_dir / "checkpoints" / folder.name / "key.json"
            if not path.exists() or read_json(path) != keys.get(folder.name):
                shutil.rmtree(folder)


def _read_oof(run_dir: Path, members: list[Member], fold: int) -> pd.DataFrame:
    """The held-out probabilities of a fold, the mean over its seeds."""
    names = [member.name for member in members if member.fold == fold]
    tables = [pd.read_parquet(run_dir / "model" / name / "oof.parquet") for name in names]
    probs = np.mean([probs_of(table) for table in tables], axis=0)
    return probs_table(tables[0]["id"], probs, fold=fold)


def _fit_member(
    pairs: pd.DataFrame, member: Member, run_dir: Path, base: Path | None, earlier: list[dict]
) -> dict:
    """Train a model unless it is finished; returns history, n_parameters and n_train_pairs."""
    folder = run_dir / "checkpoints" / member.name
    done = _read_done(folder, run_dir / "model" / member.name)
    if done:
        return done
    train_pairs, heldout = _split(pairs, member.fold, member.config)
    model, tokenizer = load_classifier(member.config, base)
    _check_length(model, member.config)
    on_first(write_json)(folder / "key.json", member.key)
    trainer = FoldTrainer(model, tokenizer, train_pairs, heldout, member, run_dir, earlier)
    with quiet_transformers():
        trainer.train(find_checkpoint(folder))
    done = {
        "history": trainer.history,
        "n_parameters": sum(weight.numel() for weight in trainer.weights),
        "n_train_pairs": len(train_pairs),
    }
    _write_done(folder, done)
    del trainer, model
    release_memory()
    return done


@on_first
def _read_done(folder: Path, model_dir: Path) -> dict | None:
    is_done = (folder / "done.json").exists() and (model_dir / "origin.json").exists()
    return read_json(folder / "done.json") if is_done else None


@on_first
def _write_done(folder: Path, done: dict) -> None:
    write_json(folder / "done.json", done)
    for path in list_checkpoints(folder):
        shutil.rmtree(path)


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
    limit = longest_row(model.get_base_model() if config.lora_rank else model)
    for name in ("max_tokens", "predict_tokens"):
        if limit and getattr(config, name) > limit:
            raise ValueError(
                f"{name}: expected at most {limit}, the longest input of {config.checkpoint}, "
                f"got {getattr(config, name)}; set {name.upper()} to {limit} or less"
            )
