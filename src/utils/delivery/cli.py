"""`arena-predict`: probabilities for files of battles, or for battles that come through a pipe.

Files are read, predicted and written in chunks, so their size does not matter. Probabilities go to
the output alone; progress, warnings and errors to standard error.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from src.utils import paths
from src.utils.battles.readers import Chunk, decode_battles, iter_battles
from src.utils.delivery.predictor import MISTAKES, Predictor, list_files
from src.utils.paths import on_disk
from src.utils.runs import atomic_path
from src.utils.schema import LABELS, SWAPPED_LABELS

N_ROWS = 1000  # of a file at once
STDIN = "-"
_BAR = "{l_bar}{bar}| {postfix}, {elapsed} gone, {remaining} left"
_BLOCK = 1 << 20  # bytes of a pipe at once


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0 is success, 1 a mistake in the input or the model, 2 one in the arguments, 130 Ctrl-C, 141
    a reader of the output that went away.
    """
    parser = make_parser()
    given = parser.parse_args(argv)
    if argv is None:  # in a process of its own
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # temporary files are removed
    try:
        _check(parser, given)
        predictor = Predictor(given.model, given.revision)
        if given.explain and predictor.baseline is None:
            parser.error(f"--explain: {given.model} has no CPU baseline, whose terms they are")
        run = _Run(predictor, given)
        predictor.load_networks()
        run.predict()
    except BrokenPipeError:
        # What is still buffered has nowhere to go, and must not be tried again on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except MISTAKES as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="arena-predict",
        description="Predict how people vote between two chatbot answers: P(A), P(B), P(tie).",
        epilog="A model is an artifacts folder, a run folder in it, a published folder, or a hub "
        "id. With - battles are read from standard input, a JSON object a line, and answered a "
        "line each.",
    )
    parser.add_argument("files", nargs="+", metavar="battles.csv", help="any layout, zip, or -")
    parser.add_argument("--model", default=str(paths.artifacts_dir()), help="default: artifacts/")
    parser.add_argument("--revision", default="", help="commit of a hub id")
    parser.add_argument("-o", "--output", default=STDIN, help=".csv or .jsonl; - is the default")
    parser.add_argument("--explain", action="store_true", help="add style terms, in log-odds")
    parser.add_argument("--deadline-s", type=_seconds, default=math.inf, help="seconds in all")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text}")
    return seconds


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    if STDIN in given.files and len(given.files) > 1:
        parser.error("-: expected no other file beside standard input")
    files = [os.path.realpath(file) for file in given.files if file != STDIN]
    if os.path.realpath(given.output) in files:
        parser.error(f"{given.output}: expected another file than the input")


class _Run:
    """One run of the command: what it reads, predicts and writes."""

    def __init__(self, predictor: Predictor, given: argparse.Namespace) -> None:
        self.predictor, self.given = predictor, given
        self.deadline = time.monotonic() + given.deadline_s
        self.total, self.n_rows = np.zeros(len(LABELS)), 0  # of what was predicted so far
        self.warned: set[str] = set()
        for name in predictor.source.absent:
            self.warn(f"{name}: no finished run; the other members have its weight")

    def predict(self) -> None:
        """Predict all that was asked for."""
        is_piped = self.given.files == [STDIN]
        is_json = self.given.output.endswith(".jsonl") or (is_piped and self.given.output == STDIN)
        with _open_output(self.given.output) as file:
            write = _make_writer(file, is_json)
            if is_piped:
                self.predict_lines(write)
            else:
                self.predict_files(write)

    def predict_lines(self, write: Callable[[pd.DataFrame], None]) -> None:
        """Answer JSON lines as they come."""
        n_before = 0
        for lines in read_lines(sys.stdin.fileno()):
            parts = []
            for number, line in enumerate(lines, start=n_before + 1):
                if line.strip():
                    parts.append(_decode_line(line, number))
            n_before += len(lines)
            if parts:
                write(self.answer(pd.concat(parts, ignore_index=True), self.left_s()))

    def predict_files(self, write: Callable[[pd.DataFrame], None]) -> None:
        """Predict file by file, chunk by chunk, each with its share of the time that is left."""
        files = [file for path in self.given.files for file in list_files(path)]
        sizes = np.array([on_disk(file).stat().st_size for file in files], dtype=float) + 1
        ends = np.cumsum(sizes) / sizes.sum()
        look: dict[str, Any] = {"file": sys.stderr, "disable": self.given.quiet}
        with tqdm(total=1.0, bar_format=_BAR, mininterval=0.5, **look) as bar:
            for file, size, end in zip(files, sizes / sizes.sum(), ends, strict=True):
                n_odd = 0
                for chunk, is_last in _mark_last(iter_battles(file, N_ROWS)):
                    # A file is read ahead, so its last rows may be left when it has been read.
                    done = end if is_last else end - size * max(1 - chunk.share, 0.01)
                    part = (done - bar.n) / max(1 - bar.n, 1e-9)
                    table = self.answer(chunk.pairs, self.left_s(part))
                    if len(files) > 1:
                        table.insert(0, "file", str(file))
                    write(table)
                    n_odd += len(chunk.problems)
                    bar.set_postfix_str(f"{self.n_rows:,} battles", refresh=False)
                    bar.update(done - bar.n)
                if n_odd:
                    self.warn(f"{file}: {n_odd:,} odd cells; kept as they are")

    def left_s(self, part: float = 1.0) -> float:
        """Seconds until the deadline, or a part of them."""
        if math.isinf(self.deadline):
            return math.inf
        return max(self.deadline - time.monotonic(), 0.0) * part

    def answer(self, pairs: pd.DataFrame, left_s: float) -> pd.DataFrame:
        """Make the rows of the output: id, probabilities, and style terms where asked for."""
        probs = self.predict_probs(pairs, left_s)
        self.total += probs.sum(axis=0)
        self.n_rows += len(pairs)
        table = pd.DataFrame(probs, columns=list(LABELS))
        table.insert(0, "id", pairs["id"].to_numpy())
        if self.given.explain and self.predictor.baseline:
            terms = self.predictor.baseline.style_terms(pairs).add_prefix("style_")
            table = pd.concat([table, terms.reset_index(drop=True)], axis=1)
        return table

    def predict_probs(self, pairs: pd.DataFrame, left_s: float) -> np.ndarray:
        """Predict N battles: (N, C). Those for which no time is left get the mean of others."""
        try:
            found = self.predictor.predict(pairs, left_s)
        except RuntimeError as error:
            if not self.n_rows or math.isinf(left_s):
                raise
            self.warn(f"no time was left for some battles, which got the mean of others: {error}")
            mean = self.total / self.n_rows
            return np.tile((mean + mean[SWAPPED_LABELS]) / 2, (len(pairs), 1))
        for note in found.notes:
            self.warn(note)
        return found.probs

    def warn(self, text: str) -> None:
        """Print a warning once."""
        if text not in self.warned:
            tqdm.write(f"warning: {text}", file=sys.stderr)
            self.warned.add(text)


def _mark_last(chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, bool]]:
    before = next(chunks)
    for chunk in chunks:
        yield before, False
        before = chunk
    yield before, True


def read_lines(descriptor: int) -> Iterator[list[bytes]]:
    """Read a pipe as it is filled: yields the complete lines that are there, at least one."""
    parts: list[bytes] = []
    while block := os.read(descriptor, _BLOCK):
        head, newline, tail = block.rpartition(b"\n")
        if newline:
            yield b"".join([*parts, head]).split(b"\n")
            parts = []
        parts.append(tail)
    if last := b"".join(parts):
        yield [last]


def _decode_line(line: bytes, number: int) -> pd.DataFrame:
    """One battle; how its texts are decoded depends on no other line."""
    place = Path(f"standard input, line {number}")
    try:
        row = json.loads(line.decode("utf-8", "surrogateescape"), strict=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: expected a JSON object, got {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}")
    raw = pd.DataFrame({name: pd.Series([cell], dtype=object) for name, cell in row.items()})
    pairs, _ = decode_battles(raw, place, number - 1)
    if isinstance(row.get("id"), int):
        pairs["id"] = pd.Series([row["id"]], dtype=object)
    return pairs


@contextlib.contextmanager
def _open_output(name: str) -> Iterator[IO[str]]:
    path = Path(name)
    if name == STDIN:
        yield sys.stdout
        sys.stdout.flush()
    elif path.exists() and not path.is_file():  # a device or a pipe, which must not be replaced
        with path.open("w", encoding="utf-8") as file:
            yield file
    else:
        with atomic_path(path) as tmp, tmp.open("w", encoding="utf-8", newline="") as file:
            yield file


def _make_writer(file: IO[str], is_json: bool) -> Callable[[pd.DataFrame], None]:
    n_written = 0

    def write(table: pd.DataFrame) -> None:
        nonlocal n_written
        if is_json:
            file.writelines(json.dumps(row) + "\n" for row in table.to_dict("records"))
        else:
            table.to_csv(file, index=False, header=n_written == 0, lineterminator="\n")
        n_written += 1
        file.flush()

    return write


if __name__ == "__main__":
    sys.exit(main())
