"""Publish a model: prove that merging changed nothing, write its card, push it.

The card states only numbers that a finished run wrote down.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from torch import nn

from src.utils.config import FinetuneConfig
from src.utils.models.checkpoints import TINY, load_finetuned, load_unquantized, merge, save_model
from src.utils.models.predict import predict_probs
from src.utils.models.template import TEMPLATE_VERSION
from src.utils.schema import LABELS
from src.utils.stats.scores import log_loss

# Half-precision weights round what merging adds to them.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
DATASET = "lmarena-ai/arena-human-preference-55k"

_MEASURES = {
    "log_loss": "log loss (nats per battle)",
    "accuracy": "accuracy",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "prior_log_loss": "log loss of the class shares, for comparison",
    "oracle_log_loss": "best log loss that anyone could reach",
    "swap_gap": "mean change of a probability when the answers are exchanged, before averaging",
}
_REAL_DATA = f"""Votes from Chatbot Arena: the rows of Kaggle's 'LLM Classification Finetuning', public on the hub as
`{DATASET}`. See the data's own page for its terms; prompts and answers were written by users and by chatbots of several
vendors."""
_DEMO_DATA = """A simulated arena with known true probabilities. No person voted, and no real text was used: this model
shows that the pipeline works and is of no other use."""
_LICENCE = """Code and adapters: MIT. The base model keeps its own licence (Apache-2.0 for ModernBERT-base and for
Qwen3-4B-Instruct-2507), which covers the merged weights."""
_TINY_LICENCE = "MIT. The weights were trained from scratch."

_CARD = """
# {title}

Given a prompt and two answers from anonymous chatbots, this model predicts how a person votes: P(A wins), P(B wins),
P(tie). It is `{checkpoint}` with {head}{adapters}.

## Results

Measured on {n_pairs:,} held-out battles that share no prompt with the training data, averaged over both orders of the
answers.

| measure | value |
|---|---|
{results}

Trained on {n_train_pairs:,} battles. Merging changed no probability by more than {difference:.1e}, on a base that is
not quantised ({n_parity} battles, tolerance {tolerance:.0e}); on the same battles the log loss was {loss_trained:.4f}
as trained and is {loss_merged:.4f} with the weights in this repository.

## Data

{data}

## Intended use and limits

- For research on human preferences, and for ranking or comparing answers where a mistake is cheap.
- Not a judge of truth, safety or quality: it predicts what people voted for, and people favour long, well-formatted
  answers. Do not reward a chatbot with it without controlling for that.
- The voters were visitors of one web site, mostly writing English. Other people may prefer otherwise.
- A battle is cut to {max_tokens:,} tokens, template included.
- The order of the answers matters a little to the raw model. Average both orders, as below.

## How to load

{loading}

The input must be written as in training: template {template_version} of `src/utils/models/batches.py`, which also
cuts long battles and keeps special tokens in users' text from being read as such.

```python
from src.utils.models.predict import predict_probs

probs = predict_probs(model, tokenizer, pairs, max_tokens={max_tokens}, tokens_per_batch={tokens_per_batch})
```

Classes: {classes}.

## Licence

{licence}
"""

_HEADS = {
    "joint": "a classification head of three classes",
    "contrast": "a classification head of three classes, and beside it a contrast of the two answers",
}
_LOADING = {
    "joint": """```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForSequenceClassification.from_pretrained("{repo}", dtype=torch.float32).eval()
```""",
    "contrast": """transformers alone would leave the contrast out; the suite loads it.

```python
from huggingface_hub import snapshot_download
from src.utils.config import FinetuneConfig
from src.utils.models.checkpoints import load_finetuned

folder = snapshot_download("{repo}")
model, tokenizer = load_finetuned(folder, FinetuneConfig(checkpoint=folder, head="contrast"))
```""",
}


def publish_model(
    source: Path,
    config: FinetuneConfig,
    pairs: pd.DataFrame,
    oof: pd.DataFrame,
    folder: Path,
    base: Path | None = None,
) -> dict[str, Any]:
    """Merge a fine-tuned model, save it, and compare what lies on disk with the unmerged model.

    Args:
        source: a saved model, e.g. `03_modernbert/model/fold_0`.
        config: settings that it was trained with.
        pairs: N held-out battles with label.
        oof: their held-out probabilities: id and one column per label.
        folder: gets the merged model.
        base: as for `models.load_finetuned`.

    Returns:
        What `parity.json` holds: max_abs_difference between merged and unmerged (both on
        a base that is not quantised), n_pairs, tolerance, passed, and the log loss of the
        sample with the merged model and with the held-out probabilities of training.
    """
    options = {"max_tokens": config.predict_tokens, "tokens_per_batch": config.tokens_per_batch}
    model, tokenizer = load_unquantized(source, config, base)
    unmerged = predict_probs(model, tokenizer, pairs, **options)
    del model
    merged_model, tokenizer = merge(source, config, base)
    _name_classes(merged_model)
    save_model(merged_model, tokenizer, folder)
    merged = predict_probs(*_reload(folder, config), pairs, **options)
    tolerance = TOLERANCES[next(merged_model.parameters()).dtype]
    difference = float(np.abs(merged - unmerged).max())
    labels = pairs["label"].to_numpy()
    return {
        "max_abs_difference": difference,
        "n_pairs": len(pairs),
        "tolerance": tolerance,
        "passed": bool(difference <= tolerance),
        "log_loss_merged": log_loss(merged, labels),
        "log_loss_trained": log_loss(
            oof.set_index("id").loc[pairs["id"], list(LABELS)].to_numpy(), labels
        ),
    }


def _name_classes(model: nn.Module) -> None:
    model.config.id2label = dict(enumerate(LABELS))
    model.config.label2id = {label: index for index, label in enumerate(LABELS)}


def _reload(folder: Path, config: FinetuneConfig) -> tuple[nn.Module, Any]:
    plain = dataclasses.replace(config, lora_rank=0, quantization="none")
    return load_finetuned(folder, plain)


def make_card(
    config: FinetuneConfig,
    metrics: Mapping[str, Any],
    parity: Mapping[str, Any],
    repo_id: str,
    is_demo: bool,
) -> ModelCard:
    """Write the model card from what the run measured.

    Args:
        config: settings of the run.
        metrics: its `metrics.json`.
        parity: from `publish_model`.
        repo_id: "owner/name" on the hub; empty writes a placeholder.
        is_demo: whether the battles are those of the demo arena.

    Returns:
        A card, front matter included; `str(card)` is the text of `README.md`.
    """
    is_tiny = config.checkpoint.startswith(TINY)
    data = ModelCardData(
        model_name=repo_id.split("/")[-1] or "preference-model",
        license="mit" if is_tiny else "apache-2.0",
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["human-preferences", "llm-evaluation", "reward-model"],
        base_model=None if is_tiny else config.checkpoint,
        datasets=None if is_demo else [DATASET],
        eval_results=_eval_results(metrics, is_demo),
    )
    names = (
        "log_loss",
        "accuracy",
        "brier",
        "ece",
        "prior_log_loss",
        "oracle_log_loss",
        "swap_gap",
    )
    text = _CARD.format(
        title=data.model_name,
        checkpoint=config.checkpoint,
        head=_HEADS[config.head],
        loading=_LOADING[config.head].format(repo=repo_id or "OWNER/NAME"),
        adapters=f"; LoRA adapters of rank {config.lora_rank} are merged into it"
        if config.lora_rank
        else "",
        n_pairs=metrics["n_pairs"],
        n_train_pairs=metrics["n_train_pairs"],
        results="\n".join(
            f"| {_MEASURES[name]} | {metrics[name]:.4f} |" for name in names if name in metrics
        ),
        difference=parity["max_abs_difference"],
        n_parity=parity["n_pairs"],
        tolerance=parity["tolerance"],
        loss_trained=parity["log_loss_trained"],
        loss_merged=parity["log_loss_merged"],
        data=_DEMO_DATA if is_demo else _REAL_DATA,
        licence=_TINY_LICENCE if is_tiny else _LICENCE,
        classes=", ".join(f"{index} `{label}`" for index, label in enumerate(LABELS)),
        template_version=TEMPLATE_VERSION,
        max_tokens=config.predict_tokens,
        tokens_per_batch=config.tokens_per_batch,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _eval_results(metrics: Mapping[str, Any], is_demo: bool) -> list[EvalResult]:
    where = {
        "task_type": "text-classification",
        "dataset_type": "simulated" if is_demo else DATASET,
        "dataset_name": "demo arena" if is_demo else "LLM Classification Finetuning",
    }
    return [
        EvalResult(metric_type=name, metric_value=round(metrics[name], 4), **where)
        for name in ("log_loss", "accuracy")
    ]


def push_model(run_dir: Path, repo_id: str, dry_run: bool) -> str:
    """Upload `model/` and `README.md` to the hub, unless this is a rehearsal.

    Args:
        run_dir: holds both.
        repo_id: "owner/name".
        dry_run: True uploads nothing and needs no account.

    Returns:
        What was done, or would be.

    Raises:
        ValueError: asked to push without a repository, or something is missing.
    """
    files = sorted(path for path in (run_dir / "model").iterdir() if path.is_file())
    if not files or not (run_dir / "README.md").exists():
        raise ValueError(
            f"{run_dir}: expected model/ and README.md, got {len(files)} files of a model"
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
    api.upload_file(
        repo_id=repo_id, path_or_fileobj=run_dir / "README.md", path_in_repo="README.md"
    )
    return f"pushed {what} to {repo_id} (private)"
