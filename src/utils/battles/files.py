"""Read a file to a table of cells: CSV, TSV, JSON lines or parquet, also in gzip or a zip.

Cells of text files are `str` as they stand: nothing counts as missing. Those of JSON lines and
parquet are Python values. A damaged file is a `ValueError` that names file and row.
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from src.utils.paths import on_disk

# Stands for a return in a cell that is not quoted, which csv refuses. No text has it: what is not
# UTF-8 becomes another half of a pair.
_RETURN = "\ud800"
_LONE_RETURN = re.compile(r"\r(?!\n|\Z)")
_N_ROWS = 500  # read at once
_SEPARATORS = ",;\t|"
_UNREADABLE = (
    *(ValueError, KeyError, OSError, EOFError, RuntimeError, csv.Error),
    *(zlib.error, zipfile.BadZipFile, pa.ArrowException),
)
_QUOTE = "put cells that hold a return, a separator or a quote in double quotes, and double them"


class _DamagedTableError(ValueError):
    """A damage whose place, apart from the file, is in the message."""


def read_table(
    path: Path, keep: Collection[str] | None = None, header_only: bool = False
) -> pd.DataFrame:
    """Read a file without interpreting its cells; bytes that are not UTF-8 are lone surrogates.

    A byte-order mark, UTF-16, other separators and blanks around the names of columns are read.

    Args:
        path: by its name parquet or JSON lines, else CSV; may be `archive.zip/train.csv`.
        keep: the columns to keep, where the file has them; None keeps all.
        header_only: stop after the names of the columns; the table has no row.

    Raises:
        ValueError: the file cannot be read as a table; file, row and line are named.
    """
    with contextlib.closing(iter_table(path, keep, 0 if header_only else None)) as tables:
        return next(tables)[0]


def iter_table(
    path: Path, keep: Collection[str] | None = None, n_rows: int | None = None
) -> Generator[tuple[pd.DataFrame, float]]:
    """Read a file as `read_table` does, at most `n_rows` rows at a time, in bounded memory.

    A JSON file that is one list, and parquet in a zip, are held in memory all the same.

    Yields:
        A table, at least one, with the columns that the file has so far; and the share of the
        file that has been read, 0 to 1. `n_rows` None reads all rows, 0 the header alone.
    """
    path = Path(path)
    name = path.name.lower().removesuffix(".gz")
    read: Callable = _read_json if name.endswith((".jsonl", ".json", ".ndjson")) else _read_csv
    try:
        with _open(path) as (file, measure_share):
            if name.endswith(".parquet"):
                yield from _read_parquet(file, keep, n_rows)
                return
            for table in read(file, keep, n_rows):
                yield table, measure_share()
    except _DamagedTableError as error:
        raise ValueError(f"{path}: {error}") from error
    except _UNREADABLE as error:
        raise ValueError(
            f"{path}: expected a readable table, got {type(error).__name__}: {error}"
        ) from error


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], float]]]:
    """Open a file; and a function that measures the share of it that has been read."""
    with contextlib.ExitStack() as stack:
        archive = on_disk(path)
        file: Any
        raw: Any
        if archive == path:
            file = raw = stack.enter_context(path.open("rb"))
            n_bytes = path.stat().st_size
        else:
            packed = stack.enter_context(zipfile.ZipFile(archive))
            member = path.relative_to(archive).as_posix()
            file = raw = stack.enter_context(packed.open(member))
            n_bytes = packed.getinfo(member).file_size
        if path.name.lower().endswith(".gz"):
            file = gzip.GzipFile(fileobj=file)
        yield file, lambda: 1.0 if raw.closed else min(raw.tell() / max(n_bytes, 1), 1.0)


def _decode(file: Any) -> tuple[io.TextIOWrapper, str, str]:
    """Wrap bytes as text; and return its first line, and what ends the lines."""
    head = file.peek(4096)
    encoding = "utf-8-sig" if head.startswith(codecs.BOM_UTF8) else "utf-8"
    errors = "surrogateescape"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head[:2]:
        places = {b"\xff": "utf-16", b"\xfe": "utf-16", b"\0": "utf-16-be"}
        encoding, errors = places.get(head[:1], "utf-16-le"), "surrogatepass"
    # Other returns than the first line's are text, or damage: they end no row.
    text = head[: len(head) // 2 * 2].decode(encoding, "replace")
    first = re.match(r"[^\r\n]*(\r(?!\n))?", text)
    newline = "\r" if first and first[1] and len(text) > first.end() else "\n"
    wrapped = io.TextIOWrapper(file, encoding=encoding, errors=errors, newline=newline)
    return wrapped, text.splitlines()[0] if text else "", newline


def _pick(names: list[str], keep: Collection[str] | None) -> dict[str, int]:
    """Name -> place of the columns to keep; blanks around names are not part of them."""
    picked: dict[str, int] = {}
    for place, name in enumerate(str(name).strip() for name in names):
        if keep is None or name in keep:
            if name in picked and keep is not None:
                raise _DamagedTableError(f"expected one column {name}, found two; remove one")
            picked[name] = place
    return picked


def _read_csv(
    file: IO[bytes], keep: Collection[str] | None, n_rows: int | None
) -> Iterator[pd.DataFrame]:
    text, first_line, newline = _decode(file)
    # The header decides: names of columns hold no separators.
    separator = max(_SEPARATORS, key=first_line.count)
    csv.field_size_limit(sys.maxsize)
    with text:
        is_hidden: list[bool] = []
        lines = _hide_returns(text, is_hidden) if newline == "\n" else text
        reader = csv.reader(lines, delimiter=separator, strict=True)
        header = next(reader, [])
        picked = _pick(header, keep)
        if not picked:
            raise _DamagedTableError(f"expected names of columns in line 1, found {header!a:.80}")
        for columns in _read_rows(reader, len(header), n_rows):
            if is_hidden:
                for column in columns:
                    column[:] = [cell.replace(_RETURN, "\r") for cell in column]
            yield _make_table({name: columns[place] for name, place in picked.items()})


def _hide_returns(lines: Iterable[str], is_hidden: list[bool]) -> Iterator[str]:
    for line in lines:
        if "\r" in line and (hidden := _LONE_RETURN.sub(_RETURN, line)) != line:
            is_hidden.append(True)
            line = hidden
        yield line


def _read_rows(reader: Any, width: int, n_rows: int | None) -> Iterator[list[list[str]]]:
    """The columns of a table, so many rows at a time; chunks leave no million of lists behind."""
    columns: list[list[str]] = [[] for _ in range(width)]
    is_done, n_before = n_rows == 0, 0
    while not is_done:
        chunk: list[list[str]] = []
        line, damage = reader.line_num + 1, ""
        n_wanted = _N_ROWS if n_rows is None else min(_N_ROWS, n_rows - len(columns[0]))
        try:
            chunk.extend(itertools.islice(reader, n_wanted))
        except csv.Error as error:  # what was read before it is in the chunk
            damage = str(error).partition(" - ")[0]
        is_done = len(chunk) < n_wanted
        if damage or {*map(len, chunk)} - {width}:
            chunk = _check_rows(chunk, width, damage, line, n_before + len(columns[0]))
        for column, cells in zip(columns, zip(*chunk, strict=True), strict=False):
            column.extend(cells)
        if len(columns[0]) == n_rows and not is_done:
            yield columns
            n_before += n_rows
            columns = [[] for _ in range(width)]
    if columns[0] or not n_before:
        yield columns


def _check_rows(
    chunk: list[list[str]], width: int, damage: str, line: int, n_before: int
) -> list[list[str]]:
    """Drop blank lines, and blank cells after the last column; other rows are damage."""
    rows: list[list[str]] = []
    for row in chunk:
        if row and len(row) != width and (len(row) < width or any(row[width:])):
            damage = f"expected {width} cells, got {len(row)}"
            break
        rows += [row[:width]] if row else []
        line += 1 + "".join(row).count("\n")  # a line more for every return inside a cell
    if damage:
        before = f", after the row of {ascii(rows[-1][0])[:40]}" if rows else ""
        raise _DamagedTableError(
            f"row {n_before + len(rows) + 1} (from line {line}{before}): {damage}; {_QUOTE}"
        )
    return rows


def _read_json(
    file: IO[bytes], keep: Collection[str] | None, n_rows: int | None
) -> Iterator[pd.DataFrame]:
    text, first_line, _ = _decode(file)
    is_list = first_line.lstrip().startswith("[")  # the whole file is one list of objects
    names: dict[str, None] = {}  # of all rows so far, in order
    with text:
        lines: Any = json.loads(text.read(), strict=False) if is_list else text
        rows = _read_objects(lines, is_list, keep)
        for place in itertools.count():
            chunk = list(itertools.islice(rows, 1 if n_rows == 0 else n_rows))
            if place and not chunk:
                break
            names |= dict.fromkeys(itertools.chain.from_iterable(chunk))
            given = list(names)
            picked = _pick(given, keep)
            table = {name: [row.get(given[p]) for row in chunk] for name, p in picked.items()}
            yield _make_table(table).iloc[: 0 if n_rows == 0 else None]


def _read_objects(
    lines: Iterable[Any], is_list: bool, keep: Collection[str] | None
) -> Iterator[dict[str, Any]]:
    n_before = 0
    for number, line in enumerate(lines, start=1):
        if not is_list and not line.strip():
            continue
        row = line if is_list else _read_object(line)
        if not isinstance(row, dict):
            raise _DamagedTableError(
                f"row {n_before + 1} (line {number}): expected a JSON object with the columns "
                f"as keys, got {ascii(line)[:60]}"
            )
        if keep is not None:
            row = {name: cell for name, cell in row.items() if name.strip() in keep}
        yield row
        n_before += 1


def _read_object(line: str) -> Any:
    try:
        return json.loads(line, strict=False)
    except (ValueError, RecursionError):
        return None


def _read_parquet(
    file: IO[bytes], keep: Collection[str] | None, n_rows: int | None
) -> Iterator[tuple[pd.DataFrame, float]]:
    """Tables and the share of all rows: pyarrow jumps about in the file, so its place says less."""
    # Which is slow in a packed one.
    source = file if isinstance(file, io.BufferedReader) else io.BytesIO(file.read())
    parquet = pq.ParquetFile(source)
    names = parquet.schema_arrow.names
    picked = _pick(names, keep)
    n_all, n_read = parquet.metadata.num_rows, 0
    if n_rows == 0:
        yield _make_table(dict.fromkeys(picked, ())), 0.0
    elif keep is None:
        yield parquet.read().to_pandas(), 1.0
    elif n_rows is None or not n_all:
        table = parquet.read(columns=[names[place] for place in picked.values()])
        yield _make_table({name: table[names[p]].to_pylist() for name, p in picked.items()}), 1.0
    else:
        kept = [names[place] for place in picked.values()]
        for batch in parquet.iter_batches(n_rows, columns=kept):
            cells = {name: batch[names[p]].to_pylist() for name, p in picked.items()}
            n_read += len(batch)
            yield _make_table(cells), n_read / n_all


def _make_table(columns: dict[str, Any]) -> pd.DataFrame:
    # Column by column: pandas would otherwise guess types.
    return pd.DataFrame({name: pd.Series(cells, dtype=object) for name, cells in columns.items()})
