"""Claims about reading tables: file types, encodings, separators, and what is damaged."""

import codecs
import gzip
import json
import time
import zipfile

import numpy as np
import pandas as pd
import pytest

from src.utils.battles.files import iter_table, read_table
from src.utils.battles.readers import load_pairs
from src.utils.schema import LABELS, MODELS, TEXTS

COLUMNS = ["id", *MODELS, *TEXTS, *LABELS]


def csv_text(n_rows=3, separator=",", end="\n"):
    """A training file of the competition's layout."""
    lines = [separator.join(COLUMNS)]
    for number in range(1, n_rows + 1):
        texts = [f'"[""{name} {number}{separator} é""]"' for name in TEXTS]
        lines.append(separator.join([str(number), "x", "y", *texts, "1", "0", "0"]))
    return end.join(lines) + end


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_separators_line_ends_and_encodings_are_recognised(tmp_path, separator, end, encoding):
    path = tmp_path / "t.csv"
    path.write_bytes(csv_text(3, separator, end).encode(encoding))
    table = read_table(path)
    assert list(table.columns) == COLUMNS and table["id"].tolist() == ["1", "2", "3"]
    assert table["prompt"][2] == f'["prompt 3{separator} é"]'


def test_half_of_an_emoji_survives_in_utf16(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("id\n\ud83d\n".encode("utf-16", "surrogatepass"))
    assert read_table(path)["id"].tolist() == ["\ud83d"]


def test_a_return_in_a_quoted_or_bare_cell_is_text(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'id,a\r\n1,"x\r\ny\rz"\r\n\r\n2,bare \r return\r\n3,end')
    assert read_table(path)["a"].tolist() == ["x\r\ny\rz", "bare \r return", "end"]


def test_names_of_columns_are_stripped_and_only_asked_ones_are_kept(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("Unnamed: 0, id ,id2,\n0,1,2,\n")
    assert read_table(path, {"id", "none"}).to_dict("list") == {"id": ["1"]}
    assert list(read_table(path, header_only=True).columns) == ["Unnamed: 0", "id", "id2", ""]
    path.write_text("id,id \n1,2\n")
    with pytest.raises(ValueError, match="one column id"):
        read_table(path, {"id"})


def test_cells_beyond_the_header_are_dropped_where_they_are_empty(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("id,a\n1,x,,\n")
    assert read_table(path).to_dict("list") == {"id": ["1"], "a": ["x"]}


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.json"])
def test_json_lines_keep_python_values(tmp_path, name):
    rows = [{"id": 1, "a": ["x", None]}, {"id": 2, "b": "\u2028"}]
    text = json.dumps(rows) if name.endswith(".json") else "\n\n".join(map(json.dumps, rows))
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    table = read_table(tmp_path / name)
    assert table.to_dict("list") == {"id": [1, 2], "a": [["x", None], None], "b": [None, "\u2028"]}


def test_parquet_cells_are_python_values_where_columns_are_named(tmp_path):
    path = tmp_path / "t.parquet"
    pd.DataFrame({" id": [1, 2], "a": [None, "x"], "c": [1.5, 2]}).to_parquet(path)
    table = read_table(path, {"id", "a"})
    assert table.to_dict("list") == {"id": [1, 2], "a": [None, "x"]}
    assert list(read_table(path, header_only=True).columns) == ["id", "a", "c"]


def test_a_table_in_a_zip_is_read_whatever_its_type(tmp_path):
    pd.DataFrame({"id": ["1"]}).to_parquet(tmp_path / "t.parquet")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "t.parquet", "in/t.parquet")
        archive.writestr("in/t.csv.gz", gzip.compress(b"id\n1\n"))
    for name in ("t.parquet", "t.csv.gz"):
        assert read_table(tmp_path / "a.zip" / "in" / name, {"id"})["id"].tolist() == ["1"]
    with pytest.raises(ValueError, match=r"a\.zip.none\.csv: expected a readable table"):
        read_table(tmp_path / "a.zip" / "none.csv")


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.jsonl", "t.parquet"])
def test_pieces_are_of_the_size_asked_for_and_together_the_whole_file(tmp_path, name):
    table = pd.DataFrame({"id": [str(row) for row in range(23)], "a": ["é,\n"] * 23, "b": "x"})
    if name == "t.parquet":
        table.to_parquet(tmp_path / name)
    elif name == "t.jsonl":
        table.to_json(tmp_path / name, orient="records", lines=True)
    else:
        table.to_csv(tmp_path / name, index=False)
    pieces, shares = zip(*iter_table(tmp_path / name, {"id", "a"}, 10), strict=True)
    assert [len(piece) for piece in pieces] == [10, 10, 3]
    whole = pd.concat(pieces, ignore_index=True)
    pd.testing.assert_frame_equal(whole, read_table(tmp_path / name, {"id", "a"}))
    assert whole["id"].tolist() == table["id"].tolist()
    assert list(shares) == sorted(shares) and shares[0] > 0 and shares[-1] == 1.0


def test_the_share_that_was_read_grows_with_a_long_file(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(csv_text(20_000))
    shares = [share for _, share in iter_table(path, {"id"}, 5000)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.75, 1.0], atol=0.02)


def test_an_empty_table_is_one_piece_without_rows(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("id,a\n")
    (piece,) = [table for table, _ in iter_table(path, None, 5)]
    assert list(piece.columns) == ["id", "a"] and piece.empty


def test_damage_in_a_later_piece_comes_after_those_before_it_and_with_its_row(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(csv_text(25) + "26,x\n")
    pieces = iter_table(path, {"id"}, 10)
    assert [len(next(pieces)[0]) for _ in range(2)] == [10, 10]
    with pytest.raises(ValueError, match=r"t\.csv: row 26 .*after the row of '25'"):
        next(pieces)


# ---- damage ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (lambda t: t.replace('"[""prompt 2', "torn\n[prompt 2", 1), r"row 2 \(from line 3"),
        (lambda t: t.replace("\n2,", "\n2\n,"), r"row 2 \(from line 3, after the row of '1'"),
        (lambda t: t.replace('prompt 3, é""]"', 'prompt 3, é""]'), r"row 3 \(from line 4"),
        (lambda t: t.replace("\n3,", "\n3,3,"), r"row 3 .*expected 9 cells, got 10"),
        (lambda t: t[:-20], r"row 3"),
    ],
)
@pytest.mark.parametrize("n_before", [0, 700])
def test_a_torn_row_is_refused_with_its_number(tmp_path, damage, place, n_before):
    text = damage(csv_text())
    if n_before:
        first = csv_text(700).split("\n", 1)
        text = f"{first[0]}\n{first[1]}" + text.split("\n", 1)[1]
        place = place.split(" ")[0] + " 70" + place.split(" ")[1]
    (tmp_path / "torn.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"torn\.csv: {place}"):
        load_pairs(tmp_path / "torn.csv")


def spoil(data, seed):
    """One of a hundred kinds of damage."""
    rng = np.random.default_rng(seed)
    place, end = sorted(rng.integers(0, len(data), 2))
    extra = bytes(rng.choice([0, 10, 13, 34, 39, 44, 91, 92, 123, 255], 1 + seed % 7).tolist())
    kinds = (
        data[:place],
        data[:place] + data[end:],
        data[:place] + extra + data[place:],
        data[:place] + extra * 300 + data[end:],
        data[place:] + data[:place],
        data.replace(b'"', b"", 1 + seed % 5),
        data.replace(b"\n", extra, 1 + seed % 3),
        data + data[place:end],
        codecs.BOM_UTF16_LE + data,
        bytes(reversed(data)),
    )
    return kinds[seed % len(kinds)]


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.jsonl", "t.parquet", "t.zip"])
def test_a_hundred_kinds_of_damage_are_named_or_read_and_none_hangs(tmp_path, name):
    path = tmp_path / "whole.csv"
    path.write_text(csv_text(40))
    table = pd.read_csv(path)
    if name == "t.jsonl":
        data = table.to_json(orient="records", lines=True).encode()
    elif name == "t.parquet":
        table.to_parquet(tmp_path / name)
        data = (tmp_path / name).read_bytes()
    elif name == "t.zip":
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, "train.csv")
        data = (tmp_path / name).read_bytes()
    else:
        data = path.read_bytes() if name == "t.csv" else gzip.compress(path.read_bytes())
    damaged = tmp_path / name / "train.csv" if name == "t.zip" else tmp_path / name
    n_named = 0
    for seed in range(100):
        (tmp_path / name).write_bytes(spoil(data, seed))
        start = time.process_time()
        try:
            pairs, _ = load_pairs(damaged, quiet=True)
            assert set(pairs["label"]) <= {0, 1, 2} and len(pairs) <= 80
        except ValueError as error:
            assert name in str(error) or "training data" in str(error)
            n_named += 1
        assert time.process_time() - start < 5
    assert n_named > 30
