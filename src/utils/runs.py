"""Write, read and hash a notebook's run folder.

Each file is written under another name in the same folder and then renamed, so that a
partial file is never seen. `metrics.json` is written last: its existence means that the
run completed.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.utils.config import name_model
from src.utils.schema import LABELS, TEXTS, VOTES, probs_of

_MANIFEST = "manifest.json"
_PACKAGES = "torch transformers peft bitsandbytes scikit-learn lightgbm pandas numpy".split()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to it when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: pandas and matplotlib choose the format by it.
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which replaces it when the block succeeds."""
    folder = Path(folder)
    tmp = folder.with_name(f".{folder.name}.tmp")
    old = folder.with_name(f".{folder.name}.old")
    for leftover in (tmp, old):
        shutil.rmtree(leftover, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        if folder.exists():
            os.replace(folder, old)
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def find_free(target: Path, is_taken: Callable[[Path], bool] = Path.exists) -> Path:
    """Return the first of `target`, `target-2` and so on that is not taken."""
    free, number = target, 1
    while is_taken(free):
        number += 1
        free = target.with_name(f"{target.name}-{number}")
    return free


def move_aside(path: Path, target: Path) -> Path:
    """Move a file or folder to `target`, or to `target-2` and so on: it replaces nothing."""
    free = find_free(target)
    free.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, free)
    return free


def write_json(path: Path, content: Any) -> Path:
    """Write indented ASCII JSON atomically; NaN is refused."""
    return write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as tmp:
        tmp.write_text(text, encoding="utf-8")
    return Path(path)


def read_json(path: Path) -> Any:
    """Read JSON; a file that holds something else is named in a ValueError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error


def to_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Turn a table into plain JSON values, one dict per row; NaN becomes None."""
    return json.loads(table.to_json(orient="records", double_precision=15))


def write_table(path: Path, table: pd.DataFrame) -> Path:
    """Write a table as `.parquet` or `.csv`, atomically and without its index."""
    with atomic_path(path) as tmp:
        if path.suffix == ".parquet":
            table.to_parquet(tmp, index=False)
        else:
            table.to_csv(tmp, index=False)
    return Path(path)


def write_figure(path: Path, figure: Any) -> Path:
    """Write a matplotlib figure atomically."""
    with atomic_path(path) as tmp:
        figure.savefig(tmp, dpi=120)
    return Path(path)


def write_pairs(path: Path, pairs: pd.DataFrame) -> Path:
    """Write battles to parquet, each text as the JSON list that the competition uses."""
    encoded = {name: pairs[name].map(json.dumps) for name in TEXTS}
    return write_table(path, pairs.assign(**encoded))


def read_pairs(path: Path) -> pd.DataFrame:
    """Read battles that `write_pairs` wrote; texts are tuples of turns again."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: not found. Run 01_eda first, or `make run NB=01`.")
    table = pd.read_parquet(path)
    for name in TEXTS:
        table[name] = table[name].map(lambda text: tuple(json.loads(text))).astype(object)
    return table


def read_truth(eda_dir: Path, ids: pd.Series) -> np.ndarray | None:
    """Read the true probabilities of `ids` from 01's run, (N, C) float64; None: real battles."""
    path = Path(eda_dir) / "truth.parquet"
    if not path.exists():
        return None
    return probs_of(pd.read_parquet(path).set_index("id").loc[list(ids)])


def name_source(kind: str, files: Sequence[str]) -> str:
    """Name battles for a figure's corner; `kind` is that of `paths.find_raw_data`."""
    if kind == "demo":
        return "simulated arena"
    if kind in ("raw", "kaggle"):
        return "the competition's data"
    if len(files) > 3:
        files = [*files[:2], f"{len(files) - 2} more files"]
    return f"real battles ({', '.join(files)})"


def read_source(eda_dir: Path) -> str:
    """Read from 01's run whose battles they are: "simulated arena", "real battles (a.csv)"."""
    source = read_json(Path(eda_dir) / "bias.json")["source"]
    return name_source(source["kind"], source["files"])


def hash_file(path: Path) -> str:
    """BLAKE2b of a file's content, 16 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, _new_hash).hexdigest()


def _new_hash(content: bytes = b"") -> Any:
    return hashlib.blake2b(content, digest_size=8)


def write_manifest(folder: Path) -> Path:
    """Write the size and hash of every file in a folder to its `manifest.json`; call it last."""
    manifest = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _MANIFEST:
            manifest[path.relative_to(folder).as_posix()] = _identify(path)
    return write_json(folder / _MANIFEST, manifest)


def find_damage(folder: Path) -> str | None:
    """Compare a folder with its manifest; describe the first missing or changed file, if any."""
    try:
        manifest = read_json(folder / _MANIFEST)
    except FileNotFoundError:
        return f"{_MANIFEST}: expected the list of files, found none: writing was interrupted"
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
    """BLAKE2b of a JSON value whatever the order of its keys, 16 hex digits."""
    return _new_hash(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_pairs(pairs: pd.DataFrame) -> str:
    """BLAKE2b of ids, texts, and labels, folds and votes if any, in row order, 16 hex digits."""
    digest = _new_hash()
    extra = [name for name in ("label", "fold", *VOTES) if name in pairs.columns]
    for row in pairs[["id", *TEXTS, *extra]].itertuples(index=False):
        values = [value if isinstance(value, tuple) else str(value) for value in row]
        digest.update(json.dumps(values).encode())
    return digest.hexdigest()


def hash_rows(ids: Iterable[Any]) -> str:
    """BLAKE2b of a set of battles whatever its order: which rows a score is of, 16 hex digits."""
    return hash_json(sorted({str(each) for each in ids}))


def label_member(artifacts: Path, run: str) -> str:
    """Name what the run folder `artifacts / run` holds: "03 tiny encoder (stand-in)".

    A head on a frozen base says so: "04 SmolLM2-135M-Instruct, frozen, small head".

    The blend of 05 is named by what it publishes: "05 publishes 02 alone (blend not better)".
    """
    folder = Path(artifacts) / run
    number = folder.name.split("_")[0]
    if (folder / "blend.json").exists():
        blend = read_json(folder / "blend.json")
        weights = zip(blend["members"], blend["weights"], strict=True)
        kept = [name[:2] for name, weight in weights if weight > 0]
        if len(kept) == 1 < len(blend["members"]):
            return f"{number} publishes {kept[0]} alone (blend not better)"
        return f"{number} blend of {', '.join(kept)}"
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    checkpoint, train = config.get("checkpoint", "CPU baseline"), config.get("train", "")
    return f"{number} {name_model(checkpoint, train)}"


def measure_versions() -> dict[str, str]:
    """Look up the versions of Python and of the packages that scores depend on."""
    versions = dict.fromkeys(_PACKAGES, "absent")
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"python": platform.python_version(), **versions}


def measure_peak_mib() -> float:
    """Measure this process's peak memory, MiB: on the GPU if torch has used one, else resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class Stopwatch:
    """Measures seconds since its creation: `watch = Stopwatch(); ...; watch.seconds`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds."""
        return time.perf_counter() - self._start


def make_metrics(
    scores: dict[str, Any], *, n_pairs: int, seconds: float, data_hash: str, config: dict[str, Any]
) -> dict[str, Any]:
    """Add the standard fields of `metrics.json` to a model's scores.

    `scores` has at least `log_loss` (nats per battle) and `accuracy` (share), `n_pairs` counts
    held-out battles, `data_hash` is from `hash_pairs`, and `config` holds the run's settings.
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

    `oof` has id, fold, one float32 column per label, and only held-out rows; `metrics` are
    those of `make_metrics`.
    """
    assert list(oof.columns) == ["id", "fold", *LABELS], f"oof: got columns {list(oof.columns)}"
    (run_dir / "metrics.json").unlink(missing_ok=True)
    write_json(run_dir / "config.json", config)
    write_table(run_dir / "oof.parquet", oof)
    write_json(run_dir / "metrics.json", {**metrics, "rows_hash": hash_rows(oof["id"])})
