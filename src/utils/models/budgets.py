"""What a token budget costs: how many battles it cuts, and what a trained model loses by it."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import nn

from src.utils.models.batches import count_tokens
from src.utils.models.predict import predict_probs
from src.utils.stats.scores import bootstrap_interval, row_losses

BUDGETS = (128, 256, 512, 1024, 2048, 3072, 4096)
BUDGET_COLUMNS = ("budget", "cut_share", "log_loss", "cost", "low", "high")


def measure_budgets(
    model: nn.Module,
    tokenizer,
    pairs: pd.DataFrame,
    *,
    max_tokens: int,
    tokens_per_batch: int,
    budgets: Sequence[int] = BUDGETS,
    n_pairs: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Let a trained model read held-out battles at smaller budgets, and score it at each.

    A battle is read again only at the budgets that cut it further.

    Args:
        model: and `tokenizer`: from `load_finetuned`.
        pairs: battles that it has not seen, with label and group.
        max_tokens: budget that the model predicts with, against which the cost is counted.
        tokens_per_batch: padded tokens of one forward pass at most.
        budgets: tokens of one battle; above `max_tokens` only the share that is cut is told.
        n_pairs: battles at most, drawn at random.
        seed: of the draw.

    Returns:
        One row a budget, `max_tokens` among them: cut_share, log_loss in nats per battle, cost (log loss
        above that at `max_tokens`) with its 95 % interval low to high. NaN above `max_tokens`.
    """
    pairs = pairs.sample(min(n_pairs, len(pairs)), random_state=seed).reset_index(drop=True)
    n_tok, labels = count_tokens(pairs, tokenizer), pairs["label"].to_numpy()
    budgets = sorted({*budgets, max_tokens})
    table = pd.DataFrame({"budget": budgets, "cut_share": [float((n_tok > budget).mean()) for budget in budgets]})
    options = {"tokens_per_batch": tokens_per_batch, "swap": True}
    whole = row_losses(predict_probs(model, tokenizer, pairs, max_tokens=max_tokens, **options), labels)
    for row, budget in enumerate(budgets[: budgets.index(max_tokens) + 1]):
        losses, is_cut = whole.copy(), n_tok > budget
        if budget < max_tokens and is_cut.any():
            probs = predict_probs(model, tokenizer, pairs[is_cut], max_tokens=budget, **options)
            losses[is_cut] = row_losses(probs, labels[is_cut])
        low, high = bootstrap_interval(losses - whole, pairs["group"].to_numpy(), seed=seed)
        table.loc[row, ["log_loss", "cost", "low", "high"]] = losses.mean(), (losses - whole).mean(), low, high
    return table[list(BUDGET_COLUMNS)].astype({"budget": np.int64})
