"""Write the model card, the page of a published model; its text is `model_card.md`.

It states only numbers that a finished run wrote down or that are computed here from held-out
probabilities.
"""

import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from src.utils.battles.download import SETS
from src.utils.battles.style import measure_style, slice_battles, style_differences
from src.utils.config import FinetuneConfig, name_model
from src.utils.models.template import INSTRUCTION, TURN_TEXT
from src.utils.schema import list_votes
from src.utils.stats.plots import with_interval
from src.utils.stats.scores import compare_leanings, compare_models, compare_slices, row_losses

_CARD = Path(__file__).with_name("model_card.md")
_LICENCES = {
    "answerdotai/ModernBERT-base": "apache-2.0",
    "Qwen/Qwen3-4B-Instruct-2507": "apache-2.0",
}
_FEWEST = 30  # battles of a slice that is shown
_LEANINGS = {
    "n_chars": "the longer answer",
    "n_list_items": "more list items",
    "is_refusal": "the refusal",
}


def measure_facts(
    members: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    chosen: str,
    pairs: pd.DataFrame,
    prior: np.ndarray,
    truth: np.ndarray | None = None,
    n_boot: int = 1000,
) -> dict[str, Any]:
    """Measure what the card says about held-out battles.

    Args:
        members: notebook -> (N, C) float, held-out probabilities of the same N battles.
        names: notebook -> what it is called for people.
        chosen: the notebook that is published.
        pairs: the N battles, with label and group.
        prior: (N, C) float, class shares of the other folds.
        truth: (N, C) float, true probabilities of a simulation.
        n_boot: bootstrap samples of each interval.

    Returns:
        n_pairs; ladder, slices and leanings, each a list of rows; oracle (nats, or None).
    """
    rows, labels = list_votes(pairs)
    groups = pairs["group"].to_numpy()[rows]
    models = {"class prior": prior} | {names[name]: probs for name, probs in members.items()}
    models = {name: probs[rows] for name, probs in models.items()}
    ladder = compare_models(models, labels, groups, "class prior", n_boot)
    ladder["name"] = ladder["model"].where(
        ladder["model"] != names[chosen], f"**{names[chosen]}: this model**"
    )
    bounds = zip(ladder["log_loss"], ladder["low"], ladder["high"], strict=True)
    ladder["loss"] = [with_interval(loss, low, high, "{:.4f}") for loss, low, high in bounds]
    losses = {name: row_losses(probs, labels) for name, probs in models.items()}
    counts = measure_style(pairs)
    parts = {name: mask[rows] for name, mask in slice_battles(counts).items()}
    parts = {name: mask for name, mask in parts.items() if _FEWEST <= mask.sum() < len(rows)}
    published = models[names[chosen]]
    references = {"class_prior": losses["class prior"]}
    slices = compare_slices(losses[names[chosen]], references, parts, groups, n_boot)
    differences, columns = style_differences(counts)
    sides = {text: differences[rows, columns.index(name)] for name, text in _LEANINGS.items()}
    leanings = compare_leanings(published, labels, sides, groups, n_boot)
    return {
        "n_pairs": len(pairs),
        "ladder": ladder.to_dict("records"),
        "slices": slices.to_dict("records"),
        "leanings": _list_leanings(leanings),
        "oracle": None if truth is None else float(row_losses(truth[rows], labels).mean()),
    }


def _list_leanings(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """Put people and model side by side: leaning, people, model, each with its interval."""
    table = table.dropna(subset="share")
    bounds = zip(table["share"], table["low"], table["high"], strict=True)
    cells = [with_interval(share, low, high, "{:.1%}") for share, low, high in bounds]
    table = table.assign(cell=cells)
    wide = table.pivot(index="leaning", columns="voter", values="cell")
    return wide.loc[table["leaning"].unique()].reset_index().to_dict("records")


def summarise_check(check: Mapping[str, Any] | None) -> str:
    """Say in sentences what `publish.check_card` found."""
    if check is None:
        return "A head on a frozen base needs the suite to load: no stranger can run its card."
    largest = "–" if check["within"] is None else f"{check['within']:.1e}"
    text = (
        f"On {check['n_within']} battles within the token budget the card's code, run in a fresh "
        f"process without the suite, gave the suite's probabilities to {largest} "
        f"(allowed {check['tolerance']:.0e})."
    )
    if check["n_cut"]:
        text += (
            f" On {check['n_cut']} longer ones, where the suite marks what it cuts and drops older "
            f"turns first, a probability differed by {check['cut_mean']:.2f} in the mean and "
            f"{check['cut']:.2f} at most."
        )
    return text


def make_card(
    config: FinetuneConfig,
    metrics: Mapping[str, Any],
    parity: Mapping[str, Any],
    facts: Mapping[str, Any],
    repo_id: str,
    is_demo: bool,
    check: Mapping[str, Any] | None = None,
    dataset: str = "",
    code_url: str = "",
    seconds: float = 0.0,
) -> ModelCard:
    """Write the model card, front matter included, from what the run measured.

    Args:
        config: settings of the published model.
        metrics: its `metrics.json`.
        parity: from `publish_model`.
        facts: from `measure_facts`, and `why`, the sentence of `choose_member`.
        repo_id: "owner/name" on the hub; "" leaves a placeholder.
        is_demo: whether the battles are simulated.
        check: from `check_card`, if the code of the card has been run.
        dataset: the set of `battles.download` that was trained on; "" names none.
        code_url: where the suite's code is.
        seconds: of training.
    """
    model_name = repo_id.split("/")[-1] or "preference-model"
    data = SETS[dataset] if dataset and not is_demo else None
    licence = "mit" if config.is_tiny else _LICENCES.get(config.checkpoint, "other")
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type="simulated" if is_demo else (data.hub if data and data.hub else "battles"),
            dataset_name=f"{'demo arena' if is_demo else dataset or 'battles'}, held-out battles",
            metric_type=name,
            metric_value=round(metrics[name], 4),
            metric_name=text,
        )
        for name, text in (("log_loss", "log loss, nats per battle"), ("accuracy", "accuracy"))
    ]
    front = ModelCardData(
        model_name=model_name,
        license=licence,
        license_link=None if licence != "other" else f"https://huggingface.co/{config.checkpoint}",
        language=None if is_demo else "en",
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["human-preferences", "llm-evaluation", "reward-model"],
        base_model=None if config.has_own_base else config.checkpoint,
        base_model_relation=None if config.has_own_base else "finetune",
        datasets=[data.hub] if data and data.hub else None,
        eval_results=results,
    )
    is_decoder = bool(parity["is_decoder"])
    trained = {"all": "every weight", "lora": f"LoRA of rank {config.lora_rank} and the head"}
    hours = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    return ModelCard.from_template(
        front,
        str(_CARD),
        model_name=model_name,
        base_name=name_model(config.checkpoint),
        repo_id=repo_id or "OWNER/NAME",
        config=config,
        metrics=metrics,
        parity=parity,
        facts=facts,
        check=check,
        checked=summarise_check(check) if check else "",
        is_demo=is_demo,
        is_decoder=is_decoder,
        is_head=config.train == "head",
        trained=trained.get(config.train, "a head on states of the frozen base"),
        data=data,
        licence=licence,
        n_models=len(config.folds) * config.n_seeds,
        hours=hours,
        code_url=code_url,
        turn_text=json.dumps(TURN_TEXT),
        turn_pattern=re.escape(TURN_TEXT).replace("\\\n", "\\n").replace("\\ ", " "),
        template=repr(INSTRUCTION if is_decoder else parity["template"]),
    )


def fold_source(card: ModelCard) -> str:
    """Show the source of a card, front matter included, behind a click: HTML."""
    return f"<details><summary>Source</summary><pre>{escape(str(card))}</pre></details>"


def render_card(card: ModelCard) -> str:
    """Render a card as a page, much as the hub shows it: HTML, with some front matter on top."""
    from nbconvert.filters.markdown import markdown2html

    front = card.data.to_dict()
    tags = [front[name] for name in ("license", "pipeline_tag", "library_name")] + front["tags"]
    chips = " ".join(f"<span>{escape(str(tag))}</span>" for tag in tags)
    return _PAGE.format(
        title=escape(front["model-index"][0]["name"]), chips=chips, body=markdown2html(card.text)
    )


_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 820px; margin: 24px auto; padding: 0 16px;
  color: #1f2937; overflow-wrap: anywhere }}
nav span {{ border: 1px solid #d1d5db; border-radius: 9px; padding: 1px 9px; font-size: 13px;
  margin-right: 4px; display: inline-block }}
.anchor-link {{ display: none }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ border: 1px solid #e5e7eb; padding: 4px 10px; text-align: left }}
pre {{ background: #f3f4f6; padding: 12px; overflow-x: auto; font-size: 13px; border-radius: 6px }}
blockquote {{ border-left: 4px solid #d97706; margin: 12px 0; padding: 2px 14px;
  background: #fffbeb }}
</style></head><body><nav>{chips}</nav>{body}</body></html>
"""
