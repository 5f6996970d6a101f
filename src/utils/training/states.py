"""Read the states of a frozen base once for each battle and order, and keep them on disk.

A reading is known by its texts in the order that they were read, so further battles add to what is
there. What was read is written every minute, in parts that appear at once: a run that is killed
goes on where it was. Whatever changes the states themselves has a folder of its own.
"""

import contextlib
import functools
import hashlib
import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate.utils import release_memory

from src.utils.config import FinetuneConfig
from src.utils.models.checkpoints import (
    find_base_folder,
    hash_base,
    load_base_tokenizer,
    make_skeleton,
    read_architecture,
)
from src.utils.models.frozen import N_STATES, choose_layers, find_layers
from src.utils.models.predict import read_battles
from src.utils.models.reading import choose_devices, load_state_reader, open_reader
from src.utils.models.template import TEMPLATE_VERSION, encode_battles
from src.utils.runs import atomic_path, hash_json, read_json, write_json
from src.utils.schema import TEXTS, clean_text
from src.utils.training.session import SessionOver

FOLDER = "states"  # in a run folder
PACE = "pace.json"  # seconds and tokens of all readings so far
_PART_MIB, _PART_S = 64, 60.0  # a part is written when it has so much, or after so long
_CHUNK_MIB = 64  # that are in memory at once when states are streamed
_MAX_LOST_SHARE = 0.01  # of the readings, with states that are not finite


class States:
    """States of readings, in memory-mapped parts of a folder.

    A part that is damaged is named and removed, so that it is read again.
    """

    def __init__(self, folder: Path, n_blocks: int, hidden: int) -> None:
        """Open what is there; a reading has `n_blocks` states, each (hidden,)."""
        self.folder, self.hidden, self.width = folder, hidden, n_blocks * hidden
        self.dtype = np.dtype([("key", "S32"), ("states", np.float16, (self.width,))])
        for leftover in folder.glob(".part-*"):  # of a run that was killed
            leftover.unlink()
        self.parts: list[np.ndarray] = []
        for path in sorted(folder.glob("part-*.npy")):
            self.parts += self._open(path)
        self._index()

    def _open(self, path: Path) -> list[np.ndarray]:
        try:
            part = np.load(path, mmap_mode="r", allow_pickle=False)
            damage = "" if _name_part(part) == path.name else "its content has changed"
        except (ValueError, OSError, EOFError) as error:
            damage = str(error)
        if not damage:
            return [part]
        warnings.warn(f"{path} is damaged and will be read again: {damage}", stacklevel=3)
        path.unlink()
        return []

    def _index(self) -> None:
        keys = [np.zeros(0, dtype="S32"), *[part["key"] for part in self.parts]]
        self._keys = pd.Index(np.concatenate(keys).astype(object))
        self._starts = np.cumsum([0, *map(len, self.parts)])

    def add(self, keys: np.ndarray, states: np.ndarray) -> None:
        """Write a part: (M,) keys and (M, width) float16; found once the folder is opened again."""
        part = np.empty(len(keys), dtype=self.dtype)
        part["key"], part["states"] = keys, states
        with atomic_path(self.folder / _name_part(part)) as tmp, open(tmp, "wb") as file:
            np.save(file, part, allow_pickle=False)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Find the rows of keys of any shape: int, -1 where there is none."""
        return self._keys.get_indexer(keys.ravel().astype(object)).reshape(keys.shape)

    def stream(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (places in `rows`, (places, width) float32), in the order of the disk."""
        order = np.argsort(rows, kind="stable")
        n_rows = max(1, int(_CHUNK_MIB * 2**20 / (4 * self.width)))
        part_of = np.searchsorted(self._starts, rows[order], side="right") - 1
        for number in np.unique(part_of):
            places = order[part_of == number]
            for start in range(0, len(places), n_rows):
                some = places[start : start + n_rows]
                found = self.parts[number]["states"][rows[some] - self._starts[number]]
                yield some, found.astype(np.float32)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Take (M, width) float32 of M rows."""
        taken = np.empty((len(rows), self.width), dtype=np.float32)
        for places, states in self.stream(rows):
            taken[places] = states
        return taken


def _name_part(part: np.ndarray) -> str:
    return f"part-{hashlib.blake2b(part.tobytes(), digest_size=8).hexdigest()}.npy"


def make_keys(pairs: pd.DataFrame) -> np.ndarray:
    """Name both readings of N battles by their texts: (N, 2) 32 bytes, as given and exchanged."""
    texts = [[list(map(clean_text, turns)) for turns in pairs[name]] for name in TEXTS]
    keys = [[_hash(prompt, a, b), _hash(prompt, b, a)] for prompt, a, b in zip(*texts, strict=True)]
    return np.array(keys, dtype="S32").reshape(-1, 2)


def _hash(*texts: list[str]) -> bytes:
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest().encode()


class _Missing:
    """The readings (`read_battles`) of what is not on disk yet; writes it as it comes."""

    orders = (0, 1)

    def __init__(
        self,
        pairs: pd.DataFrame,
        config: FinetuneConfig,
        base: Path | None,
        states: States,
        session_end: float,
    ) -> None:
        keys = make_keys(pairs)
        # Of readings with the same texts one is enough.
        is_repeated = pd.Series(keys.ravel()).duplicated().to_numpy().reshape(keys.shape)
        is_missing = (states.find(keys) < 0) & ~is_repeated
        some = np.flatnonzero(is_missing.any(axis=1))
        self._keys, self._is_missing, self._states = keys[some], is_missing[some], states
        self.n_tok, self.lengths = 0, np.zeros(0, dtype=int)
        if len(some):
            tokenizer = load_base_tokenizer(config, base)
            self._encoded = encode_battles(pairs.iloc[some], tokenizer, config.predict_tokens)
            self.lengths = self._encoded.lengths
            self.n_tok = int(self.lengths @ self._is_missing.sum(axis=1))
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._n_waiting = self._tok_waiting = 0
        self._written_at = time.monotonic()
        self._session_end, self._tok_written = session_end, 0

    def wanted(self, order: int) -> np.ndarray:
        return self._is_missing[:, order].nonzero()[0]

    def row(self, order: int, battle: int) -> np.ndarray:
        return self._encoded.row(battle, bool(order))

    def put(self, order: int, battles: np.ndarray, values: np.ndarray) -> None:
        is_finite = np.isfinite(values).all(axis=1)
        self._waiting.append((self._keys[battles[is_finite], order], values[is_finite]))
        self._n_waiting += int(is_finite.sum())
        self._tok_waiting += int(self.lengths[battles].sum())
        is_large = self._n_waiting * self._states.dtype.itemsize > _PART_MIB * 2**20
        if is_large or time.monotonic() - self._written_at > _PART_S:
            self.write()
            if time.monotonic() > self._session_end:
                share = self._tok_written / self.n_tok
                raise SessionOver(f"This session read {share:.0%} of the states that were missing.")

    def write(self) -> None:
        """Write what waits as a part."""
        if self._n_waiting:
            keys, values = zip(*self._waiting, strict=True)
            self._states.add(np.concatenate(keys), np.concatenate(values))
        now = time.monotonic()
        path, pace = self._states.folder / PACE, {"n_tok": 0, "seconds": 0.0}
        with contextlib.suppress(FileNotFoundError, ValueError):
            pace = read_json(path)
        pace["n_tok"] += self._tok_waiting
        pace["seconds"] += now - self._written_at
        write_json(path, pace)
        self._tok_written += self._tok_waiting
        self._waiting, self._n_waiting, self._tok_waiting = [], 0, 0
        self._written_at = now


def read_states(
    pairs: pd.DataFrame,
    config: FinetuneConfig,
    run_dir: Path,
    base: Path | None = None,
    session_end: float = math.inf,
) -> States:
    """Read the states of battles in both orders, as far as they are not on disk yet.

    They are in `run_dir / "states" / KEY`, 2 bytes a state: for 57,477 battles, a layer and a
    width of 2,560, 1.8 GB. The key covers the base's weights and storage, the template, the token
    budget (PREDICT_TOKENS) and the layers. Where all are there, the base is not loaded.

    Raises:
        FloatingPointError: more than one reading in a hundred has no finite states.
        RuntimeError: every process that read was lost; what it had read is kept.
        SessionOver: `session_end`, a `time.monotonic()` value, has come; so is what was read.
    """
    skeleton = make_skeleton(read_architecture(config, base), "joint")
    layers = choose_layers(config.state_layers, len(find_layers(skeleton)))
    about = {
        "base": hash_base(find_base_folder(config, base)),
        "quantization": config.quantization,
        "template": TEMPLATE_VERSION,
        "predict_tokens": config.predict_tokens,
        "layers": layers,
    }
    folder = run_dir / FOLDER / hash_json(about)[:8]
    write_json(folder / "about.json", about)
    shape = N_STATES * len(layers), skeleton.config.get_text_config().hidden_size
    states = States(folder, *shape)
    missing = _Missing(pairs, config, base, states, session_end)
    if missing.n_tok:
        note = _read(missing, config, base)
        states = States(folder, *shape)
        n_lost = int((states.find(make_keys(pairs)) < 0).sum())
        if note and n_lost:
            raise RuntimeError(f"{run_dir.name}: {note}; run it again to read the rest")
        if n_lost > _MAX_LOST_SHARE * 2 * len(pairs):
            raise FloatingPointError(
                f"{config.checkpoint}: {n_lost:,} of {2 * len(pairs):,} readings have no finite "
                "states, or memory did not hold them; lower PREDICT_TOKENS or QUANTIZATION"
            )
    return states


def _read(missing: _Missing, config: FinetuneConfig, base: Path | None) -> str:
    load = functools.partial(load_state_reader, config, base)
    n_devices = len(choose_devices(config.n_processes or None))
    n_workers = n_devices if n_devices > 1 else 0
    try:
        with contextlib.closing(open_reader(load, math.inf, n_workers)) as reader:
            return read_battles(
                reader, missing, config.tokens_per_batch, progress="states of the frozen base"
            )
    finally:
        missing.write()
        release_memory()


def read_pace(states: States) -> float:
    """Return how many tokens per second were read, in all runs that read these states."""
    pace = read_json(states.folder / PACE)
    return pace["n_tok"] / max(pace["seconds"], 1e-9)
