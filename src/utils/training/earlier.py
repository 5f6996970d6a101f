"""Keep what was trained: models of other settings are set aside, and come back with them.

A run folder holds the models of one setting in `model/`. A model's identity is every setting that
shapes its weights, and a hash of what it learned from. Where another identity is asked for, the
folders of a model move to `earlier/KEY/`, and from there back. Nothing is ever removed.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from src.utils.config import FinetuneConfig, upgrade_settings
from src.utils.models.template import TEMPLATE_VERSION
from src.utils.runs import find_damage, find_free, hash_file, hash_json, hash_pairs, read_json

Identity = Mapping[str, Mapping[str, Any]]  # "settings" and "data"

EARLIER, DAMAGED = "earlier", "damaged"
KINDS = ("model", "checkpoints", "tensorboard")  # the folders of a run that models have a part in
RECORD = "training.json"  # in the folder of a finished model: its identity and how training went
BEGUN = "settings.json"  # beside the checkpoints of an unfinished one: its identity
# They decide how many models there are, who trains them, and how they predict; or they change no
# more than the rounding of a step.
_NOT_IDENTITY = frozenset(
    "folds n_seeds refit n_processes predict_tokens tokens_per_batch gradient_checkpointing "
    "n_evals eval_pairs save_minutes train_hours train_deadline_s allow_cpu".split()
)
_OF_LORA = frozenset({"lora_rank", "lora_alpha", "lora_dropout"})
_OF_STEPS = frozenset(  # of optimizer steps through the base
    "head max_tokens tokens_per_step n_epochs both_orders learning_rate warmup_share "
    "weight_decay soft_temperature".split()
)
_NAME = re.compile(r"fold_\d+(_seed_\d+)?|refit")


def identify(config: FinetuneConfig, pairs: Any, files: list[Path]) -> Identity:
    """Return what determines a model: its settings, and hashes of all that it learns from.

    `pairs` are the battles, or their `hash_pairs`; `files` hold extra battles and soft labels.
    """
    unread = _find_unread(config)
    settings = {k: v for k, v in config.to_json().items() if k not in unread}
    data = {
        "battles": pairs if isinstance(pairs, str) else hash_pairs(pairs),
        "template": TEMPLATE_VERSION,
        "files": [hash_file(file) for file in files],
    }
    return {"settings": settings, "data": data}


def _find_unread(config: FinetuneConfig) -> frozenset[str]:
    """Name the settings that do not shape the weights."""
    if config.train == "head":  # its states were read with the budget of prediction
        return _NOT_IDENTITY - {"predict_tokens"} | _OF_LORA | _OF_STEPS
    return _NOT_IDENTITY | {"state_layers"} | (frozenset() if config.uses_lora else _OF_LORA)


def describe_difference(found: Identity | None, asked: Identity) -> str:
    """Name what differs, e.g. "LEARNING_RATE was 0.0002, is 0.0001"; empty if nothing does.

    A setting that is newer than the model had its default.
    """
    if found is None:
        return "its settings are unknown"
    before = FinetuneConfig().to_json() | upgrade_settings(found["settings"])
    changes = []
    for name, value in asked["settings"].items():
        if before[name] != value:
            changes.append(f"{name.upper()} was {before[name]}, is {value}")
    for name, value in asked["data"].items():
        if found["data"].get(name) != value:
            changes.append(f"other {name}")
    return "; ".join(changes)


def read_identity(folder: Path, name: str) -> Identity | None:
    """Read the identity of a model below a run folder, finished or begun; None if unknown."""
    for path in (folder / "model" / name / RECORD, folder / "checkpoints" / name / BEGUN):
        with contextlib.suppress(ValueError, KeyError):  # a damaged file tells nothing
            if path.exists():
                return read_json(path)["identity"]
    return None


def list_finished(run_dir: Path) -> list[str]:
    """List the models whose training has ended: only then do their folders appear, at once."""
    return [name for name in _list_models(run_dir) if (run_dir / "model" / name / RECORD).exists()]


def arrange_models(run_dir: Path, identity_of: Callable[[str], Identity]) -> None:
    """Let `run_dir` hold the models of one setting, finished or begun, and only those.

    `identity_of` gives the identity that a model of this name, e.g. "fold_0", should have.
    """
    for name in _list_models(run_dir):
        if damage := _find_damage(run_dir / "model" / name):
            place = _set_aside(run_dir, name, DAMAGED)
            message = f"{run_dir / 'model' / name} is damaged ({damage}): it is kept in {place}"
            warnings.warn(message, stacklevel=2)
            continue
        identity = read_identity(run_dir, name)
        if difference := describe_difference(identity, identity_of(name)):
            place = _set_aside(run_dir, name, hash_json(identity)[:8])
            print(f"{run_dir.name}: {name} is kept in {place} ({difference})", flush=True)
    for place in sorted((run_dir / EARLIER).glob("*")):
        if place.name.startswith(DAMAGED):
            continue
        for name in _list_models(place):
            is_same = not describe_difference(read_identity(place, name), identity_of(name))
            if is_same and name not in list_finished(run_dir):
                _move(place, run_dir, name)
                print(f"{run_dir.name}: {name} is back from {place}", flush=True)


def _find_damage(folder: Path) -> str | None:
    if not folder.exists():
        return None
    return find_damage(folder) if (folder / RECORD).exists() else f"no {RECORD}"


def _list_models(folder: Path) -> list[str]:
    found = {path.name for kind in KINDS for path in (folder / kind).glob("*") if path.is_dir()}
    return sorted(filter(_NAME.fullmatch, found))


def _set_aside(run_dir: Path, name: str, key: str) -> Path:
    def has_another(place: Path) -> bool:
        return any((place / kind / name).exists() for kind in KINDS)

    place = find_free(run_dir / EARLIER / key, has_another)
    _move(run_dir, place, name)
    return place


def _move(source: Path, target: Path, name: str) -> None:
    """Move the folders of a model, the model itself first: a kill leaves each in one place."""
    for kind in KINDS:
        path = target / kind / name
        if (source / kind / name).exists() and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source / kind / name, path)
