"""Compare ways to serve an encoder on a CPU: torch in 32 bit and bf16, onnxruntime in 32 and 8 bit.

    python -m benchmarks.serving --encoder path/to/encoder

The encoder is a folder with config.json, weights and tokenizer, e.g. MiniLM-L6.
Each way reads the same batches of the same battles in a process of its own: battles per CPU
second (the fastest of some passes), memory, and the log loss of the votes. The head is a logistic
regression on the encoder's states, fitted to other battles, so that probabilities spread as those
of a trained model do. The CPU baseline is split into counting features and the models that could
be exported. onnxruntime's ways need `pip install onnx onnxruntime onnxscript`, which the suite
does not; without them they are left out. Writes `benchmarks/results/serving.json`.
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.training import ROOT, describe_device, read_battles, run_alone
from src.utils.battles.readers import add_groups_and_folds
from src.utils.config import BaselineConfig
from src.utils.models.baseline import fit_ensemble, measure_features
from src.utils.models.batches import collate, make_batches
from src.utils.models.hardware import cpu_has_bf16
from src.utils.models.template import encode_pairs
from src.utils.runs import measure_peak_mib, write_json
from src.utils.schema import LABELS, vote_shares
from src.utils.stats.scores import log_loss

RESULT = ROOT / "benchmarks" / "results" / "serving.json"
MAX_TOKENS = 512  # MiniLM reads no more
TOKENS_PER_BATCH = 1024  # padded
N_PASSES = 3
Batches = list[dict[str, torch.Tensor]]


def write_encoder(encoder: Path, rows: list[list[int]], labels: np.ndarray, folder: Path) -> None:
    """Write a classifier whose head is fitted to the states of a frozen encoder."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=len(LABELS), dtype=torch.float32
    ).eval()
    states: list[torch.Tensor] = []
    model.classifier.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    with torch.inference_mode():
        for row in rows:
            model(**collate([row], tokenizer.pad_token_id))
    head = LogisticRegression(C=1.0, max_iter=2000).fit(torch.cat(states).numpy(), labels)
    model.classifier.weight.data = torch.from_numpy(head.coef_).float()
    model.classifier.bias.data = torch.from_numpy(head.intercept_).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def export(folder: Path, batch: dict[str, torch.Tensor]) -> None:
    """Write `model.onnx` and, with matrices in 8 bit, `int8.onnx` beside a classifier's weights."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    shapes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in batch}
    path = folder / "model.onnx"
    torch.onnx.export(
        model, kwargs=batch, f=path, dynamo=True, dynamic_shapes=shapes, external_data=False
    )
    quantize_dynamic(path, folder / "int8.onnx", weight_type=QuantType.QInt8, per_channel=True)


def load_torch(folder: Path, dtype: torch.dtype) -> Callable:
    """Return a function: batch -> logits, by torch under autocast as the suite does."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    def read(batch: dict[str, torch.Tensor]) -> np.ndarray:
        is_half = dtype != torch.float32
        with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=is_half):
            return model(**batch).logits.float().numpy()

    return read


def load_onnx(path: Path) -> Callable:
    """Return the same by onnxruntime, on as many threads as torch would take."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {k: v.numpy() for k, v in batch.items()})[0]


WAYS: dict[str, Callable[[Path], Callable]] = {
    "torch fp32": lambda folder: load_torch(folder, torch.float32),
    "torch bf16": lambda folder: load_torch(folder, torch.bfloat16),
    "onnxruntime fp32": lambda folder: load_onnx(folder / "model.onnx"),
    "onnxruntime int8": lambda folder: load_onnx(folder / "int8.onnx"),
}


def measure(way: str, folder: Path, batches: Batches) -> dict[str, Any]:
    """Time one way, after a first batch that is not counted."""
    read = WAYS[way](folder)
    read(batches[0])
    seconds = []
    for _ in range(N_PASSES):
        start = time.process_time()  # other processes stretch it less than the clock
        logits = np.concatenate([read(batch) for batch in batches])
        seconds.append(time.process_time() - start)
    return {
        "battles_per_cpu_second": len(logits) / min(seconds),
        "peak_mib": measure_peak_mib(),
        "logits": logits,
    }


def split_baseline(n_battles: int) -> dict[str, float]:
    """Time the CPU baseline's two parts: CPU seconds of its features, and of its models."""
    pairs = add_groups_and_folds(read_battles(n_battles)[0])
    config = BaselineConfig(n_trees=50)
    start = time.process_time()
    features = measure_features(pairs, config)
    counted = time.process_time()
    ensemble = fit_ensemble(features, vote_shares(pairs), config)
    fitted = time.process_time()
    ensemble.predict(features)
    return {"features": counted - start, "models": time.process_time() - fitted}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", type=Path, help="a BERT with its tokenizer, e.g. MiniLM-L6")
    parser.add_argument(
        "--rows", type=int, default=0, help="another number makes a trial that is not recorded"
    )
    options = parser.parse_args()
    if options.encoder is None:
        print("serving: left out, as no --encoder was given (any folder with a BERT, see --help)")
        return
    n_rows = options.rows or 200
    pairs, source = read_battles(3 * n_rows)
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    rows = encode_pairs(pairs, tokenizer, MAX_TOKENS)
    labels = pairs["label"].to_numpy()
    order = make_batches([len(row) for row in rows[:n_rows]], TOKENS_PER_BATCH)
    batches = [collate([rows[i] for i in batch], tokenizer.pad_token_id) for batch in order]
    ways = [way for way in WAYS if way != "torch bf16" or cpu_has_bf16()]
    if importlib.util.find_spec("onnxruntime") is None:
        print("onnxruntime is not installed: only torch is measured")
        ways = [way for way in ways if "onnx" not in way]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_encoder(options.encoder, rows[n_rows:], labels[n_rows:], folder)
        if any("onnx" in way for way in ways):
            run_alone("cpu", export, folder, batches[0])
        found = {way: run_alone("cpu", measure, way, folder, batches) for way in ways}
        sizes = {path.name: path.stat().st_size / 2**20 for path in folder.glob("*[xs]")}
    votes = labels[np.concatenate(order)]
    first = found["torch fp32"]
    for way, row in found.items():
        logits = torch.from_numpy(row.pop("logits")).double()
        row["log_loss"] = log_loss(torch.softmax(logits, dim=1).numpy(), votes)
        row["speed"] = row["battles_per_cpu_second"] / first["battles_per_cpu_second"]
        print(
            f"{way:18} {row['battles_per_cpu_second']:7.2f} battles per CPU second "
            f"({row['speed']:.2f} times torch fp32), {row['peak_mib']:5.0f} MiB, "
            f"log loss {row['log_loss']:.4f} ({row['log_loss'] - first['log_loss']:+.4f})"
        )
    baseline = split_baseline(3 * n_rows)
    share = baseline["models"] / sum(baseline.values())
    print(f"CPU baseline: {share:.1%} of its time is in models that could be exported")
    if not options.rows:
        result = {
            "command": "python -m benchmarks.serving --encoder path/to/encoder",
            **describe_device(384),
            "model": options.encoder.name,
            "battles": source,
            "n_pairs": n_rows,
            "max_tokens": MAX_TOKENS,
            "tokens_per_batch": TOKENS_PER_BATCH,
            "ways": found,
            "mib_on_disk": sizes,
            "baseline_cpu_seconds": baseline,
        }
        write_json(RESULT, result)


if __name__ == "__main__":
    main()
