"""Claims about the benchmarks: what they count, and that they run on a handful of rows."""

import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer, Qwen3Config

from benchmarks import inference, training
from src.utils.config import DecoderConfig
from src.utils.paths import ROOT

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
