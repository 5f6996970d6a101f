import subprocess
import zipfile

import pytest

from src.utils.battles import download as module
from src.utils.battles.download import fetch
from src.utils.schema import LABELS, MODELS, PAIR_COLUMNS

HEADER = ",".join([*PAIR_COLUMNS, *MODELS, *LABELS]) + "\n"


def give(**files):
    def download(folder):
        for stem, text in files.items():
            (folder / f"{stem}.csv").write_text(text)

    return download


def refuse(folder):
    (folder / "train.csv").write_text("half a fi")
    raise TimeoutError("network is down")


def test_the_first_source_that_answers_is_taken(tmp_path):
    sources = {
        "first": refuse,
        "second": give(train=HEADER, test="id\n"),
        "third": give(train="not asked"),
    }
    assert fetch(tmp_path, sources) == "second"
    assert (tmp_path / "train.csv").read_text() == HEADER
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.csv", "train.csv"]


def test_a_failed_download_leaves_nothing_and_says_what_to_do_by_hand(tmp_path):
    with pytest.raises(
        ConnectionError, match=r"(?s)network is down.*by hand.*kaggle\.com"
    ) as error:
        fetch(tmp_path, {"Kaggle": refuse})
    assert str(tmp_path) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_is_not_the_competitions_is_refused(tmp_path):
    with pytest.raises(ConnectionError, match=r"missing .*winner_tie"):
        fetch(tmp_path, {"page": give(train="<html>please sign in</html>\n")})
    assert not (tmp_path / "train.csv").exists()


def test_battles_that_are_there_are_left_alone(tmp_path):
    (tmp_path / "train.csv").write_text(HEADER)
    assert fetch(tmp_path, {"Kaggle": refuse}) == ""


def test_an_archive_is_unpacked(tmp_path):
    def download(folder):
        with zipfile.ZipFile(folder / "all.zip", "w") as archive:
            archive.writestr("train.csv", HEADER)

    fetch(tmp_path, {"Kaggle": download})
    assert (tmp_path / "train.csv").read_text() == HEADER


def test_kaggle_without_credentials_is_named(tmp_path, monkeypatch):
    kagglehub = pytest.importorskip("kagglehub.config")
    monkeypatch.setattr(kagglehub, "get_kaggle_credentials", lambda: None)
    with pytest.raises(PermissionError, match="no Kaggle credentials"):
        module.download_from_kaggle(tmp_path)


@pytest.mark.parametrize(
    ("told", "code", "error"),
    [
        (
            "Authentication required to call the Kaggle API.\n\n  kaggle auth login",
            1,
            PermissionError,
        ),
        ("Downloading\n403 - accept the rules", 1, ConnectionError),
    ],
)
def test_a_failure_of_the_kaggle_command_is_told(tmp_path, monkeypatch, told, code, error):
    ran = subprocess.CompletedProcess([], code, told, "")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: ran)
    with pytest.raises(error, match=r"kaggle auth login|^403 - accept the rules$"):
        module.download_with_cli(tmp_path)


def test_the_command_fails_where_nothing_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.paths, "ROOT", tmp_path)
    monkeypatch.setattr(module, "fetch", lambda folder: fetch(folder, {"Kaggle": refuse}))
    assert module.main() == 1
    assert "by hand" in capsys.readouterr().err


def test_the_command_tells_of_missing_test_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.paths, "ROOT", tmp_path)
    monkeypatch.setattr(module, "fetch", lambda folder: fetch(folder, {"hub": give(train=HEADER)}))
    assert module.main() == 0
    assert "no test rows" in capsys.readouterr().out
