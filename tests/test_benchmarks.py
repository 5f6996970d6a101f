"""Claims about the benchmarks: what they count, and that they run on a handful of rows."""

import os
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer, Qwen3Config

from benchmarks import baseline, inference, standin, training
from src.utils.battles.demo import make_battles
from src.utils.config import BaselineConfig, DecoderConfig
from src.utils.paths import ROOT
from src.utils.runs import read_json, write_json
from src.utils.stats.scores import log_loss

DECODER = Qwen3Config(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    pad_token_id=0,
)
LENGTHS = np.array([5, 1, 9, 3, 3, 7, 2])


@pytest.mark.parametrize(
    ("n_rows", "is_packed"), [(8, False), (4, False), (1, False), (0, False), (0, True)]
)
def test_every_way_trains_on_every_row_once(n_rows, is_packed):
    batches = training.plan(LENGTHS, n_rows, 12, is_packed)
    assert sorted(np.concatenate(batches)) == list(range(len(LENGTHS)))
    assert all(len(batch) <= n_rows for batch in batches) or not n_rows
    if is_packed:
        assert all(LENGTHS[batch].sum() <= 12 for batch in batches)


def test_the_share_of_padding_is_that_of_the_padded_tokens():
    assert training.padding_share(LENGTHS[:2], [np.array([0, 1])]) == pytest.approx(0.4)
    assert training.padding_share(LENGTHS, [np.array([row]) for row in range(len(LENGTHS))]) == 0


def test_the_figures_can_show_a_way_that_memory_did_not_hold(tmp_path):
    row = {"rows_per_second": 2.0, "peak_mib": 900.0}
    ways = {"ours": row, "theirs": {"rows_per_second": None, "peak_mib": None}}
    training.draw({"a model on a GPU": {"dtype": "bfloat16", "ways": ways}}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "training_throughput.png",
        "training_memory.png",
    }


def test_a_quantised_decoder_is_trained_packed_and_padded(tiny_base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base("qwen3"))
    shape = Qwen3Config(**DECODER.to_dict() | {"vocab_size": len(tokenizer)})
    config = DecoderConfig(max_tokens=64, predict_tokens=64, tokens_per_batch=128)
    folder = training.write_checkpoint(
        training.Setup(shape, config, n_rows=5), tokenizer, tmp_path / "base"
    )
    rows = [[5, 6, 7] * n for n in (1, 9, 2, 4, 3)]
    ours, theirs = (training.measure(way, folder, config, rows) for way in ("ours", "4 at a time"))
    assert ours["padding_share"] == 0 < theirs["padding_share"]
    assert ours["rows_per_second"] > 0 and theirs["rows_per_second"] > 0


def test_inference_is_compared_with_ours():
    probs = np.full((2, 3), 1 / 3)
    ways = {
        name: {"probs": probs, "rows_per_second": speed}
        for name, speed in (("ours", 6.0), ("theirs", 2.0))
    }
    inference.compare(ways)
    assert ways["theirs"] == {
        "rows_per_second": 2.0,
        "largest_difference": 0.0,
        "speed_of_ours": 3.0,
    }


def test_hours_on_a_gpu_are_projected_only_from_a_gpu():
    ways = {"ours": {"rows_per_second": 10.0}}
    assert inference.project(ways, on_gpu=False)["hours_on_two_gpus"] is None
    assert inference.project(ways, on_gpu=True)["hours_on_two_gpus"] == pytest.approx(
        50_000 / 10 / 3600 / 2
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n_ways"), [("training", 4), ("inference", 3), ("tokenising", 3)])
def test_a_benchmark_runs_on_four_rows_and_records_nothing(name, n_ways):
    result = ROOT / "benchmarks" / "results" / f"{name}.json"
    before = result.read_bytes() if result.exists() else None
    command = [sys.executable, "-m", f"benchmarks.{name}", "--rows", "4"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.count("rows/s") == n_ways
    assert (result.read_bytes() if result.exists() else None) == before


@pytest.fixture(scope="module")
def demo_pairs():
    return make_battles(240, seed=0)[0]


@pytest.fixture(scope="module")
def stand_in(demo_pairs):
    return standin.make_battles(demo_pairs, 4000, seed=1)


def test_votes_of_the_stand_in_are_drawn_from_its_truth(stand_in):
    battles, truth, equal = stand_in
    votes = np.bincount(battles["label"], minlength=3) / len(battles)
    assert votes == pytest.approx(truth.mean(axis=0), abs=0.025)
    assert truth[:, 2].mean() == pytest.approx(standin.TIE_SHARE, abs=1e-6)
    labels = battles["label"].to_numpy()
    entropy = -(truth * np.log(truth)).sum(axis=1).mean()
    assert log_loss(truth, labels) == pytest.approx(entropy, abs=0.025)
    # Who is the author decides some votes.
    assert log_loss(truth, labels) + 0.005 < log_loss(equal, labels) < 1.09


def test_the_stand_in_rewrites_its_source(demo_pairs, stand_in):
    again = standin.make_battles(demo_pairs, 4000, seed=1)
    assert again[0].equals(stand_in[0]) and (again[1] == stand_in[1]).all()
    assert not set(stand_in[0]["response_a"]) & set(demo_pairs["response_a"])
    assert stand_in[0]["response_a"].nunique() > 3900


def test_an_excess_is_what_votes_are_expected_to_cost_above_the_oracle(stand_in):
    battles, truth, equal = stand_in
    scored = baseline.score_excess(battles, equal, truth)
    expected = -(truth * np.log(equal)).sum(axis=1) + (truth * np.log(truth)).sum(axis=1)
    assert scored["excess"] == pytest.approx(expected.mean())
    assert 0 < scored["low"] < scored["excess"] < scored["high"]
    assert baseline.score_excess(battles, truth, truth)["excess"] == 0


def test_a_version_is_compared_with_the_losses_kept_of_an_earlier_one(demo_pairs, tmp_path):
    path = tmp_path / "before.csv"
    assert baseline.read_earlier(path, demo_pairs) == {}
    rows = np.linspace(0.5, 1.5, len(demo_pairs))
    baseline.keep_losses(path, "v1", demo_pairs, rows)
    assert str(demo_pairs["id"].iloc[0]) not in path.read_text()
    shuffled = demo_pairs.sample(frac=1, random_state=0)
    order = demo_pairs.index.get_indexer(shuffled.index)
    earlier = baseline.read_earlier(path, shuffled)
    assert earlier["CPU baseline v1"] == pytest.approx(rows[order])
    losses = {baseline.PRIOR: rows[order] + 0.1, baseline.THIRTEEN: rows[order]}
    losses[baseline.BLEND] = rows[order] - 0.25
    models = baseline.score_real(shuffled, losses, earlier, 1)["models"]
    gap = models[baseline.BLEND]["minus CPU baseline v1"]
    assert gap["mean"] == pytest.approx(-0.25) and gap["high"] == pytest.approx(-0.25)
    assert models["CPU baseline v1"][f"minus {baseline.PRIOR}"]["mean"] == pytest.approx(-0.1)


def test_every_model_is_scored_at_every_size_and_over_all_splits(demo_pairs):
    config = BaselineConfig(n_hashed=256, n_trees=2)
    curve = baseline.curve_real(demo_pairs, config, (60, 120), range(1))
    losses = baseline.measure_losses(demo_pairs, config, range(2))
    assert curve["models"].keys() == losses.keys() - {baseline.THIRTEEN}
    for rows in curve["models"].values():
        assert [row["low"] < row["log_loss"] < row["high"] for row in rows] == [True, True]
    assert all(rows.shape == (len(demo_pairs),) for rows in losses.values())
    assert losses[baseline.BLEND].mean() < losses[baseline.PRIOR].mean()


@pytest.mark.slow
def test_a_part_of_the_baseline_is_measured_and_leaves_the_others(tmp_path):
    out = tmp_path / "baseline.json"
    write_json(out, {"real": 1})
    command = [sys.executable, "-m", "benchmarks.baseline", "--parts", "stand_in", "--out", out]
    command += ["--sizes", "100", "200", "--n-test", "50"]
    environment = {**os.environ, "ARENA_REAL_DATA": str(tmp_path)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-4000:]
    result = read_json(out)
    assert result["real"] == 1
    measured = result["stand_in"]
    assert [size["n_train"] for size in measured["sizes"]] == [100, 200]
    for size in measured["sizes"]:
        assert all(model["excess"] > 0 for model in size["models"].values())
    assert measured["known"]["oracle"]["excess"] == 0
    assert measured["one_core"]["n_cores"] == 1 < measured["one_core"]["peak_mib"]
