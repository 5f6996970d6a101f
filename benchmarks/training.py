"""Train the same model on the same rows in four ways: ours, Trainer's default, and one or four rows at a time.

    python -m benchmarks.training

Rows have the lengths of real battles under real tokenizers where `../shared/data` is at hand,
else those of demo battles with log-normal lengths. Models have real shapes and random
weights: always a ModernBERT of 6 x 384 on the CPU, on a GPU ModernBERT-base and Qwen3-4B
(NF4, LoRA), too. Each way runs in a process of its own and in the same precision, reads every
row once, forward and backward, and makes a step of the optimiser after at least eight rows.
Writes `benchmarks/results/training.json`, where what was measured on other devices stays,
and `assets/training_throughput.png` and `assets/training_memory.png`.
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
from src.utils.models.batches import collate, make_batches, make_packs
from src.utils.models.checkpoints import load_classifier, quiet_transformers
from src.utils.models.hardware import choose_device, choose_dtype
from src.utils.models.packing import can_pack, collate_packed, enable_packing
from src.utils.models.template import encode_pairs
from src.utils.models.tiny import prepare_base
from src.utils.runs import Stopwatch, measure_peak_mib, measure_versions, read_json, write_json
from src.utils.schema import LABELS
from src.utils.stats.plots import ACCENT, MUTED, use_style

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "training.json"
SHARED = ROOT.parent / "shared" / "data"
REAL = [SHARED / f"arena_{name}.csv" for name in ("sample", "extra")]
MAX_TOKENS = 2048  # of one row, as in notebook 03
ROWS_PER_STEP = 8  # of the optimiser, at least: alike for all ways
N_WARMUP = 1  # batches before the clock starts
TARGETS = {
    "Trainer's default": 5.0,
    "4 at a time": 1.4,
    "1 at a time": 1.4,
}  # rows/s of ours over theirs, CPU
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


ROPE = {
    name: {"rope_type": "default", "rope_theta": 160_000.0}
    for name in ("full_attention", "sliding_attention")
}
SETUPS = {
    "small": Setup(
        ModernBertConfig(
            hidden_size=384,
            intermediate_size=576,
            num_hidden_layers=6,
            num_attention_heads=6,
            rope_parameters=ROPE,
        ),
        FinetuneConfig(tokens_per_batch=8192),
        n_rows=128,
    ),
    "base": Setup(ModernBertConfig(rope_parameters=ROPE), FinetuneConfig(), n_rows=800),
    "qwen3-4b": Setup(
        Qwen3Config(
            vocab_size=151_936,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        ),
        DecoderConfig(),
        n_rows=160,
    ),
}
WAYS = {
    "ours": 0,
    "Trainer's default": 8,
    "4 at a time": 4,
    "1 at a time": 1,
}  # rows of a batch; 0: by tokens


# ── rows and models ───────────────────────────────────────────────────────────────────


def read_battles(n_pairs: int, seed: int = SEED) -> tuple[pd.DataFrame, str]:
    """Draw battles, real ones where they are at hand, and say which; real ones repeat when there are too few."""
    rng = np.random.default_rng(seed)
    if all(path.exists() for path in REAL):
        real = load_pairs(REAL)[0]
        order = np.concatenate(
            [rng.permutation(len(real)) for _ in range(-(-n_pairs // len(real)))]
        )
        return real.iloc[order[:n_pairs]].reset_index(drop=True), "real"
    pairs = make_battles(n_pairs, seed=seed)[0]
    for name in ("response_a", "response_b"):
        repeats = np.exp(rng.normal(1.0, 0.9, n_pairs)).astype(int) + 1
        pairs[name] = [
            (" ".join([turns[0] or ""] * n),) for turns, n in zip(pairs[name], repeats, strict=True)
        ]
    return pairs, "demo"


def read_tokenizer(
    kind: str, pairs: pd.DataFrame, folder: Path
) -> tuple[PreTrainedTokenizerFast, str]:
    """The real tokenizer of "modernbert" or "qwen3" where it is at hand, else one learned from the battles."""
    real = SHARED / "tokenizers" / {"modernbert": "olmo_bpe", "qwen3": "qwen2_5"}[kind]
    if not real.exists():
        tiny = FinetuneConfig(checkpoint=f"tiny:{kind}", revision="")
        return AutoTokenizer.from_pretrained(
            prepare_base(tiny, pairs, folder, n_steps=0)
        ), "learned from the battles"
    if kind == "qwen3":
        return AutoTokenizer.from_pretrained(real), real.name
    special = {
        f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")
    }
    return PreTrainedTokenizerFast(
        tokenizer_file=str(real / "tokenizer.json"), **special
    ), real.name


def write_checkpoint(setup: Setup, tokenizer, folder: Path) -> Path:
    """Write a model of the shape with random weights, and the tokenizer, where `load_classifier` finds them."""
    shape = setup.shape
    shape.pad_token_id, shape.num_labels = tokenizer.pad_token_id, len(LABELS)
    torch.manual_seed(SEED)
    with quiet_transformers(), choose_device():
        dtype = torch.bfloat16 if setup.config.lora_rank else torch.float32
        AutoModelForSequenceClassification.from_config(shape, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ── pure parts ────────────────────────────────────────────────────────────────────────


def plan(
    lengths: np.ndarray, n_rows: int, tokens_per_batch: int, is_packed: bool = False
) -> list[np.ndarray]:
    """Rows of each batch: under a budget of tokens when `n_rows` is 0, else so many in random order."""
    if not n_rows:
        return (make_packs if is_packed else make_batches)(lengths, tokens_per_batch, SEED)
    order = np.random.default_rng(SEED).permutation(len(lengths))
    return np.split(order, np.arange(n_rows, len(order), n_rows))


def padding_share(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """Share of the tokens of padded batches that are padding."""
    return 1 - float(lengths.sum()) / sum(
        len(batch) * int(lengths[batch].max()) for batch in batches
    )


def count_weights(shape: PreTrainedConfig) -> int:
    """Weights of all matrices that a token is multiplied with, embeddings and head aside."""
    width, hidden = shape.hidden_size, shape.intermediate_size
    if shape.model_type == "modernbert":
        attention = 4 * width**2
    else:
        attention = (
            2 * width * shape.head_dim * (shape.num_attention_heads + shape.num_key_value_heads)
        )
    return shape.num_hidden_layers * (attention + 3 * width * hidden)


def count_training_flops(shape: PreTrainedConfig, lengths: np.ndarray, is_frozen: bool) -> float:
    """Floating-point operations that training on rows needs, padding and recomputation aside.

    Args:
        shape: of the model.
        lengths: (N,) tokens of each row.
        is_frozen: the matrices are not trained, and get no gradient (LoRA's own are left out).

    Source: 6 operations a weight and token, Kaplan et al. 2020, arXiv:2001.08361, section 2.1.
    """
    lengths = np.asarray(lengths, dtype=float)
    products = (4 if is_frozen else 6) * count_weights(shape) * lengths.sum()
    if shape.model_type == "modernbert":
        types = shape.layer_types
        seen = [
            np.minimum(lengths, shape.local_attention + 1)
            if kind == "sliding_attention"
            else lengths
            for kind in types
        ]
        width = shape.hidden_size
    else:
        seen = [(lengths + 1) / 2] * shape.num_hidden_layers
        width = shape.num_attention_heads * shape.head_dim
    # Queries times keys, and weights times values; once forward, twice backward.
    return float(products + 3 * 4 * width * sum((lengths * keys).sum() for keys in seen))


# ── one process each ──────────────────────────────────────────────────────────────────


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


def measure_peak_flops(hidden_size: int) -> float:
    """Floating-point operations a second of the best of many large matrix products, in the precision of the model."""
    device = choose_device()
    n = 8192 if device.type == "cuda" else 2048
    a, b = (
        torch.randn(n, n, device=device, dtype=choose_dtype(device, hidden_size)) for _ in range(2)
    )
    best_s = float("inf")
    for _ in range(30):
        watch = Stopwatch()
        (a @ b)[0, 0].item()  # waits for the product
        best_s = min(best_s, watch.seconds)
    return 2 * n**3 / best_s


def prepare(setup: Setup, tokenizer, folder: Path) -> tuple[Path, float, dict[str, object]]:
    """Write the model; where it is, the peak of matrix products, and what the device is."""
    width = setup.shape.hidden_size
    return (
        write_checkpoint(setup, tokenizer, folder),
        measure_peak_flops(width),
        describe_device(width),
    )


class Lesson:
    """A model, what it reads, and its optimiser."""

    def __init__(self, folder: Path, config: FinetuneConfig, is_ours: bool) -> None:
        if not is_ours:
            config = dataclasses.replace(config, gradient_checkpointing=False)
        with quiet_transformers():
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

    def train(self, batches: Sequence[Sequence[Sequence[int]]]) -> float:
        """Pass forward and backward over batches of rows, step every `ROWS_PER_STEP` rows; the mean loss."""
        total, n_open = torch.zeros((), device=self.device), 0
        for place, rows in enumerate(batches, start=1):
            inputs = {name: tensor.to(self.device) for name, tensor in self._collate(rows).items()}
            targets = torch.arange(len(rows), device=self.device) % len(LABELS)
            with torch.autocast(
                self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
            ):
                logits = self.model(**inputs).logits
            loss = (
                nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
                / ROWS_PER_STEP
            )
            self.scaler.scale(loss).backward()
            total += loss.detach()
            n_open += len(rows)
            if n_open >= ROWS_PER_STEP or place == len(batches):
                self._step()
                n_open = 0
        return total.item() * ROWS_PER_STEP / sum(map(len, batches))  # waits for the device

    def _collate(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        return collate_packed(rows) if self.is_packed else collate(rows, self.pad_id)

    def _step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def measure(
    way: str, folder: Path, config: FinetuneConfig, rows: list[list[int]]
) -> dict[str, float | None]:
    """Train in one way; the model has trained on some batches before, which are not timed."""
    lengths = np.array([len(row) for row in rows])
    lesson = Lesson(folder, config, way == "ours")
    batches = plan(lengths, WAYS[way], config.tokens_per_batch, lesson.is_packed)
    if lesson.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seen = [[rows[row] for row in batch] for batch in batches]
    try:
        lesson.train(seen[:N_WARMUP])
        watch, before_s = Stopwatch(), time.process_time()
        lesson.train(seen)
        seconds, cpu_seconds, peak_mib = (
            watch.seconds,
            time.process_time() - before_s,
            measure_peak_mib(),
        )
    except torch.OutOfMemoryError:
        seconds = cpu_seconds = peak_mib = None
    lesson.optimizer.zero_grad()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # of all threads: other processes stretch it less
        "rows_per_second": seconds and len(rows) / seconds,
        "tokens_per_second": seconds and float(lengths.sum()) / seconds,
        "padding_share": 0.0 if lesson.is_packed else padding_share(lengths, batches),
        "peak_mib": peak_mib,
        "longest_row_tok": find_longest(lesson, WAYS[way] or 1)
        if lesson.device.type == "cuda"
        else None,
    }


def find_longest(lesson: Lesson, n_rows: int, most: int = 131_072) -> int:
    """The longest row, in steps of an eighth, that a batch of so many such rows can have before memory is out."""
    length = fits = 512
    while length <= most:
        try:
            lesson.train([[[5] * length] * n_rows])
        except torch.OutOfMemoryError:
            break
        fits, length = length, length + max(64, length // 8 // 64 * 64)
    return fits


# ── all of it ─────────────────────────────────────────────────────────────────────────


def run(name: str, device: str, n_rows: int) -> dict[str, object]:
    """Measure every way with one model."""
    setup = SETUPS[name]
    pairs, source = read_battles(n_rows)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, origin = read_tokenizer(
            setup.shape.model_type, pairs, Path(folder) / "tokenizer"
        )
        rows = encode_pairs(pairs, tokenizer, MAX_TOKENS)
        base, peak, described = run_alone(device, prepare, setup, tokenizer, Path(folder) / "base")
        ways = {way: run_alone(device, measure, way, base, setup.config, rows) for way in WAYS}
    lengths = np.array([len(row) for row in rows])
    flops = count_training_flops(setup.shape, lengths, is_frozen=setup.config.lora_rank > 0)
    for row in ways.values():
        row["share_of_matmul_peak"] = row["seconds"] and flops / row["seconds"] / peak
        is_compared = row["seconds"] and ways["ours"]["seconds"]
        row["speed_of_ours"] = row["seconds"] / ways["ours"]["seconds"] if is_compared else None
    return {
        **described,
        "matmul_tflops": peak / 1e12,
        "n_weights": count_weights(setup.shape),
        "training_tflop": flops / 1e12,
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
    """Show one number of every way, ours first; a way that memory did not hold has no bar."""
    values = [row[name] for row in ways.values()]
    bars = ax.barh(
        list(ways), [value or 0 for value in values], color=[ACCENT] + [MUTED] * (len(ways) - 1)
    )
    ours = values[0]
    labels = [
        "out of memory"
        if value is None
        else f"{value:,.{1 if value < 100 else 0}f}" + _compare(ours, value, name)
        for value in values
    ]
    ax.bar_label(bars, labels, padding=4)
    ax.invert_yaxis()
    ax.margins(x=0.35)
    ax.grid(axis="y", visible=False)
    return ax


def _compare(ours: float | None, value: float, name: str) -> str:
    if ours is None or value == ours:
        return ""
    return (
        f"  (ours: {ours / value:.1f}×)"
        if name == "rows_per_second"
        else f"  (ours: {ours / value:.0%})"
    )


def draw(runs: dict[str, dict], folder: Path) -> None:
    """Draw speed and memory of every run."""
    use_style()
    for name, label, file in (
        ("rows_per_second", "battles trained on per second", "training_throughput.png"),
        ("peak_mib", "peak memory, MiB", "training_memory.png"),
    ):
        fig, axes = plt.subplots(
            len(runs), 1, figsize=(9, 2.9 * len(runs)), squeeze=False, layout="constrained"
        )
        for ax, (title, run_) in zip(axes[:, 0], runs.items(), strict=True):
            plot_ways(ax, run_["ways"], name)
            ax.set(title=f"{title}, {run_['dtype']}", xlabel=label)
        fig.savefig(folder / file, dpi=110)
        plt.close(fig)


def choose_runs(name: str) -> list[tuple[str, str]]:
    """Model and device of each run: the small one on the CPU always, the real ones where there is a GPU."""
    has_gpu = choose_device().type == "cuda"
    if name != "all":
        return [(name, "cuda" if has_gpu and name != "small" else "cpu")]
    return [("small", "cpu")] + ([("base", "cuda"), ("qwen3-4b", "cuda")] if has_gpu else [])


TITLES = {
    "small": "ModernBERT, 6 layers × 384",
    "base": "ModernBERT-base",
    "qwen3-4b": "Qwen3-4B, NF4 + LoRA",
}


def main() -> None:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        choices=["all", *SETUPS],
        default="all",
        help="all: what this machine is good for",
    )
    parser.add_argument(
        "--rows", type=int, default=0, help="another number makes a trial that is not recorded"
    )
    options = parser.parse_args()
    runs = {}
    for name, device in choose_runs(options.model):
        title = (
            f"{TITLES[name]} on {device.upper().replace('CUDA', 'a GPU').replace('CPU', 'a CPU')}"
        )
        runs[title] = run(name, device, options.rows or SETUPS[name].n_rows)
        report(title, runs[title])
    if not options.rows:
        kept = read_json(RESULT)["runs"] if RESULT.exists() else {}
        write_json(
            RESULT,
            {
                "command": "python -m benchmarks.training",
                "seed": SEED,
                "targets": TARGETS,
                "runs": kept | runs,
            },
        )
        draw(kept | runs, ROOT / "assets")


def report(title: str, result: dict) -> None:
    """Print one run."""
    print(
        f"{title}: {result['device']}, {result['dtype']}, matrix products {result['matmul_tflops']:.2f} TFLOP/s"
    )
    for way, row in result["ways"].items():
        if row["seconds"] is None:
            print(f"  {way:18} out of memory")
            continue
        print(
            f"  {way:18} {row['rows_per_second']:8.2f} rows/s {row['tokens_per_second']:9.0f} tokens/s   "
            f"padding {row['padding_share']:5.1%}   {row['peak_mib']:6.0f} MiB   "
            f"{row['share_of_matmul_peak']:4.0%} of peak   ours is {row['speed_of_ours'] or 0:.2f} times as fast"
        )


if __name__ == "__main__":
    main()
