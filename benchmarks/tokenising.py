"""Time and memory of tokenising: the competition's battles, and half a million more to train on.

    python -m benchmarks.tokenising

57,477 battles are encoded for both orders with each kind of tokenizer, on every core. As many,
read from a file of their own, then become training examples (`extra_battles`), and their memory
per battle is extrapolated to half a million. Battles are real ones, repeated, where
`ARENA_REAL_DATA` names some, else demo battles with log-normal lengths. Each measurement is in a
process of its own. Writes `benchmarks/results/tokenising.json`.
"""

import argparse
import os
import platform
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.eda import write_battles
from benchmarks.training import MAX_TOKENS, ROOT, SEED, read_battles, read_tokenizer, run_alone
from src.utils.battles.readers import add_groups_and_folds
from src.utils.config import FinetuneConfig
from src.utils.models.template import encode_battles
from src.utils.runs import Stopwatch, measure_versions, write_json
from src.utils.training.data import Examples, add_extra_battles

RESULT = ROOT / "benchmarks" / "results" / "tokenising.json"
N_BATTLES = 57_477  # the competition's training rows
N_EXTRA = 500_000  # that memory is extrapolated to
N_ARENA = 898  # battles beside the extra ones
KINDS = ("modernbert", "qwen3")
SAMPLE_S = 0.005  # between two measurements of memory
TARGETS = {"seconds": 60, "peak_mib": 1024, "extra_gib": 8}


class Usage:
    """Seconds, processor seconds, and memory beyond what the process had before, of a block."""

    def __enter__(self) -> "Usage":
        self._process, self._ended = psutil.Process(), threading.Event()
        self._peak = self._process.memory_info().rss
        self.before_mib = self._peak / 2**20
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        self._watch, self._cpu_s = Stopwatch(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu_seconds = self._watch.seconds, time.process_time() - self._cpu_s
        self._ended.set()
        self._thread.join()
        self.peak_mib = self._peak / 2**20 - self.before_mib

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def describe(self, n_battles: int) -> dict[str, float]:
        """Describe the block, which read so many battles."""
        return {
            "n_battles": n_battles,
            "seconds": round(self.seconds, 2),
            "cpu_seconds": round(self.cpu_seconds, 2),
            "battles_per_second": round(n_battles / self.seconds, 1),
            "peak_mib": round(self.peak_mib, 1),
        }


def measure_encoding(kind: str, n_battles: int, folder: Path) -> dict[str, object]:
    """Encode battles that are in memory already, and put together every row in both orders."""
    pairs, source = read_battles(n_battles)
    tokenizer, origin = read_tokenizer(kind, pairs[:4000], folder)
    with Usage() as usage:
        encoded = encode_battles(pairs, tokenizer, MAX_TOKENS)
        n_tok = 0
        for battle in range(len(encoded)):
            n_tok += len(encoded.row(battle, False)) + len(encoded.row(battle, True))
    return {
        "tokenizer": origin,
        "battles": source,
        **usage.describe(n_battles),
        "tokens_in_both_orders": n_tok,
        "mean_tok": round(float(encoded.lengths.mean()), 1),
    }


def measure_extra(path: Path, n_battles: int, folder: Path) -> dict[str, object]:
    """Read battles to train on from a file beside a small arena, and make examples of them."""
    arena = add_groups_and_folds(read_battles(N_ARENA)[0])
    tokenizer, origin = read_tokenizer("modernbert", arena, folder)
    config = FinetuneConfig(extra_battles=(str(path),))
    with Usage() as usage:
        train_pairs = add_extra_battles(arena, np.zeros(N_ARENA, dtype=bool), config)
        examples = Examples(train_pairs, tokenizer, config)
    assert len(examples.lengths) == N_ARENA + n_battles
    described = usage.describe(n_battles)
    peak_gib = (usage.before_mib + usage.peak_mib * N_EXTRA / n_battles) / 1024
    return {"tokenizer": origin, **described, f"gib_of_{N_EXTRA}": round(peak_gib, 2)}


def report(name: str, row: dict) -> None:
    """Print one measurement."""
    print(
        f"{name:11} {row['n_battles']:7,} battles {row['seconds']:6.1f} s "
        f"({row['cpu_seconds']:.1f} s of processors) {row['battles_per_second']:7.0f} rows/s "
        f"{row['peak_mib']:6.0f} MiB more"
    )


def run(n_battles: int) -> dict[str, dict]:
    """Measure everything on so many battles."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            results[kind] = run_alone("cpu", measure_encoding, kind, n_battles, Path(folder) / kind)
            report(kind, results[kind])
        path = Path(folder) / "extra.csv"
        # Ids and prompts that the arena does not have, so that no battle is dropped.
        extra = read_battles(n_battles)[0].assign(id=np.arange(n_battles) + 10**9)
        extra["prompt"] = [(f"{row}", *turns) for row, turns in enumerate(extra["prompt"])]
        write_battles(path, extra)
        del extra
        args = (path, n_battles, Path(folder) / "arena")
        results["extra"] = run_alone("cpu", measure_extra, *args)
        report("extra", results["extra"])
    return results


def main() -> None:
    """Measure, print, and record where all battles were used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=0, help="a trial on fewer, not recorded")
    n_battles, load = parser.parse_args().rows or N_BATTLES, os.getloadavg()[0]
    results = run(n_battles)
    if n_battles != N_BATTLES:
        return
    worst = {}
    for name in ("seconds", "peak_mib"):
        worst[name] = max(results[kind][name] for kind in KINDS)
    worst["extra_gib"] = results["extra"][f"gib_of_{N_EXTRA}"]
    content = {
        "command": "python -m benchmarks.tokenising",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "load_before": round(load, 2),
        "versions": measure_versions(),
        "seed": SEED,
        "max_tokens": MAX_TOKENS,
        "targets": TARGETS,
        "targets_met": {name: worst[name] <= TARGETS[name] for name in TARGETS},
        **results,
    }
    write_json(RESULT, content)


if __name__ == "__main__":
    main()
