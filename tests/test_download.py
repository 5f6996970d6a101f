"""Downloading the battles: one source after another, completely or not at all."""

import subprocess
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from src.utils.battles import download as module
from src.utils.battles.download import SETS, download
from src.utils.schema import LABELS, MODELS, PAIR_COLUMNS

HEADER = ",".join([*PAIR_COLUMNS, *MODELS, *LABELS]) + "\n"


def give(**files):
    def write(folder):
        for stem, text in files.items():
            (folder / f"{stem}.csv").write_text(text)

    return write


def fail(folder):
    (folder / "train.csv").write_text("half a fi")
    raise TimeoutError("network is down")


def test_the_first_source_that_works_is_used(tmp_path):
    second = give(train=HEADER, test="id\n")
    sources = {"first": fail, "second": second, "third": give(train="not asked")}
    assert download(tmp_path, sources) == "second"
    assert (tmp_path / "train.csv").read_text() == HEADER
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.csv", "train.csv"]


def test_a_failed_download_writes_nothing_and_names_the_reason_and_the_remedy(tmp_path):
    with pytest.raises(ConnectionError, match=r"(?s)network is down.*kaggle\.com") as error:
        download(tmp_path, {"Kaggle": fail})
    assert str(tmp_path) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_is_not_the_competitions_is_refused(tmp_path):
    with pytest.raises(ConnectionError, match=r"missing .*winner_tie"):
        download(tmp_path, {"page": give(train="<html>please sign in</html>\n")})
    with pytest.raises(ConnectionError, match=r"train\.csv .*found none"):
        download(tmp_path, {"empty": give(test="id\n")})
    assert list(tmp_path.iterdir()) == []


def test_existing_battles_are_kept(tmp_path):
    (tmp_path / "train.csv").write_text(HEADER)
    assert download(tmp_path, {"Kaggle": fail}) == ""


def test_an_archive_is_unpacked(tmp_path):
    def write(folder):
        with zipfile.ZipFile(folder / "all.zip", "w") as archive:
            archive.writestr("train.csv", HEADER)

    download(tmp_path, {"Kaggle": write})
    assert (tmp_path / "train.csv").read_text() == HEADER


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ("Authentication required to call the Kaggle API", PermissionError, "kaggle auth login"),
        ("Downloading\n403 - accept the rules", ConnectionError, "^403 - accept the rules$"),
        ("", ConnectionError, "exit code 1"),
    ],
)
def test_a_failure_of_the_kaggle_command_is_reported(tmp_path, monkeypatch, output, error, message):
    ran = subprocess.CompletedProcess([], 1, output, "")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: ran)
    with pytest.raises(error, match=message):
        module.download_from_kaggle(tmp_path)


@pytest.mark.parametrize("source", [fail, give(train=HEADER)])
def test_the_command_reports_what_happened(tmp_path, monkeypatch, capsys, source):
    monkeypatch.setattr(module.paths, "ROOT", tmp_path)
    monkeypatch.setattr(module, "list_sources", lambda battles: {"hub": source})
    is_down = source is fail
    assert module.main() == int(is_down)
    out, err = capsys.readouterr()
    assert ("network is down" in err) == is_down
    assert ("test rows" in out) == ("from hub" in out) == (not is_down)
    assert (tmp_path / "data" / "raw" / "train.csv").exists() == (not is_down)


# ── sets by name ──────────────────────────────────────────────────────────────────────


def write_part(path, columns, n_rows=3, start=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.DataFrame(
        {name: [f"{name} {start + row}" for row in range(n_rows)] for name in columns}
    )
    rows.to_parquet(path, index=False)


def fake_hub(monkeypatch, write):
    """Replace the hub by `write(folder)`; returns what it was asked for."""
    asked = {}

    def snapshot_download(repository, local_dir, **options):
        asked.update(options, repository=repository)
        write(Path(local_dir))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("name", [name for name, battles in SETS.items() if battles.hub])
def test_a_set_comes_from_the_hub_with_licence_and_citation(tmp_path, monkeypatch, capsys, name):
    battles = SETS[name]

    def write(folder):
        if battles.pattern == "train.csv":
            (folder / "train.csv").write_text(HEADER)
        else:
            write_part(folder / "data" / "human-0.parquet", battles.columns)

    def no_account(folder, competition):
        raise PermissionError(competition)

    asked = fake_hub(monkeypatch, write)
    monkeypatch.setattr(module, "download_from_kaggle", no_account)
    monkeypatch.setattr(module.paths, "ROOT", tmp_path)
    assert module.main([name]) == 0
    out = capsys.readouterr().out
    said = {line.split(": ", 1)[-1] for line in out.splitlines()}
    assert {battles.licence, battles.citation, battles.page} <= said
    assert asked == {
        "repository": battles.hub,
        "repo_type": "dataset",
        "allow_patterns": battles.pattern,
    }
    folder = tmp_path / "data" / ("raw" if name == "competition" else name)
    (train,) = folder.iterdir()
    assert train.stem == "train"
    assert module.main([name]) == 0 and "already there" in capsys.readouterr().out


def test_wsdm_comes_from_kaggle_with_its_test_rows(tmp_path, monkeypatch):
    def write(folder, competition):
        assert competition == "wsdm-cup-multilingual-chatbot-arena"
        write_part(folder / "train.parquet", SETS["wsdm"].columns)
        write_part(folder / "test.parquet", ["id"])
        (folder / "sample_submission.csv").write_text("id,winner\n")

    monkeypatch.setattr(module, "download_from_kaggle", write)
    monkeypatch.setattr(module.paths, "ROOT", tmp_path)
    assert module.main(["wsdm"]) == 0
    names = sorted(path.name for path in (tmp_path / "data" / "wsdm").iterdir())
    assert names == ["sample_submission.csv", "test.parquet", "train.parquet"]


def test_parts_are_joined_in_order_and_other_tables_left_out(tmp_path):
    battles = SETS["arena-140k"]

    def write(folder):
        write_part(folder / "data" / "train-1.parquet", battles.columns, start=3)
        write_part(folder / "data" / "train-0.parquet", battles.columns)
        write_part(folder / "data" / "embeddings.parquet", ["vector"])

    assert download(tmp_path, {"the hub": write}, battles) == "the hub"
    assert [path.name for path in tmp_path.iterdir()] == ["train.parquet"]
    rows = pd.read_parquet(tmp_path / "train.parquet")
    assert rows["winner"].tolist() == [f"winner {row}" for row in range(6)]


def test_a_part_that_is_cut_off_leaves_nothing(tmp_path):
    battles = SETS["arena-140k"]

    def write(folder):
        for part in range(2):
            write_part(folder / f"train-{part}.parquet", battles.columns)
        content = (folder / "train-1.parquet").read_bytes()
        (folder / "train-1.parquet").write_bytes(content[: len(content) // 2])

    with pytest.raises(ConnectionError, match=r"huggingface\.co/datasets/lmarena-ai") as error:
        download(tmp_path, {"the hub": write}, battles)
    assert f"DATA={tmp_path}" in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_set_with_other_columns_is_refused(tmp_path):
    def write(folder):
        write_part(folder / "train-0.parquet", ["prompt", "chosen"])

    with pytest.raises(ConnectionError, match=r"missing \['model_a'"):
        download(tmp_path, {"the hub": write}, SETS["arena-100k"])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        module.main(["arena-200k"])
    error = capsys.readouterr().err
    assert "arena-200k" in error and all(name in error for name in SETS)


@pytest.mark.parametrize(
    ("typed", "exported", "asked"), [("wsdm", "", '"wsdm"'), ("", "my-computer", "")]
)
def test_a_name_counts_only_where_it_is_typed(tmp_path, monkeypatch, typed, exported, asked):
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    monkeypatch.setenv("NAME", exported)
    (tmp_path / ".ready").touch()
    command = ["make", "--dry-run", "data", f"VENV={tmp_path}", *([f"NAME={typed}"] * bool(typed))]
    ran = subprocess.run(command, cwd=module.paths.ROOT, capture_output=True, text=True)
    # Under `make test` it also prints which folder it enters and leaves.
    (line,) = [line for line in ran.stdout.splitlines() if "battles.download" in line]
    assert line.split("battles.download")[1].strip() == asked, ran.stderr
