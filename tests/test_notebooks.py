"""All seven notebooks through the runner, small: complete outputs, a valid submission, symmetry."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src.utils.delivery import cli
from src.utils.delivery.predictor import Predictor
from src.utils.delivery.submit import check_submission
from src.utils.paths import REAL_DATA, ROOT
from src.utils.runs import hash_file
from src.utils.schema import LABELS
from src.utils.suite.pipeline import STAGES, files_under
from tests.conftest import NO_REAL_DATA, find_missing

pytestmark = pytest.mark.slow

TINY = ["02_baseline.N_TREES=20", "N_EPOCHS=0.5", "MAX_PAIRS=60", "FOLDS=[0]", "N_EVALS=1"]
TINY.append("05_ensemble.WRITE_SOFT_LABELS=True")
MINI_ARENA = ["01_eda.N_DEMO_BATTLES=300", "01_eda.N_DEMO_TEST=24"]
SUBMISSION = Path("06_kaggle_inference") / "submission.csv"


def run_suite(artifacts, *arguments, settings=()):
    command = [sys.executable, "-m", "src.utils.suite.run", "--artifacts", artifacts, *arguments]
    command += ["--set", *settings] if settings else []
    ran = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=1500
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-5000:]
    return ran.stdout


@pytest.fixture(scope="module")
def tiny_models(tiny_base):
    """Settings that give 03 and 04 tiny checkpoints with random weights instead of pretraining.

    02 does without word vectors where no package index is in reach.
    """
    without = ["02_baseline.WORD_VECTORS=none"] if find_missing("package:wordllama") else []
    bases = {"03_modernbert": "modernbert", "04_qwen": "qwen3"}
    return [
        *TINY,
        *without,
        *(f"{notebook}.CHECKPOINT={tiny_base(kind)}" for notebook, kind in bases.items()),
    ]


def swap_answers(test):
    return test.rename(columns={"response_a": "response_b", "response_b": "response_a"})[
        test.columns
    ]


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory, tiny_models):
    artifacts = tmp_path_factory.mktemp("demo")
    return artifacts, run_suite(
        artifacts, "--profile", "demo", settings=[*MINI_ARENA, *tiny_models]
    )


def test_every_notebook_keeps_its_promises(demo_run):
    artifacts, told = demo_run
    for stage in STAGES:
        assert f"{stage.name}: done" in told
        for promise in stage.outputs:
            assert files_under(artifacts / stage.name, promise), f"{stage.name}/{promise}"
    for name in ("02_baseline", "03_modernbert", "04_qwen", "05_ensemble"):
        assert np.isfinite(json.loads((artifacts / name / "metrics.json").read_text())["log_loss"])


def test_soft_labels_cover_every_battle_though_the_networks_held_out_one_fold(demo_run):
    artifacts, _ = demo_run
    soft = pd.read_parquet(artifacts / "05_ensemble" / "soft_labels.parquet")
    pairs = pd.read_parquet(artifacts / "01_eda" / "pairs.parquet")
    assert soft["id"].tolist() == pairs["id"].tolist()
    assert (soft["members"][pairs["fold"] != 0] == "02_baseline").all()


def test_the_submission_is_valid(demo_run):
    artifacts, _ = demo_run
    test = pd.read_csv(artifacts / "01_eda" / "arena" / "test.csv")
    assert len(test) == 24
    check_submission(pd.read_csv(artifacts / SUBMISSION), test["id"].to_numpy())


def test_a_second_run_skips_everything(demo_run, tiny_models):
    artifacts, _ = demo_run
    told = run_suite(artifacts, "--profile", "demo", settings=[*MINI_ARENA, *tiny_models])
    assert told.count(": up to date") == len(STAGES)


def test_another_fold_more_seeds_and_a_refit_add_models_and_all_are_used(
    demo_run, tiny_models, tmp_path
):
    artifacts = shutil.copytree(demo_run[0], tmp_path / "artifacts")
    models = artifacts / "03_modernbert" / "model"
    before = {file: hash_file(file) for file in models.rglob("*.safetensors")}
    changes = ["FOLDS=[1]", "03_modernbert.N_SEEDS=2", "REFIT=True", "PREDICT_TOKENS=200"]
    settings = [*MINI_ARENA, *tiny_models, *changes]
    run_suite(artifacts, "--profile", "demo", "--only", "03-07", settings=settings)
    names = ["fold_0", "fold_1", "fold_1_seed_1", "refit"]
    assert sorted(path.name for path in models.iterdir()) == names
    assert {file: hash_file(file) for file in before} == before
    for name in ("03_modernbert", "04_qwen"):
        config = json.loads((artifacts / name / "config.json").read_text())
        metrics = json.loads((artifacts / name / "metrics.json").read_text())
        held_out = pd.read_parquet(artifacts / name / "oof.parquet")
        assert config["folds"] == [0, 1] and config["refit"]
        assert metrics["n_pairs"] == len(held_out) and set(held_out["fold"]) == {0, 1}
        assert 0 < metrics["swap_gap"] < 0.5
    test = pd.read_csv(artifacts / "01_eda" / "arena" / "test.csv")
    check_submission(pd.read_csv(artifacts / SUBMISSION), test["id"].to_numpy())


def test_exchanging_the_answers_exchanges_the_columns(demo_run, tmp_path):
    artifacts = shutil.copytree(demo_run[0], tmp_path / "artifacts")
    given = pd.read_csv(artifacts / SUBMISSION)
    swapped = swap_answers(pd.read_csv(artifacts / "01_eda" / "arena" / "test.csv"))
    swapped.to_csv(tmp_path / "test.csv", index=False)
    run_suite(artifacts, "--profile", "demo", "--only", "06", "--test", tmp_path / "test.csv")
    a, b, tie = LABELS
    mirrored = pd.read_csv(artifacts / SUBMISSION).rename(columns={a: b, b: a})[["id", a, b, tie]]
    np.testing.assert_allclose(mirrored[list(LABELS)], given[list(LABELS)], atol=1e-5)
    assert not np.allclose(given[a], given[b]), (
        "a submission that ignores the answers would pass as well"
    )


def test_real_battles_go_through(tmp_path, tiny_models):
    if not (REAL_DATA / "arena_sample.csv").exists():
        pytest.skip(NO_REAL_DATA)
    pd.read_csv(REAL_DATA / "arena_sample.csv").head(60).to_csv(tmp_path / "rows.csv", index=False)
    run_suite(
        tmp_path / "artifacts",
        "--data",
        tmp_path / "rows.csv",
        "--test",
        REAL_DATA / "test.csv",
        settings=tiny_models,
    )
    expected = pd.read_csv(REAL_DATA / "sample_submission.csv")["id"].to_numpy()
    check_submission(pd.read_csv(tmp_path / "artifacts" / SUBMISSION), expected)


def test_the_command_and_the_page_give_the_probabilities_of_06(demo_run, tmp_path):
    artifacts, _ = demo_run
    test = artifacts / "01_eda" / "arena" / "test.csv"
    output = tmp_path / "probs.csv"
    assert cli.main(["--model", str(artifacts), str(test), "-o", str(output)]) == 0
    expected = pd.read_csv(artifacts / SUBMISSION).set_index("id")[list(LABELS)]
    found = pd.read_csv(output).set_index("id").loc[expected.index, list(LABELS)]
    assert np.abs(found - expected).to_numpy().max() < 1e-6
    playground = pytest.importorskip("src.utils.delivery.playground", reason="make play")
    predictor = Predictor(artifacts)
    predictor.load_networks(ask_all=True)
    table = playground.score_file(predictor, test)[0].astype({"id": expected.index.dtype})
    found = table.set_index("id").loc[expected.index, list(LABELS)]
    assert np.abs(found - expected).to_numpy().max() < 1e-6
