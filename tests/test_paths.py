"""Claims about finding the data, at home and on Kaggle."""

import zipfile
from pathlib import Path

import pytest

from src.utils import paths


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without data."""
    monkeypatch.setattr(paths, "ROOT", tmp_path / "home")
    monkeypatch.setenv("ARENA_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    return tmp_path


def make_files(folder: Path, *names: str) -> Path:
    """A folder with empty files of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("suffix", paths.TABLE_SUFFIXES)
def test_a_folder_in_the_competitions_layout_is_understood(tmp_path: Path, suffix: str) -> None:
    folder = make_files(
        tmp_path / "given", f"train{suffix}", f"test{suffix}", f"sample_submission{suffix}", "x.csv"
    )
    source = paths.find_raw_data(str(folder))
    assert source.kind == "given"
    assert source.train == (folder / f"train{suffix}",)
    assert source.test == folder / f"test{suffix}"
    assert source.sample_submission == folder / f"sample_submission{suffix}"


def test_a_folder_without_train_gives_its_other_tables(tmp_path: Path) -> None:
    folder = make_files(
        tmp_path / "given", "b.csv", "a.csv", "test.csv", "sample_submission.csv", "README.md"
    )
    assert [path.name for path in paths.find_raw_data(str(folder)).train] == ["a.csv", "b.csv"]


@pytest.mark.parametrize("joint", [" ", " | "])
def test_one_or_several_files_may_be_named(tmp_path: Path, joint: str) -> None:
    folder = make_files(tmp_path / "given", "a.csv", "b.csv", "test.csv")
    source = paths.find_raw_data(joint.join([str(folder / "a.csv"), str(folder / "b.csv")]))
    assert [path.name for path in source.train] == ["a.csv", "b.csv"]
    assert source.test == folder / "test.csv"
    assert paths.find_raw_data(str(folder / "a.csv")).train == (folder / "a.csv",)


def test_paths_may_hold_spaces(tmp_path: Path) -> None:
    folder = make_files(tmp_path / "my data", "a.csv", "b.csv")
    assert paths.find_raw_data(str(folder / "a.csv")).train == (folder / "a.csv",)
    assert len(paths.find_raw_data(f"{folder / 'a.csv'} | {folder / 'b.csv'}").train) == 2


def test_a_test_file_of_its_own_wins(tmp_path: Path) -> None:
    folder = make_files(tmp_path / "given", "train.csv", "test.csv")
    other = make_files(tmp_path / "o", "t.csv", "train.csv", "sample_submission.csv")
    assert paths.find_raw_data(str(folder), str(other / "t.csv")) == paths.RawData(
        "given", (folder / "train.csv",), other / "t.csv", other / "sample_submission.csv"
    )


@pytest.mark.parametrize("data", ["missing", "missing.csv", "a.csv missing.csv"])
def test_a_path_that_is_not_there_is_named(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_files(tmp_path / "cwd", "a.csv"))
    with pytest.raises(FileNotFoundError, match="missing"):
        paths.find_raw_data(data)
    with pytest.raises(FileNotFoundError, match=r"missing_test\.csv"):
        paths.find_raw_data("", "missing_test.csv")


def test_with_nothing_named_raw_data_come_before_the_demo(tmp_path: Path) -> None:
    assert paths.find_raw_data() == paths.RawData("demo", (), None, None)
    arena = make_files(tmp_path / "artifacts" / "01_eda" / "arena", "train.csv", "test.csv")
    assert paths.find_raw_data().train == (arena / "train.csv",)
    raw = make_files(tmp_path / "home" / "data" / "raw", "train.csv")
    assert paths.find_raw_data().train == (raw / "train.csv",)


@pytest.mark.parametrize(
    "mount", ["llm-classification-finetuning", "competitions/llm-classification-finetuning"]
)
def test_both_layouts_of_kaggles_inputs_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mount: str
) -> None:
    monkeypatch.setattr(paths, "KAGGLE_INPUT", tmp_path / "input")
    monkeypatch.setattr(paths, "KAGGLE_WORKING", make_files(tmp_path / "working"))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    folder = make_files(
        tmp_path / "input" / mount, "train.csv", "test.csv", "sample_submission.csv"
    )
    model = make_files(
        tmp_path / "input" / "datasets" / "me" / "arena" / "02_baseline", "metrics.json"
    )
    assert paths.find_raw_data().test == folder / "test.csv"
    assert paths.find_run("02_baseline") == model
    assert paths.find_run("03_modernbert") is None
    assert paths.submission_path(tmp_path / "run") == tmp_path / "working" / "submission.csv"


def test_an_unfinished_run_is_not_found(tmp_path: Path) -> None:
    folder = paths.run_dir("02_baseline")
    assert folder == tmp_path / "artifacts" / "02_baseline"
    assert paths.submission_path(folder) == folder / "submission.csv"
    assert paths.find_run("02_baseline") is None
    make_files(folder, "metrics.json")
    assert paths.find_run("02_baseline") == folder


def test_the_profile_follows_the_battles() -> None:
    assert paths.choose_profile("auto") == "full"
    make_files(paths.run_dir("01_eda"), "truth.parquet")
    assert paths.choose_profile("auto") == "demo"
    assert paths.choose_profile("none") == "none"


def test_the_profile_that_the_last_run_named_comes_before_the_battles(tmp_path: Path) -> None:
    make_files(paths.run_dir("01_eda"), "truth.parquet")
    remembered = '{"PROFILE": "full", "DATA": "/somewhere"}'
    (tmp_path / "artifacts" / paths.SETTINGS).write_text(remembered)
    assert paths.choose_profile("auto") == "full"
    assert paths.choose_profile("small") == "small"
    other = make_files(tmp_path / "other" / "01_eda", "truth.parquet").parent
    assert paths.choose_profile("auto", other) == "demo"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"PROFILE": 3}', '{"PROFIL": "full"}', "null", '"full"']
)
def test_damaged_settings_are_named(tmp_path: Path, text: str) -> None:
    assert paths.read_remembered(tmp_path) == {}
    (tmp_path / paths.SETTINGS).write_text(text)
    with pytest.raises(ValueError, match=r"settings\.json: .*PROFILE.*delete"):
        paths.read_remembered(tmp_path)


def test_demo_names_the_demo_arena_beside_raw_data(tmp_path: Path) -> None:
    make_files(tmp_path / "home" / "data" / "raw", "train.csv")
    assert paths.find_raw_data("demo") == paths.RawData("demo", (), None, None)
    arena = make_files(tmp_path / "artifacts" / "01_eda" / "arena", "train.csv")
    assert paths.find_raw_data(" demo ").train == (arena / "train.csv",)


def test_paths_are_made_absolute_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_files(tmp_path / "cwd", "a.csv", "b.csv", "c d.csv"))
    here = tmp_path / "cwd"
    assert paths.make_absolute("a.csv b.csv") == f"{here / 'a.csv'} | {here / 'b.csv'}"
    assert paths.make_absolute("c d.csv") == str(here / "c d.csv")
    assert paths.make_absolute("../cwd") == str(here)
    with pytest.raises(FileNotFoundError, match="missing"):
        paths.make_absolute("missing")
    assert [paths.make_absolute(text) for text in ("", "demo")] == ["", "demo"]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (
            "Qwen/Qwen3-4B-Instruct-2507",
            "models/wowfattie/qwen3-4b-instruct-2507/transformers/default/1",
        ),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3-4b-instruct-2507/transformers/default/1"),
        ("answerdotai/ModernBERT-base", "models/answer-ai/modernbert/transformers/base/2"),
    ],
)
def test_an_attached_checkpoint_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    monkeypatch.setattr(paths, "KAGGLE_INPUT", tmp_path / "input")
    monkeypatch.setattr(paths, "KAGGLE_WORKING", make_files(tmp_path / "working"))
    assert paths.find_checkpoints(name) == []
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    files = ("config.json", "model-00001-of-00002.safetensors")
    make_files(tmp_path / "input" / "qwen-3" / "transformers" / "4b" / "1", *files)
    make_files(tmp_path / "input" / "no-weights" / place, "config.json")
    folder = make_files(tmp_path / "input" / place, *files)
    assert paths.find_checkpoints(name) == [folder]


def test_the_checkpoint_with_the_very_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "KAGGLE_INPUT", tmp_path)
    monkeypatch.setattr(paths, "KAGGLE_WORKING", tmp_path)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    longer = make_files(tmp_path / "qwen3-4b-awq", "config.json", "model.safetensors")
    exact = make_files(tmp_path / "z" / "Qwen3_4B", "config.json", "model.safetensors")
    assert paths.find_checkpoints("Qwen/Qwen3-4B") == [exact, longer]


def test_zips_are_read_like_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_files(tmp_path / "given", "a.csv")
    for name, members in (("k.zip", ["train.csv", "test.csv"]), ("t.csv.zip", ["in/t.csv"])):
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member in members:
                archive.writestr(member, "")
    k, t = folder / "k.zip", folder / "t.csv.zip"
    assert paths.find_raw_data(str(k)).test == k / "test.csv"
    assert paths.find_raw_data(str(t)).train == (t / "in" / "t.csv",)
    assert paths.find_raw_data(f"{folder / 'a.csv'} {k} {t}").train == (
        *(folder / "a.csv", k / "train.csv", t / "in" / "t.csv"),
    )
    assert paths.find_raw_data(str(folder / "a.csv"), str(k)).test == k / "test.csv"
    assert paths.make_absolute(str(k)) == str(k)
    assert paths.make_absolute(f"{k} {t}") == f"{k / 'train.csv'} | {t / 'in' / 't.csv'}"
    raw = make_files(tmp_path / "home" / "data" / "raw")
    k.rename(raw / "k.zip")
    assert paths.find_raw_data().train == (raw / "k.zip" / "train.csv",)
    (raw / "k.zip").write_bytes(b"PK, but cut")
    with pytest.raises(ValueError, match=r"k\.zip: expected a zip"):
        paths.find_raw_data()
