"""Downloading the battles: one source after another, completely or not at all."""

import subprocess
import zipfile

import pytest

from src.utils.battles import download as module
from src.utils.battles.download import download
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


def test_missing_kaggle_credentials_are_named(tmp_path, monkeypatch):
    kagglehub = pytest.importorskip("kagglehub.config")
    monkeypatch.setattr(kagglehub, "get_kaggle_credentials", lambda: None)
    with pytest.raises(PermissionError, match="KAGGLE_API_TOKEN"):
        module.download_from_kaggle(tmp_path)


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
        module.download_with_cli(tmp_path)


@pytest.mark.parametrize("source", [fail, give(train=HEADER)])
def test_the_command_reports_what_happened(tmp_path, monkeypatch, capsys, source):
    monkeypatch.setattr(module.paths, "ROOT", tmp_path)
    monkeypatch.setattr(module, "download", lambda folder: download(folder, {"hub": source}))
    is_down = source is fail
    assert module.main() == int(is_down)
    out, err = capsys.readouterr()
    assert ("network is down" in err) == is_down
    assert ("test rows" in out) == ("from hub" in out) == (not is_down)
