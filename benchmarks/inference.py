"""Compare three ways over the same battles with the same model: ours, one row at a time, and Trainer.predict.

    python benchmarks/inference.py

The model has the architecture of ModernBERT and random weights, small on a CPU and of the
base's shape on a GPU. Battles are real where `../shared/data` is at hand, else demo ones
with log-normal lengths. Each way reads each battle once, from text to probabilities, in a
process of its own. Writes `benchmarks/results/inference.json`.
"""

import argparse
import multiprocessing
import platform
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from src.utils.artifacts import Stopwatch, measure_peak_mib, measure_versions, write_json
from src.utils.batches import collate, encode_pairs, make_batches
from src.utils.config import FinetuneConfig
from src.utils.data import load_pairs
from src.utils.demo import make_battles
from src.utils.hardware import choose_device, choose_dtype
from src.utils.models import quiet_transformers
from src.utils.predict import predict_probs
from src.utils.tiny import prepare_base

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "inference.json"
REAL = ROOT.parent / "shared" / "data" / "arena_sample.csv"
MAX_TOKENS, TOKENS_PER_BATCH = 2048, 16384  # those of notebook 03
N_TEST = 25_000
SMALL = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4}
BASE = {"hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22, "num_attention_heads": 12}
SEED = 20240501


def read_battles(n_pairs: int) -> tuple[pd.DataFrame, str]:
    """Battles in file order, and where they come from."""
    if REAL.exists():
        pairs = load_pairs(REAL)[0]
        return pd.concat([pairs] * -(-n_pairs // len(pairs)), ignore_index=True)[:n_pairs], "real"
    pairs, rng = make_battles(n_pairs, seed=SEED)[0], np.random.default_rng(SEED)
    for name in ("response_a", "response_b"):
        repeats = np.exp(rng.normal(1.0, 0.9, n_pairs)).astype(int) + 1
        pairs[name] = [(" ".join([turns[0] or ""] * n),) for turns, n in zip(pairs[name], repeats, strict=True)]
    return pairs, "demo"


def load_model(folder: Path) -> tuple[nn.Module, object]:
    """The model that every way reads with."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = choose_device()
    torch.manual_seed(SEED)
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        num_labels=3,
        pad_token_id=tokenizer.pad_token_id,
        **(BASE if device.type == "cuda" else SMALL),
    )
    return ModernBertForSequenceClassification(config).eval().to(device), tokenizer


def read_ours(model: nn.Module, tokenizer, pairs: pd.DataFrame) -> tuple[np.ndarray, float]:
    """Sorted by length, batched under a budget of tokens."""
    probs = predict_probs(model, tokenizer, pairs, max_tokens=MAX_TOKENS, tokens_per_batch=TOKENS_PER_BATCH, swap=False)
    lengths = np.array([len(row) for row in encode_pairs(pairs, tokenizer, MAX_TOKENS)])
    return probs, _padding_share(lengths, make_batches(lengths, TOKENS_PER_BATCH))


def read_one_by_one(model: nn.Module, tokenizer, pairs: pd.DataFrame) -> tuple[np.ndarray, float]:
    """One row at a time, in file order."""
    device = choose_device()
    dtype, logits = choose_dtype(device), []
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        for row in encode_pairs(pairs, tokenizer, MAX_TOKENS):
            batch = {name: tensor.to(device) for name, tensor in collate([row], tokenizer.pad_token_id).items()}
            logits.append(model(**batch).logits.double().cpu())
    return torch.softmax(torch.cat(logits), dim=1).numpy(), 0.0


def read_with_trainer(model: nn.Module, tokenizer, pairs: pd.DataFrame) -> tuple[np.ndarray, float]:
    """Trainer.predict as it comes: eight rows in file order, padded to the longest."""
    rows = encode_pairs(pairs, tokenizer, MAX_TOKENS)
    dtype = choose_dtype(choose_device())
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            report_to=[],
            disable_tqdm=True,
            use_cpu=choose_device().type == "cpu",
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
        )
        trainer = Trainer(model, arguments, data_collator=DataCollatorWithPadding(tokenizer))
        logits = trainer.predict([{"input_ids": row} for row in rows]).predictions
    n_rows = arguments.per_device_eval_batch_size
    lengths = np.array([len(row) for row in rows])
    batches = np.split(np.arange(len(rows)), np.arange(n_rows, len(rows), n_rows))
    return torch.softmax(torch.from_numpy(np.asarray(logits)).double(), dim=1).numpy(), _padding_share(lengths, batches)


def _padding_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - float(lengths.sum()) / padded


WAYS: dict[str, Callable] = {
    "ours": read_ours,
    "one row at a time": read_one_by_one,
    "Trainer.predict": read_with_trainer,
}


def measure(way: str, folder: Path, pairs: pd.DataFrame) -> dict:
    """Time one way; the model has read a few rows before, which is not timed."""
    with quiet_transformers():
        model, tokenizer = load_model(folder)
        WAYS[way](model, tokenizer, pairs[:16])
        watch = Stopwatch()
        probs, padding_share = WAYS[way](model, tokenizer, pairs)
        seconds = watch.seconds
    return {
        "seconds": seconds,
        "rows_per_second": len(pairs) / seconds,
        "padding_share": padding_share,
        "peak_mib": measure_peak_mib(),
        "probs": probs,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = choose_device().type == "cuda"
    parser.add_argument("--rows", type=int, default=2000 if on_gpu else 300)
    options = parser.parse_args()
    pairs, source = read_battles(options.rows)
    with tempfile.TemporaryDirectory() as folder:
        tiny = FinetuneConfig(checkpoint="tiny:modernbert", revision="")
        base = prepare_base(tiny, pairs, Path(folder) / "base", n_lessons=0)
        ways = {}
        for way in WAYS:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
                ways[way] = executor.submit(measure, way, base, pairs).result()
    ours = ways["ours"].pop("probs")
    for way, row in ways.items():
        row["largest_difference"] = float(np.abs(row.pop("probs", ours) - ours).max())
        row["speed_of_ours"] = ways["ours"]["rows_per_second"] / row["rows_per_second"]
        print(
            f"{way:18} {row['rows_per_second']:8.1f} rows/s   padding {row['padding_share']:5.1%}   "
            f"{row['peak_mib']:6.0f} MiB   ours is {row['speed_of_ours']:.2f} times as fast"
        )
    machine = f"{platform.system()} {platform.machine()}, " + (
        torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    )
    result = {
        "machine": machine,
        "dtype": str(choose_dtype(choose_device())).removeprefix("torch."),
        "model": "ModernBERT, random weights, " + ", ".join(f"{k} {v}" for k, v in (BASE if on_gpu else SMALL).items()),
        "battles": source,
        "n_pairs": len(pairs),
        "max_tokens": MAX_TOKENS,
        "tokens_per_batch": TOKENS_PER_BATCH,
        "ways": ways,
        "versions": measure_versions(),
    }
    if on_gpu:
        hours = 2 * N_TEST / ways["ours"]["rows_per_second"] / 3600
        result["projected_hours_for_25000_rows_in_both_orders_on_one_such_gpu"] = hours
        print(f"projection, not measured: {N_TEST:,} rows in both orders take {hours:.2f} h on one such GPU")
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
