"""Publish a model: prove that merging changed nothing, write its card, push it.

The card (its text is `model_card.md`) states only numbers that a finished run wrote down.
"""

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import release_memory
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from src.utils.config import FinetuneConfig
from src.utils.models.checkpoints import load_finetuned, merge, save_model
from src.utils.models.predict import PRECISION_TOLERANCE, predict_probs
from src.utils.models.template import TEMPLATE_VERSION
from src.utils.runs import atomic_folder
from src.utils.schema import LABELS
from src.utils.stats.scores import log_loss

DATASET = "lmarena-ai/arena-human-preference-55k"
_CARD = Path(__file__).with_name("model_card.md")
_MEASURES = {
    "log_loss": "log loss (nats per battle)",
    "accuracy": "accuracy",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "prior_log_loss": "log loss of the class prior, for comparison",
    "oracle_log_loss": "oracle log loss (best reachable)",
    "swap_gap": "swap gap: mean change of a probability when the answers are exchanged",
}


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
        a base that is not quantised), n_pairs, tolerance, passed, and the log loss of the
        battles with the merged model and with the held-out probabilities of training.
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
    # Half-precision weights round what merging adds to them.
    tolerance = PRECISION_TOLERANCE[_save_merged(source, config, base, folder)]
    release_memory()
    if config.train == "head":  # stays what it is; a tiny base is beside the run's models
        base = base or (source.parents[1] / "base" if config.has_own_base else None)
        merged = predict(*load_finetuned(folder, unquantized, base))
    else:
        merged = predict(*load_finetuned(folder, dataclasses.replace(unquantized, train="all")))
    difference = float(np.abs(merged - unmerged).max())
    labels = pairs["label"].to_numpy()
    trained = oof.set_index("id").loc[pairs["id"], list(LABELS)].to_numpy()
    return {
        "max_abs_difference": difference,
        "n_pairs": len(pairs),
        "tolerance": tolerance,
        "passed": difference <= tolerance,
        "log_loss_merged": log_loss(merged, labels),
        "log_loss_trained": log_loss(trained, labels),
    }


def _save_merged(
    source: Path, config: FinetuneConfig, base: Path | None, folder: Path
) -> torch.dtype:
    if config.train == "head":  # transformers has no such class: the head alone, without base
        with atomic_folder(folder) as tmp:
            kept = shutil.ignore_patterns("oof.parquet", "training.json", "manifest.json")
            shutil.copytree(source, tmp, ignore=kept, dirs_exist_ok=True)
        return torch.float32
    model, tokenizer = merge(source, config, base)
    model.config.id2label = dict(enumerate(LABELS))
    model.config.label2id = {label: index for index, label in enumerate(LABELS)}
    save_model(model, tokenizer, folder)
    return model.dtype


def make_card(
    config: FinetuneConfig,
    metrics: Mapping[str, Any],
    parity: Mapping[str, Any],
    repo_id: str,
    is_demo: bool,
) -> ModelCard:
    """Write the model card, front matter included, from what the run measured.

    `metrics` are its `metrics.json`, `parity` is from `publish_model`; without a `repo_id`
    ("owner/name" on the hub) a placeholder stands.
    """
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type="simulated" if is_demo else DATASET,
            dataset_name="demo arena" if is_demo else "LLM Classification Finetuning",
            metric_type=name,
            metric_value=round(metrics[name], 4),
        )
        for name in ("log_loss", "accuracy")
    ]
    data = ModelCardData(
        model_name=repo_id.split("/")[-1] or "preference-model",
        license="mit" if config.is_tiny else "apache-2.0",
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["human-preferences", "llm-evaluation", "reward-model"],
        base_model=None if config.has_own_base else config.checkpoint,
        datasets=None if is_demo else [DATASET],
        eval_results=results,
    )
    measured = {text: metrics[name] for name, text in _MEASURES.items() if name in metrics}
    return ModelCard.from_template(
        data,
        str(_CARD),
        model_name=data.model_name,
        repo_id=repo_id or "OWNER/NAME",
        config=config,
        metrics=metrics,
        measures=measured,
        parity=parity,
        is_demo=is_demo,
        dataset=DATASET,
        labels=LABELS,
        template_version=TEMPLATE_VERSION,
    )


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
