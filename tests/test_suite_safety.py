"""What `make run` remembers, and that without FORCE=1 the suite removes no finished model."""

import json
import re

import numpy as np
import pytest

from src.utils.paths import SETTINGS
from tests.fake_suite import TRAINED, FakeSuite, read_models, write_stubs

REAL, TINY = "answerdotai/ModernBERT-base", "tiny:modernbert"


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    return write_stubs(tmp_path_factory.mktemp("stubs") / "notebooks")


def write_data(folder):
    folder.mkdir(parents=True)
    for name in ("train", "test", "sample_submission"):
        (folder / f"{name}.csv").write_text(str(folder.name))
    return folder


@pytest.fixture
def suite(tmp_path, stubs, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_data(tmp_path / "home/data/raw")
    write_data(tmp_path / "home/other")
    return FakeSuite(monkeypatch, tmp_path / "home", stubs)


@pytest.fixture
def full(suite):
    """The suite after a full run."""
    assert suite.run("--profile", "full", "--data", "data/raw")[1]
    return suite


def read_settings(suite):
    return json.loads((suite.root / "artifacts" / SETTINGS).read_text())


def test_a_run_remembers_what_was_named_with_absolute_paths(full):
    assert read_settings(full) == {"PROFILE": "full", "DATA": str(full.root / "data/raw")}


def test_a_later_run_stays_with_profile_and_data_and_says_so(full):
    printed, ended_well = full.run("--set", "04.LORA_RANK=64")
    assert ended_well
    assert full.ran["04_qwen"]["CHECKPOINT"].startswith("Qwen/")
    assert full.ran["04_qwen"]["OPTIONS"]["LORA_RANK"] == 64
    assert not {"01_eda", "02_baseline", "03_modernbert"} & {*full.ran}
    first = printed.splitlines()[0]
    for part in ("PROFILE=full", f"DATA={full.root / 'data/raw'}", "artifacts", "PROFILE=demo"):
        assert part in first


def test_other_data_keep_the_profile(full):
    printed, _ = full.run("--data", "other")
    assert "PROFILE=full" in printed.splitlines()[0] and "DATA=" in printed.splitlines()[0]
    assert full.ran["03_modernbert"]["CHECKPOINT"] == REAL
    assert read_settings(full)["DATA"] == str(full.root / "other")


def test_a_test_file_is_remembered_with_its_data_alone(full):
    (full.root / "t.csv").write_text("1")
    full.run("--test", "t.csv", "--only", "06")
    assert read_settings(full)["TEST"] == str(full.root / "t.csv")
    assert "TEST=" in full.run("--only", "06", "--list")[0]
    full.run("--data", "data/raw", "--only", "06")
    assert "TEST" not in read_settings(full)


def test_without_names_the_profile_follows_the_data(suite):
    printed, _ = suite.run("--data", "demo")
    assert printed.startswith("PROFILE=demo") and read_settings(suite) == {"DATA": "demo"}
    assert suite.ran["03_modernbert"]["MAX_TOKENS"] == 256
    printed, _ = suite.run("--data", "other")
    assert printed.startswith("PROFILE=small")
    assert suite.ran["03_modernbert"]["MAX_TOKENS"] == 512
    assert suite.run("--profile", "full")[1], "no profile was ever named: none is contradicted"


@pytest.mark.parametrize("only", ["", "03", "01-04", "04,05"])
@pytest.mark.parametrize("more", [(), ("--list",)])
def test_another_profile_than_that_of_finished_models_is_refused(full, only, more):
    before = {path: path.stat().st_mtime_ns for path in full.root.rglob("*")}
    printed, ended_well = full.run("--profile", "demo", "--only", only, *more)
    assert not ended_well
    for part in ("PROFILE=demo", "PROFILE=full", "ARTIFACTS=", "FORCE=1", "03_modernbert/model"):
        assert part in printed
    assert before == {path: path.stat().st_mtime_ns for path in full.root.rglob("*")}


def test_a_notebook_without_models_may_have_another_profile_once(full):
    assert full.run("--profile", "demo", "--only", "02,05")[1]
    assert read_settings(full)["PROFILE"] == "full"
    assert full.run("--profile", "demo", "--artifacts", "artifacts/other", "--data", "demo")[1]


def test_force_takes_another_profile(full):
    assert full.run("--profile", "small", "--force")[1]
    assert full.ran["03_modernbert"]["CHECKPOINT"] == TINY
    assert read_settings(full)["PROFILE"] == "small"
    assert len(list((full.root / "artifacts/03_modernbert/model").iterdir())) == 1


def test_a_list_changes_nothing(full):
    before = read_settings(full)
    assert full.run("--list", "--data", "other", "--set", "N_SEEDS=2")[1]
    assert read_settings(full) == before and not full.ran


def test_damaged_settings_stop_a_run(full):
    (full.root / "artifacts" / SETTINGS).write_text('{"PROFILE": ')
    printed, ended_well = full.run()
    assert not ended_well and SETTINGS in printed


def test_a_profile_by_path_is_remembered_absolute(suite):
    (suite.root / "mine.yaml").write_text("03: {CHECKPOINT: 'tiny:modernbert'}\n")
    assert suite.run("--profile", "mine.yaml", "--data", "demo")[1]
    assert read_settings(suite)["PROFILE"] == str(suite.root / "mine.yaml")


def test_a_kill_at_any_moment_is_not_taken_for_complete_and_the_run_resumes(full):
    change, n_kills = ("--set", "N_SEEDS=2 02.RIDGE=2"), 0
    ended_well = False
    while not ended_well:
        models = read_models(full.root / "artifacts")
        printed, ended_well = full.run(*change, kill_after=n_kills)
        assert models.items() <= read_models(full.root / "artifacts").items()
        listed, n_kills = full.run("--list", *change)[0], n_kills + 1
        started = {*re.findall(r"(\w+): runs", printed)}
        done = {*re.findall(r"(\w+): done", printed)}
        assert len(started - done) <= 1
        assert {*re.findall(r"(\w+): would run", listed)} >= started - done
    assert n_kills > 10
    assert full.run(*change)[0].count("up to date") == 7


# ── random sequences of commands ─────────────────────────────────────────────


def draw(rng, *choices):
    return choices[rng.integers(len(choices))]


def draw_options(rng):
    only = draw(rng, "", "", "", "02", "03", "03-05", "01-05", "04,05", "06,07")
    settings = (
        "04.LORA_RANK=64",
        "N_SEEDS=2",
        "FOLDS=[0,1]",
        "03.HEAD=contrast",
        "PREDICT_TOKENS=500",
    )
    options = {
        "--profile": draw(rng, "", "", "demo", "small", "full"),
        "--data": draw(rng, "", "", "demo", "data/raw", "other"),
        "--test": draw(rng, "", "", "", "other/test.csv"),
        "--set": draw(rng, "", "", *settings),
        "--only": only,
    }
    named = [part for pair in options.items() if pair[1] for part in pair]
    return options, named + draw(rng, *[[]] * 15, ["--force"])


def damage(rng, artifacts):
    files = sorted(file for file in artifacts.glob("0*/**/*") if file.is_file())
    if files:
        draw(rng, *files).unlink()


def expect_profile(options, memory):
    """What the profile of a run should be; the data decide where none was ever named."""
    data = options["--data"] or memory.get("DATA", "")
    return options["--profile"] or memory.get("PROFILE") or ("demo" if data == "demo" else "small")


CHECKPOINTS = {"demo": (TINY, 256), "small": (TINY, 512), "full": (REAL, 2048)}


@pytest.mark.slow
@pytest.mark.parametrize("first_seed", range(0, 100, 10))
def test_models_survive_random_commands_damage_and_kills(first_seed, tmp_path, stubs, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    n_trained = n_refused = 0
    for seed in range(first_seed, first_seed + 10):
        rng, home = np.random.default_rng(seed), tmp_path / str(seed)
        write_data(home / "data/raw")
        write_data(home / "other")
        suite, artifacts = FakeSuite(monkeypatch, home, stubs), home / "artifacts"
        for _ in range(rng.integers(4, 9)):
            if rng.random() < 0.3:
                damage(rng, artifacts)
            options, arguments = draw_options(rng)
            before = read_models(artifacts)
            memory = read_settings(suite) if (artifacts / SETTINGS).exists() else {}
            kill_after = int(rng.integers(60)) if rng.random() < 0.4 else None
            printed, _ = suite.run(*arguments, kill_after=kill_after)
            told = (seed, arguments, printed)
            if "--force" not in arguments:
                assert before.items() <= read_models(artifacts).items(), told
            if "03_modernbert" in suite.ran:
                profile, ran = expect_profile(options, memory), suite.ran["03_modernbert"]
                assert (ran["CHECKPOINT"], ran["MAX_TOKENS"]) == CHECKPOINTS[profile], told
                assert profile in (options["--profile"], "") or f"PROFILE={profile}" in printed
            n_trained += len(set(suite.ran) & {*TRAINED})
            n_refused += "ARTIFACTS=" in printed
        printed, ended_well = suite.run()
        assert ended_well, printed
        assert suite.run()[0].count("up to date") == 7
        monkeypatch.undo()
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert n_trained > 20 and n_refused > 0
