"""A run folder: what one notebook leaves behind, written so that half a file is never seen.

Each file is written under another name in the same folder and then renamed, which
the operating system does in one step. `metrics.json` is written last: its
existence means that the run completed.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.utils.schema import LABELS, TEXTS, Turns, probs_of

_MANIFEST = "manifest.json"
_TRACKED_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "scikit-learn",
    "lightgbm",
    "pandas",
    "numpy",
)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, renamed to it when the block ends well.

    Example:
        with atomic_path(run_dir / "a.bin") as tmp: tmp.write_bytes(data)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: pandas and matplotlib choose the format by it.
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> Path:
    """Write JSON with two spaces of indent, whole or not at all; NaN is refused."""
    text = json.dumps(content, indent=2, ensure_ascii=True, allow_nan=False) + "\n"
    return write_text(path, text)


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text, whole or not at all."""
    with atomic_path(path) as tmp:
        tmp.write_text(text, encoding="utf-8")
    return Path(path)


def read_json(path: Path) -> Any:
    """Read JSON; a damaged file is named.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error


def write_table(path: Path, table: pd.DataFrame) -> Path:
    """Write a table as `.parquet` or `.csv`, whole or not at all."""
    with atomic_path(path) as tmp:
        if path.suffix == ".parquet":
            table.to_parquet(tmp, index=False)
        else:
            table.to_csv(tmp, index=False)
    return Path(path)


def write_figure(path: Path, figure: Any, dpi: int = 120) -> Path:
    """Write a matplotlib figure as PNG, whole or not at all."""
    with atomic_path(path) as tmp:
        figure.savefig(tmp, dpi=dpi, bbox_inches="tight")
    return Path(path)


def encode_turns(turns: Turns) -> str:
    """Write turns as an ASCII JSON list: exact for nulls and for lone surrogates, which parquet refuses.

    Example:
        ("hi", None) -> '["hi", null]'
    """
    return json.dumps(turns)


def write_pairs(path: Path, pairs: pd.DataFrame) -> Path:
    """Write battles to parquet, each text as the JSON list that the competition uses."""
    return write_table(
        path, pairs.assign(**{name: pairs[name].map(encode_turns) for name in TEXTS})
    )


def read_pairs(path: Path) -> pd.DataFrame:
    """Read battles that `write_pairs` wrote: texts are tuples of turns again.

    Raises:
        FileNotFoundError: the file is missing; the message says which notebook makes it.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{path}: not found. Run notebooks/01_eda.ipynb first, or `make run NB=01`."
        )
    table = pd.read_parquet(path)
    decoded = {
        name: pd.Series([tuple(json.loads(text)) for text in table[name]], dtype=object)
        for name in TEXTS
    }
    return table.assign(**decoded)


def read_truth(eda_dir: Path, ids: pd.Series) -> np.ndarray | None:
    """The true probabilities of demo battles, in the order of `ids`.

    Args:
        eda_dir: run folder of 01.
        ids: (N,) battle ids.

    Returns:
        (N, C) float64, or None when the battles are real and nobody knows.
    """
    path = Path(eda_dir) / "truth.parquet"
    return probs_of(pd.read_parquet(path).set_index("id").loc[list(ids)]) if path.exists() else None


def hash_file(path: Path) -> str:
    """BLAKE2b of a file's content, 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path) -> Path:
    """Note the size and the hash of every file in a folder, in `manifest.json`; the last file to be written there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST)
    return write_json(
        folder / _MANIFEST, {path.relative_to(folder).as_posix(): _identify(path) for path in files}
    )


def find_damage(folder: Path) -> str | None:
    """Compare a folder with its manifest.

    Returns:
        The first file that is not what was written, with what was expected and found; None when all are.
    """
    try:
        manifest = read_json(folder / _MANIFEST)
    except FileNotFoundError:
        return f"{_MANIFEST}: expected the list of its files, found none: it was not written to its end"
    except ValueError as error:
        return str(error)
    for name, expected in manifest.items():
        found = _identify(folder / name) if (folder / name).is_file() else "no such file"
        if found != expected:
            return f"{name}: expected {expected}, found {found}"
    return None


def _identify(path: Path) -> str:
    return f"{path.stat().st_size} bytes of hash {hash_file(path)}"


def hash_json(content: Any) -> str:
    """BLAKE2b of a JSON value, key order aside, 16 hex digits."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def hash_pairs(pairs: pd.DataFrame) -> str:
    """BLAKE2b of ids, texts, and (where there) labels and folds, in row order, 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    extra = [name for name in ("label", "fold") if name in pairs.columns]
    for row in pairs[["id", *TEXTS, *extra]].itertuples(index=False):
        digest.update(
            json.dumps(
                [value if isinstance(value, tuple) else str(value) for value in row]
            ).encode()
        )
    return digest.hexdigest()


def measure_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a score depends on, without importing them."""
    versions = {"python": platform.python_version()}
    for package in _TRACKED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions


def measure_peak_mib() -> float:
    """Peak resident memory of this process, MiB; the peak on the GPU when torch has used one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class Stopwatch:
    """Seconds since it was made. Example: `watch = Stopwatch(); ...; watch.seconds`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds, wall clock."""
        return time.perf_counter() - self._start


def make_metrics(
    scores: dict[str, Any], *, n_pairs: int, seconds: float, data_hash: str, config: dict[str, Any]
) -> dict[str, Any]:
    """Put the fixed fields of `metrics.json` beside a model's scores.

    Args:
        scores: must hold `log_loss` (nats per battle) and `accuracy` (share).
        n_pairs: held-out battles that were scored.
        seconds: wall clock of the run.
        data_hash: `hash_pairs` of the battles.
        config: the run's settings, hashed here.

    Raises:
        KeyError: `log_loss` or `accuracy` is missing.
    """
    return {
        **scores,
        "log_loss": float(scores["log_loss"]),
        "accuracy": float(scores["accuracy"]),
        "n_pairs": int(n_pairs),
        "seconds": round(seconds, 2),
        "peak_mib": round(measure_peak_mib(), 1),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": measure_versions(),
        "data_hash": data_hash,
        "config_hash": hash_json(config),
    }


def write_run(
    run_dir: Path, *, config: dict[str, Any], oof: pd.DataFrame, metrics: dict[str, Any]
) -> None:
    """Write `config.json`, `oof.parquet`, then `metrics.json`, in this order.

    Args:
        run_dir: the notebook's folder.
        config: settings that 05 and 06 read back.
        oof: id, fold, one float32 column per label; only rows truly held out.
        metrics: from `make_metrics`.
    """
    assert list(oof.columns) == ["id", "fold", *LABELS], f"oof: got columns {list(oof.columns)}"
    (run_dir / "metrics.json").unlink(missing_ok=True)
    write_json(run_dir / "config.json", config)
    write_table(run_dir / "oof.parquet", oof)
    write_json(run_dir / "metrics.json", metrics)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder`, which replaces it when the block ends well."""
    folder = Path(folder)
    tmp, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
    for left_behind in (tmp, old):
        shutil.rmtree(left_behind, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        if folder.exists():
            os.replace(folder, old)
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


LEADERBOARD_COLUMNS = (
    *(
        "run",
        "data_hash",
        "config_hash",
        "n_pairs",
        "seed",
        "log_loss",
        "log_loss_low",
        "log_loss_high",
    ),
    *("accuracy", "seconds", "peak_mib"),
)
_SKIPPED = ("checkpoints", "model")  # folders inside a run


def read_leaderboard(artifacts: Path) -> pd.DataFrame:
    """Collect the scores of all finished runs, the best of each data set first.

    Args:
        artifacts: the folder of all run folders; sweeps lie in it too.

    Returns:
        One row a run, `LEADERBOARD_COLUMNS`: `run` is its folder from `artifacts`, `n_pairs` the
        held-out battles, losses in nats per battle with a 95 % interval, memory in MiB.
        What a run did not record is missing. Sorted by data, then by loss: losses on
        different battles cannot be compared.
    """
    artifacts = Path(artifacts)
    rows = [
        _read_run(path, artifacts)
        for path in sorted(artifacts.rglob("metrics.json"))
        if _is_run(path, artifacts)
    ]
    table = pd.DataFrame(rows, columns=list(LEADERBOARD_COLUMNS)).astype(
        {"seed": "Int64", "n_pairs": "Int64"}
    )
    return table.sort_values(["data_hash", "log_loss", "run"], ignore_index=True)


def write_leaderboard(artifacts: Path) -> pd.DataFrame:
    """Write `leaderboard.csv` into `artifacts`, whole or not at all; returns the table."""
    table = read_leaderboard(artifacts)
    write_table(Path(artifacts) / "leaderboard.csv", table)
    return table


def _is_run(path: Path, artifacts: Path) -> bool:
    return not set(path.relative_to(artifacts).parts) & set(_SKIPPED) and "log_loss" in read_json(
        path
    )


def _read_run(path: Path, artifacts: Path) -> dict[str, object]:
    metrics, config = read_json(path), path.with_name("config.json")
    settings = read_json(config) if config.exists() else {}
    known = metrics | {
        "run": path.parent.relative_to(artifacts).as_posix(),
        "seed": settings.get("seed"),
    }
    return {name: known.get(name) for name in LEADERBOARD_COLUMNS}
