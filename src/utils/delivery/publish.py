"""Publish a model: choose it, merge it, prove that nothing changed, push it.

What is published loads with transformers alone. Its `config.json` names the classes and holds
`battle`: the tokens of the template around the texts, the token budget and the kind of head.
`card` writes the page that says how to use it.
"""

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import release_memory
from huggingface_hub import HfApi
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from src.utils.config import FinetuneConfig
from src.utils.models.checkpoints import load_finetuned, merge, write_model
from src.utils.models.predict import PRECISION_TOLERANCE, predict_probs, tolerance
from src.utils.models.template import TURN_TEXT, count_tokens, make_pieces
from src.utils.runs import atomic_folder
from src.utils.schema import LABEL_NAMES, LABELS, TEXTS, join_turns, swap_probs
from src.utils.stats.plots import with_interval
from src.utils.stats.scores import log_loss, paired_difference, row_losses

_CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
_NAME = re.compile(r'^name = ".*"$', re.MULTILINE)
_SLOTS = (*(f"{{{name}}}" for name in TEXTS), "")
_ASK = """
import json, sys
rows = json.load(sys.stdin)
found = {"probs": [predict(*row).tolist() for row in rows["all"]]}
if "ask" in globals():
    found["asked"] = [[ask(*row), ask(row[0], row[2], row[1])] for row in rows["within"]]
assert "src" not in sys.modules
print("\\n" + json.dumps(found))
"""


def choose_member(
    members: Mapping[str, np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray,
    names: Mapping[str, str],
    named: str = "",
) -> tuple[str, str]:
    """Choose the network to publish: the one named, else the best on votes that all held out.

    Args:
        members: notebook -> (N, C) float, held-out probabilities of the same N votes.
        labels: (N,) int.
        groups: (N,) any hashable, the prompts, for the intervals.
        names: notebook -> what its model is called for people.
        named: a notebook; "" chooses.

    Returns:
        The notebook, and a sentence that says why.

    Raises:
        ValueError: no network is there, or not the one that was named.
    """
    losses = {name: row_losses(probs, labels) for name, probs in members.items()}
    networks = sorted(losses.keys() - {"02_baseline"}, key=lambda name: losses[name].mean())
    if not networks or named not in ("", *networks):
        raise ValueError(
            f"SOURCE {named!r}: expected a network with a complete run, found {networks}. "
            "Run 03 or 04 first: the CPU baseline is no transformers model."
        )
    chosen = named or networks[0]
    why = "as SOURCE asks" if named else "the best network" if networks[1:] else "the only network"
    parts = [f"{names[chosen]} is published, {why}: {losses[chosen].mean():.4f} nats per battle"]
    for name in losses.keys() - {chosen}:
        gap = paired_difference(losses[chosen], losses[name], groups)
        word = "not measurably different from"
        if gap["low"] > 0 or gap["high"] < 0:
            word = "worse than" if gap["mean"] > 0 else "better than"
        difference = with_interval(gap["mean"], gap["low"], gap["high"], "{:+.4f}")
        parts.append(f"{word} {names[name]} ({losses[name].mean():.4f}), by {difference}")
    return chosen, "; ".join([parts[0], *sorted(parts[1:])]) + "."


def publish_model(
    source: Path,
    config: FinetuneConfig,
    pairs: pd.DataFrame,
    oof: pd.DataFrame,
    folder: Path,
    base: Path | None = None,
) -> dict[str, Any]:
    """Merge a fine-tuned model, save it, and compare what is on disk with the unmerged model.

    One copy of the weights is in memory at a time, in the dtype that it has on disk. `pairs` are
    held-out battles with label, `oof` has their held-out probabilities.

    Returns:
        What `parity.json` holds: max_abs_difference between merged and unmerged (both on
        a base that is not quantised), n_pairs, tolerance, passed, dtype of the weights, and the
        log loss of the battles with the merged model and with the probabilities of training.
    """
    predict = functools.partial(
        predict_probs,
        pairs=pairs,
        max_tokens=config.predict_tokens,
        tokens_per_batch=config.tokens_per_batch,
    )
    unquantized = dataclasses.replace(config, quantization="none")
    unmerged = predict(*load_finetuned(source, unquantized, base))
    release_memory()  # a packing model refers to itself
    dtype = _save_merged(source, config, base, folder)
    release_memory()
    if config.train == "head":  # its base is not published; one that the suite made is beside
        base = base or (source.parents[1] / "base" if config.has_own_base else None)
        model, tokenizer = load_finetuned(folder, unquantized, base)
    else:
        model, tokenizer = load_finetuned(folder, _complete(config))
    merged = predict(model, tokenizer)
    difference = float(np.abs(merged - unmerged).max())
    labels = pairs["label"].to_numpy()
    trained = oof.set_index("id").loc[pairs["id"], list(LABELS)].to_numpy()
    return {
        "max_abs_difference": difference,
        "n_pairs": len(pairs),
        # Half-precision weights round what merging adds to them.
        "tolerance": PRECISION_TOLERANCE[dtype],
        "passed": difference <= PRECISION_TOLERANCE[dtype],
        "dtype": str(dtype).removeprefix("torch."),
        "is_decoder": bool(tokenizer.chat_template),
        "template": write_template(tokenizer),
        "log_loss_merged": log_loss(merged, labels),
        "log_loss_trained": log_loss(trained, labels),
    }


def _complete(config: FinetuneConfig) -> FinetuneConfig:
    """The settings that read what `_save_merged` wrote: every weight, no adapter."""
    return dataclasses.replace(config, quantization="none", train="all")


def write_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Write the template of a battle as one text with the names of `schema.TEXTS` in braces."""
    parts = [tokenizer.decode(piece) for piece in make_pieces(tokenizer)]
    return "".join(part + slot for part, slot in zip(parts, _SLOTS, strict=True))


def _save_merged(
    source: Path, config: FinetuneConfig, base: Path | None, folder: Path
) -> torch.dtype:
    if config.train == "head":  # transformers has no such class: the head alone, without base
        with atomic_folder(folder) as tmp:
            kept = shutil.ignore_patterns("oof.parquet", "training.json", "manifest.json")
            shutil.copytree(source, tmp, ignore=kept, dirs_exist_ok=True)
        return torch.float32
    model, tokenizer = merge(source, config, base)
    model.config.id2label = dict(enumerate(LABEL_NAMES))
    model.config.label2id = {label: index for index, label in enumerate(LABEL_NAMES)}
    model.config.battle = {
        "head": config.head,
        "max_tokens": config.predict_tokens,
        "pieces": [list(piece) for piece in make_pieces(tokenizer)],
    }
    with atomic_folder(folder) as tmp:
        if config.head == "contrast":
            # Beside the weights, too: transformers leaves out what its own classes lack.
            contrast = model.contrast.weight.detach().float().cpu()[0]
            save_file({"contrast": contrast.contiguous()}, tmp / "contrast.safetensors")
        write_model(model, tokenizer, tmp)
    return model.dtype


def check_card(
    card: str, folder: Path, config: FinetuneConfig, pairs: pd.DataFrame
) -> dict[str, Any] | None:
    """Run the code of a card in a fresh process that lacks this package; compare with the suite.

    The code is that of the page, word for word, with `folder` in place of the name on the hub.

    Returns:
        n_within and n_cut, battles within the token budget and beyond it; within and cut, the
        largest difference of a probability on each (None: no such battle), and cut_mean, the mean
        of the largest per cut battle; tolerance; passed (of those within); and pipeline, the
        largest difference where one text is classified (None: the card has no such code).
        None for a head on a frozen base, which needs the suite.
    """
    if config.train == "head":
        return None
    here = f"name = {str(Path(folder).resolve())!r}"
    code = _NAME.sub(lambda _: here, "\n".join(_CODE.findall(card)))
    options = {"max_tokens": config.predict_tokens, "tokens_per_batch": config.tokens_per_batch}
    model, tokenizer = load_finetuned(folder, _complete(config))
    expected = predict_probs(model, tokenizer, pairs, **options)
    is_within = count_tokens(pairs, tokenizer) <= config.predict_tokens
    bound = max(tolerance(config, model), PRECISION_TOLERANCE[model.dtype])
    del model
    release_memory()
    texts = [[join_turns(turns, TURN_TEXT) for turns in pairs[name]] for name in TEXTS]
    battles = np.array(list(zip(*texts, strict=True)), dtype=object)
    rows = {"all": battles.tolist(), "within": battles[is_within].tolist()}
    found = _run_alone(code + _ASK, rows)
    differences = np.abs(np.array(found["probs"]) - expected).max(axis=1)
    within = _largest(differences[is_within])
    asked = None
    if found.get("asked"):
        first, second = (
            pd.DataFrame(order)[list(LABEL_NAMES)].to_numpy()
            for order in zip(*found["asked"], strict=True)
        )
        asked = _largest(np.abs((first + swap_probs(second)) / 2 - expected[is_within]))
    return {
        "n_within": int(is_within.sum()),
        "n_cut": int((~is_within).sum()),
        "within": within,
        "cut": _largest(differences[~is_within]),
        "cut_mean": None if is_within.all() else float(differences[~is_within].mean()),
        "tolerance": bound,
        "passed": within is None or within <= bound,
        "pipeline": asked,
    }


def _largest(differences: np.ndarray) -> float | None:
    return float(differences.max()) if differences.size else None


def _run_alone(code: str, given: Any) -> Any:
    """Run code in a process that sees neither this folder nor PYTHONPATH; JSON in, JSON out."""
    with tempfile.TemporaryDirectory() as empty:
        ran = subprocess.run(
            [sys.executable, "-I", "-c", code],
            input=json.dumps(given),
            cwd=empty,
            capture_output=True,
            text=True,
        )
    if ran.returncode:
        raise RuntimeError(f"the card's code failed:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def push_model(run_dir: Path, repo_id: str, dry_run: bool) -> str:
    """Upload `model/` and `README.md` to the hub, unless this is a dry run.

    Returns what was done, or would be; a dry run needs no account. ValueError if `repo_id`
    ("owner/name") or a file is missing.
    """
    files = [path for path in (run_dir / "model").iterdir() if path.is_file()]
    card = run_dir / "README.md"
    if not files or not card.exists():
        raise ValueError(
            f"{run_dir}: expected README.md and files in model/, got {len(files)} files; run 07"
        )
    size_mib = sum(path.stat().st_size for path in files) / 2**20
    what = f"{len(files) + 1} files, {size_mib:.1f} MiB"
    if dry_run:
        return f"dry run: would push {what} to {repo_id or 'the repository named in REPO_ID'}"
    if not repo_id:
        raise ValueError("REPO_ID: expected owner/name when DRY_RUN is False, got an empty text")
    api = HfApi()
    api.create_repo(repo_id, exist_ok=True, private=True)
    api.upload_folder(repo_id=repo_id, folder_path=run_dir / "model")
    api.upload_file(repo_id=repo_id, path_or_fileobj=card, path_in_repo="README.md")
    return f"pushed {what} to {repo_id} (private)"
