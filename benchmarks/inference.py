"""Compare three ways to predict: ours, one row at a time, and Trainer.predict.

    python -m benchmarks.inference

All read the same battles with the same model: the architecture of ModernBERT with random
weights, 6 layers x 384 on a CPU, the shape of ModernBERT-base on a GPU. Battles and
tokenizer are real where real battles are found, else demo battles with log-normal lengths.
Each way reads each battle once, from text to probabilities, in a process of its own and in
the same precision. Writes `benchmarks/results/inference.json`.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from benchmarks.training import (
    MAX_TOKENS,
    ROOT,
    SETUPS,
    describe_device,
    padding_share,
    read_battles,
    read_tokenizer,
    run_alone,
    write_checkpoint,
)
from src.utils.config import FinetuneConfig
from src.utils.models.batches import collate, make_batches
from src.utils.models.checkpoints import load_classifier
from src.utils.models.hardware import choose_device, choose_dtype
from src.utils.models.packing import can_pack
from src.utils.models.predict import predict_probs
from src.utils.models.template import encode_pairs
from src.utils.runs import Stopwatch, measure_peak_mib, write_json

RESULT = ROOT / "benchmarks" / "results" / "inference.json"
N_TEST = 25_000  # battles of the competition's hidden test
N_WARMUP = 8  # battles read before the clock starts
CPU_TOKENS_PER_BATCH = 4096  # smaller batches stay in the cache of a CPU
TARGETS = {"Trainer.predict": 5.0, "one row at a time": 1.5}  # rows/s of ours over theirs, CPU


def read_ours(
    model: nn.Module, tokenizer, pairs: pd.DataFrame, tokens_per_batch: int
) -> tuple[np.ndarray, float]:
    """Sorted by length under a budget of tokens, and packed where the architecture allows it."""
    probs = predict_probs(
        model,
        tokenizer,
        pairs,
        max_tokens=MAX_TOKENS,
        tokens_per_batch=tokens_per_batch,
        swap=False,
    )
    if can_pack(model):
        return probs, 0.0
    lengths = np.array([len(row) for row in encode_pairs(pairs, tokenizer, MAX_TOKENS)])
    return probs, padding_share(lengths, make_batches(lengths, tokens_per_batch))


def read_one_by_one(
    model: nn.Module, tokenizer, pairs: pd.DataFrame, _: int
) -> tuple[np.ndarray, float]:
    """One row at a time, in file order."""
    device = choose_device()
    dtype = choose_dtype(device, model.config.hidden_size)
    logits = []
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        for row in encode_pairs(pairs, tokenizer, MAX_TOKENS):
            batch = {
                name: tensor.to(device)
                for name, tensor in collate([row], tokenizer.pad_token_id).items()
            }
            logits.append(model(**batch).logits.double().cpu())
    return torch.softmax(torch.cat(logits), dim=1).numpy(), 0.0


def read_with_trainer(
    model: nn.Module, tokenizer, pairs: pd.DataFrame, _: int
) -> tuple[np.ndarray, float]:
    """Trainer.predict with its defaults: eight rows in file order, padded to the longest."""
    rows = encode_pairs(pairs, tokenizer, MAX_TOKENS)
    dtype = choose_dtype(choose_device(), model.config.hidden_size)
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
    probs = torch.softmax(torch.from_numpy(np.asarray(logits)).double(), dim=1).numpy()
    return probs, padding_share(lengths, batches)


WAYS: dict[str, Callable] = {
    "ours": read_ours,
    "one row at a time": read_one_by_one,
    "Trainer.predict": read_with_trainer,
}


def measure(way: str, folder: Path, pairs: pd.DataFrame, config: FinetuneConfig) -> dict:
    """Time one way; the model reads a few rows before the clock starts."""
    model, tokenizer = load_classifier(config, folder)
    model.eval()
    WAYS[way](model, tokenizer, pairs[:N_WARMUP], config.tokens_per_batch)
    watch, before_s = Stopwatch(), time.process_time()
    probs, share = WAYS[way](model, tokenizer, pairs, config.tokens_per_batch)
    seconds, cpu_seconds = watch.seconds, time.process_time() - before_s
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # of all threads: other processes stretch it less
        "rows_per_second": len(pairs) / seconds,
        "padding_share": share,
        "peak_mib": measure_peak_mib(),
        "probs": probs,
    }


def compare(ways: dict[str, dict]) -> None:
    """Replace the probabilities of each way by their distance to ours; add our speed over its."""
    ours = ways["ours"]["probs"]
    for row in ways.values():
        row["largest_difference"] = float(np.abs(row.pop("probs") - ours).max())
        row["speed_of_ours"] = ways["ours"]["rows_per_second"] / row["rows_per_second"]


def project(ways: dict[str, dict], on_gpu: bool) -> dict[str, object]:
    """Project the hours of the competition's hidden test in both orders; needs a GPU."""
    if not on_gpu:
        return {"hours_on_two_gpus": None, "why": "no GPU was measured"}
    hours = 2 * N_TEST / ways["ours"]["rows_per_second"] / 3600
    return {
        "hours_on_two_gpus": hours / 2,
        "why": f"projected from one such GPU, {N_TEST:,} rows in both orders",
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", type=int, default=0, help="another number makes a trial that is not recorded"
    )
    options = parser.parse_args()
    on_gpu = choose_device().type == "cuda"
    setup = SETUPS["base" if on_gpu else "small"]
    config = (
        setup.config
        if on_gpu
        else dataclasses.replace(setup.config, tokens_per_batch=CPU_TOKENS_PER_BATCH)
    )
    n_rows = options.rows or (2000 if on_gpu else 240)
    pairs, source = read_battles(n_rows)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, origin = read_tokenizer("modernbert", pairs, Path(folder) / "tokenizer")
        base = write_checkpoint(setup, tokenizer, Path(folder) / "base")
        device = choose_device().type
        ways = {way: run_alone(device, measure, way, base, pairs, config) for way in WAYS}
    compare(ways)
    for way, row in ways.items():
        print(
            f"{way:18} {row['rows_per_second']:8.2f} rows/s   "
            f"padding {row['padding_share']:5.1%}   {row['peak_mib']:6.0f} MiB   "
            f"ours is {row['speed_of_ours']:.2f} times as fast   "
            f"probabilities within {row['largest_difference']:.0e}"
        )
    projection = project(ways, on_gpu)
    print(f"two such GPUs at the competition's size: {projection}")
    if not options.rows:
        shape = f"{setup.shape.num_hidden_layers} x {setup.shape.hidden_size}"
        result = {
            "command": "python -m benchmarks.inference",
            **describe_device(setup.shape.hidden_size),
            "model": f"ModernBERT, random weights, {shape}",
            "battles": source,
            "tokenizer": origin,
            "n_pairs": n_rows,
            "max_tokens": MAX_TOKENS,
            "tokens_per_batch": config.tokens_per_batch,
            "ways": ways,
            "targets": TARGETS,
            "projection": projection,
        }
        write_json(RESULT, result)


if __name__ == "__main__":
    main()
