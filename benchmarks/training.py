"""Train one model on the same rows in four ways: ours, Trainer's default, 4 or 1 rows at a time.

    python -m benchmarks.training

Rows have the lengths of real battles under real tokenizers (`ARENA_REAL_DATA`), else of
demo battles with log-normal lengths. Models have real shapes and random weights: always a
ModernBERT of 6 x 384 on the CPU; on a GPU also ModernBERT-base and Qwen3-4B (NF4, LoRA). Each way
runs in a process of its own and in the same precision, reads every row once, forward and backward,
and takes an optimizer step after at least eight rows. Writes `benchmarks/results/training.json`,
which keeps what was measured on other devices, and two figures `assets/training_*.png`.
"""

import argparse
import dataclasses
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from src.utils.battles.demo import make_battles
from src.utils.battles.readers import load_pairs
from src.utils.config import DecoderConfig, FinetuneConfig
from src.utils.models.bases import prepare_base
from src.utils.models.batches import collate, make_batches, make_packs
from src.utils.models.checkpoints import load_classifier
from src.utils.models.hardware import choose_device, choose_dtype
from src.utils.models.packing import can_pack, collate_packed, enable_packing
from src.utils.models.template import encode_pairs
from src.utils.paths import REAL_DATA
from src.utils.runs import Stopwatch, measure_peak_mib, measure_versions, read_json, write_json
from src.utils.schema import LABELS
from src.utils.stats.plots import ACCENT, MUTED, use_style

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "training.json"
REAL = [REAL_DATA / f"arena_{name}.csv" for name in ("sample", "extra")]
MAX_TOKENS = 2048  # of one row, as in notebook 03
ROWS_PER_STEP = 8  # of the optimizer, at least: the same for all ways
N_WARMUP = 1  # batches before the clock starts
WAYS = {"ours": 0, "Trainer's default": 8, "4 at a time": 4, "1 at a time": 1}  # rows; 0: by tokens
# Rows per second of ours over theirs, on a CPU.
TARGETS = {"Trainer's default": 5.0, "4 at a time": 1.4, "1 at a time": 1.4}
SEED = 20240501


@dataclass(frozen=True)
class Setup:
    """A model's shape, and what it is trained on.

    Args:
        shape: of the model.
        config: how it is loaded and trained; `tokens_per_batch` is the budget of our way.
        n_rows: to train on.
    """

    shape: PreTrainedConfig
    config: FinetuneConfig
    n_rows: int


ROPE = {"rope_type": "default", "rope_theta": 160_000.0}
BASE = {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}
BASE |= {"classifier_pooling": "mean"}  # as the real checkpoint
SMALL = {"hidden_size": 384, "intermediate_size": 576}
SMALL |= {"num_hidden_layers": 6, "num_attention_heads": 6}
QWEN = {"vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728, "head_dim": 128}
QWEN |= {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
GPU_TOKENS = 16_384  # of one pass
SETUPS = {
    "small": Setup(ModernBertConfig(**SMALL, **BASE), FinetuneConfig(tokens_per_batch=8192), 128),
    "base": Setup(ModernBertConfig(**BASE), FinetuneConfig(tokens_per_batch=GPU_TOKENS), 800),
    "qwen3-4b": Setup(
        Qwen3Config(**QWEN, tie_word_embeddings=True),
        DecoderConfig(tokens_per_batch=GPU_TOKENS),
        160,
    ),
}
TITLES = {
    "small": "ModernBERT, 6 layers × 384",
    "base": "ModernBERT-base",
    "qwen3-4b": "Qwen3-4B, NF4 + LoRA",
}


def read_battles(n_pairs: int, seed: int = SEED) -> tuple[pd.DataFrame, str]:
    """Draw battles: "real" ones where the files exist, repeated as needed, else "demo" ones."""
    rng = np.random.default_rng(seed)
    if all(path.exists() for path in REAL):
        real = load_pairs(REAL)[0]
        n_passes = -(-n_pairs // len(real))
        order = np.concatenate([rng.permutation(len(real)) for _ in range(n_passes)])
        return real.iloc[order[:n_pairs]].reset_index(drop=True), "real"
    pairs = make_battles(n_pairs, seed=seed)[0]
    for name in ("response_a", "response_b"):
        repeats = np.exp(rng.normal(1.0, 0.9, n_pairs)).astype(int) + 1
        texts = zip(pairs[name], repeats, strict=True)
        pairs[name] = [(" ".join([turns[0] or ""] * n),) for turns, n in texts]
    return pairs, "demo"


def read_tokenizer(
    kind: str, pairs: pd.DataFrame, folder: Path
) -> tuple[PreTrainedTokenizerFast, str]:
    """The real tokenizer of a kind of model where it exists, else one learned from the battles."""
    real = REAL_DATA / "tokenizers" / {"modernbert": "olmo_bpe", "qwen3": "qwen2_5"}[kind]
    if not real.exists():
        tiny = FinetuneConfig(checkpoint=f"tiny:{kind}", revision="")
        base = prepare_base(tiny, pairs, folder, n_steps=0)
        return AutoTokenizer.from_pretrained(base), "learned from the battles"
    if kind == "qwen3":
        return AutoTokenizer.from_pretrained(real), real.name
    names = ("cls", "sep", "pad", "unk", "mask")
    special = {f"{name}_token": f"[{name.upper()}]" for name in names}
    file = str(real / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, **special), real.name


def write_checkpoint(setup: Setup, tokenizer, folder: Path) -> Path:
    """Write a model with random weights, and its tokenizer, for `load_classifier`."""
    shape = setup.shape
    shape.pad_token_id, shape.num_labels = tokenizer.pad_token_id, len(LABELS)
    torch.manual_seed(SEED)
    with choose_device():
        dtype = torch.bfloat16 if setup.config.is_frozen else torch.float32
        AutoModelForSequenceClassification.from_config(shape, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plan(
    lengths: np.ndarray, n_rows: int, tokens_per_batch: int, is_packed: bool = False
) -> list[np.ndarray]:
    """Rows of each batch: up to a budget of tokens if `n_rows` is 0, else `n_rows` at random."""
    if not n_rows:
        return (make_packs if is_packed else make_batches)(lengths, tokens_per_batch, SEED)
    order = np.random.default_rng(SEED).permutation(len(lengths))
    return np.split(order, np.arange(n_rows, len(order), n_rows))


def padding_share(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """Share of the tokens of padded batches that are padding."""
    n_padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - float(lengths.sum()) / n_padded


def run_alone(device: str, act: Callable, *args: object):
    """Run in a process of its own, which sees no GPU when `device` is "cpu"."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, mp_context=context, initializer=_hide_gpus, initargs=(device == "cpu",)
    ) as executor:
        return executor.submit(act, *args).result()


def _hide_gpus(is_hidden: bool) -> None:
    if is_hidden:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def prepare(setup: Setup, tokenizer, folder: Path) -> tuple[Path, dict[str, object]]:
    """Write the model; returns its folder and the device."""
    base = write_checkpoint(setup, tokenizer, folder)
    return base, describe_device(setup.shape.hidden_size)


class Loop:
    """A model, how its rows are collated, and its optimizer."""

    def __init__(self, folder: Path, config: FinetuneConfig, is_ours: bool) -> None:
        if not is_ours:
            config = dataclasses.replace(config, gradient_checkpointing=False)
        self.model, tokenizer = load_classifier(config, folder)
        self.is_packed = is_ours and can_pack(self.model)
        if self.is_packed:
            enable_packing(self.model)
        self.pad_id = tokenizer.pad_token_id
        self.device = choose_device()
        self.dtype = choose_dtype(self.device, self.model.config.hidden_size)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.model.train()

    def train(self, batches: Sequence[Sequence[Sequence[int]]]) -> None:
        """Train on batches of rows, with a step every `ROWS_PER_STEP` rows."""
        n_rows = 0
        for batch in batches:
            inputs = {name: tensor.to(self.device) for name, tensor in self._collate(batch).items()}
            targets = torch.arange(len(batch), device=self.device) % len(LABELS)
            is_mixed = self.dtype != torch.float32
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=is_mixed):
                logits = self.model(**inputs).logits
            loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
            self.scaler.scale(loss / ROWS_PER_STEP).backward()
            n_rows += len(batch)
            if n_rows >= ROWS_PER_STEP or batch is batches[-1]:
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
                n_rows = 0
        loss.item()  # waits for the device

    def _collate(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        return collate_packed(rows) if self.is_packed else collate(rows, self.pad_id)


def measure(
    way: str, folder: Path, config: FinetuneConfig, rows: list[list[int]]
) -> dict[str, float | None]:
    """Train in one way, timed after a warm-up."""
    lengths = np.array([len(row) for row in rows])
    loop = Loop(folder, config, way == "ours")
    batches = plan(lengths, WAYS[way], config.tokens_per_batch, loop.is_packed)
    if loop.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seen = [[rows[row] for row in batch] for batch in batches]
    seconds = cpu_seconds = peak_mib = None
    try:
        loop.train(seen[:N_WARMUP])
        watch = Stopwatch()
        before_s = time.process_time()
        loop.train(seen)
        seconds = watch.seconds
        cpu_seconds = time.process_time() - before_s
        peak_mib = measure_peak_mib()
    except torch.OutOfMemoryError:
        pass  # reported as None
    loop.optimizer.zero_grad()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # of all threads: other processes stretch it less
        "rows_per_second": seconds and len(rows) / seconds,
        "tokens_per_second": seconds and float(lengths.sum()) / seconds,
        "padding_share": 0.0 if loop.is_packed else padding_share(lengths, batches),
        "peak_mib": peak_mib,
    }


def run(name: str, device: str, n_rows: int) -> dict[str, object]:
    """Measure every way with one model."""
    setup = SETUPS[name]
    pairs, source = read_battles(n_rows)
    with tempfile.TemporaryDirectory() as folder:
        kind = setup.shape.model_type
        tokenizer, origin = read_tokenizer(kind, pairs, Path(folder) / "tokenizer")
        rows = encode_pairs(pairs, tokenizer, MAX_TOKENS)
        base, described = run_alone(device, prepare, setup, tokenizer, Path(folder) / "base")
        ways = {way: run_alone(device, measure, way, base, setup.config, rows) for way in WAYS}
    lengths = np.array([len(row) for row in rows])
    for row in ways.values():
        is_compared = row["seconds"] and ways["ours"]["seconds"]
        row["speed_of_ours"] = row["seconds"] / ways["ours"]["seconds"] if is_compared else None
    return {
        **described,
        "tokens_per_batch_of_ours": setup.config.tokens_per_batch,
        "rows": {
            "n": n_rows,
            "from": source,
            "tokenizer": origin,
            "mean_tok": float(lengths.mean()),
            "median_tok": float(np.median(lengths)),
            "longest_tok": int(lengths.max()),
            "max_tok": MAX_TOKENS,
        },
        "ways": ways,
    }


def describe_device(hidden_size: int) -> dict[str, object]:
    """Where a model of this width is trained here, and in which precision."""
    device = choose_device()
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(choose_dtype(device, hidden_size)).removeprefix("torch."),
        "versions": measure_versions(),
    }


def plot_ways(ax: Axes, ways: dict[str, dict], name: str) -> Axes:
    """Show one number of every way, ours first; a way that ran out of memory has no bar."""
    values = [row[name] for row in ways.values()]
    colors = [ACCENT] + [MUTED] * (len(ways) - 1)
    bars = ax.barh(list(ways), [value or 0 for value in values], color=colors)
    labels = [_describe(value, values[0], name) for value in values]
    ax.bar_label(bars, labels, padding=4)
    ax.invert_yaxis()
    ax.margins(x=0.35)
    ax.grid(axis="y", visible=False)
    return ax


def _describe(value: float | None, ours: float | None, name: str) -> str:
    if value is None:
        return "out of memory"
    text = f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
    if ours is None or value == ours:
        return text
    ratio = f"{ours / value:.1f}×" if name == "rows_per_second" else f"{ours / value:.0%}"
    return f"{text}  (ours: {ratio})"


def draw(runs: dict[str, dict], folder: Path) -> None:
    """Draw speed and memory of every run."""
    use_style()
    size = (9, 2.9 * len(runs))
    for name, label, file in (
        ("rows_per_second", "battles trained on per second", "training_throughput.png"),
        ("peak_mib", "peak memory, MiB", "training_memory.png"),
    ):
        fig, axes = plt.subplots(len(runs), figsize=size, squeeze=False, layout="constrained")
        for ax, (title, result) in zip(axes[:, 0], runs.items(), strict=True):
            plot_ways(ax, result["ways"], name)
            ax.set(title=f"{title}, {result['dtype']}", xlabel=label)
        fig.savefig(folder / file, dpi=110)
        plt.close(fig)


def choose_runs(name: str) -> list[tuple[str, str]]:
    """Model and device of each run: always the small one on the CPU, the real ones on a GPU."""
    has_gpu = choose_device().type == "cuda"
    if name != "all":
        return [(name, "cuda" if has_gpu and name != "small" else "cpu")]
    return [("small", "cpu")] + ([("base", "cuda"), ("qwen3-4b", "cuda")] if has_gpu else [])


def main() -> None:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=["all", *SETUPS], default="all", help="all: those for this machine")
    add("--rows", type=int, default=0, help="a trial with another number of rows, not recorded")
    options = parser.parse_args()
    runs = {}
    for name, device in choose_runs(options.model):
        title = f"{TITLES[name]} on a {'CPU' if device == 'cpu' else 'GPU'}"
        runs[title] = run(name, device, options.rows or SETUPS[name].n_rows)
        report(title, runs[title])
    if not options.rows:
        runs = (read_json(RESULT)["runs"] if RESULT.exists() else {}) | runs
        command = "python -m benchmarks.training"
        write_json(RESULT, {"command": command, "seed": SEED, "targets": TARGETS, "runs": runs})
        draw(runs, ROOT / "assets")


def report(title: str, result: dict) -> None:
    """Print one run."""
    print(f"{title}: {result['device']}, {result['dtype']}")
    for way, row in result["ways"].items():
        if row["seconds"] is None:
            print(f"  {way:18} out of memory")
            continue
        print(
            f"  {way:18} {row['rows_per_second']:8.2f} rows/s "
            f"{row['tokens_per_second']:9.0f} tokens/s   padding {row['padding_share']:5.1%}   "
            f"{row['peak_mib']:6.0f} MiB   ours is {row['speed_of_ours'] or 0:.2f} times as fast"
        )


if __name__ == "__main__":
    main()
