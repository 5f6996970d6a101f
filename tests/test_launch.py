import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from src.utils.config import DecoderConfig, FinetuneConfig
from src.utils.models.checkpoints import load_finetuned
from src.utils.models.predict import predict_probs
from src.utils.schema import probs_of
from src.utils.training import launch, processes
from src.utils.training.launch import count_processes, fit_launched

ENCODER = FinetuneConfig(
    checkpoint="tiny:modernbert",
    revision="",
    max_tokens=96,
    predict_tokens=96,
    tokens_per_batch=480,
    batches_per_step=4,
    n_epochs=1.0,
    both_orders=False,
    learning_rate=1e-3,
    n_evals=2,
    n_processes=1,
)
DECODER = DecoderConfig(
    checkpoint="tiny:qwen3",
    revision="",
    head="contrast",
    quantization="none",
    lora_rank=4,
    lora_alpha=8.0,
    lora_dropout=0.0,
    max_tokens=160,
    predict_tokens=160,
    tokens_per_batch=800,
    batches_per_step=4,
    n_epochs=1.0,
    both_orders=False,
    learning_rate=5e-3,
    n_evals=2,
    n_processes=1,
)
# Runs in each process: notes what it reads and what its model is, and can die at a step.
RECORDER = """
import json, os, signal, sys
from pathlib import Path
from torch.distributed.fsdp import FSDPModule
from src.utils.training import launch, processes, trainer

folder, kill_at = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
noted = {"batches": [], "first_step": None}
collate, step = trainer.FoldTrainer._collate, trainer.FoldTrainer.training_step

def noting_collate(self, items):
    noted["batches"].append(sorted(hash(row.tobytes()) for row, _ in items))
    return collate(self, items)

def noting_step(self, model, *args, **kwargs):
    if noted["first_step"] is None:
        noted["first_step"], noted["wrapper"] = self.state.global_step, type(model).__name__
        noted["world"], noted["n_each"] = processes.world_size(), self.args.gradient_accumulation_steps
        noted["parted"] = sorted({type(m).__name__ for m in model.modules() if isinstance(m, FSDPModule)})
        local = [getattr(p, "_local_tensor", p).numel() for p in model.parameters()]
        noted["share"] = sum(local) / sum(p.numel() for p in model.parameters())
    if self.state.global_step == kill_at and processes.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, model, *args, **kwargs)

trainer.FoldTrainer._collate, trainer.FoldTrainer.training_step = noting_collate, noting_step
launch.main()
(folder / f"noted_{os.environ['RANK']}.json").write_text(json.dumps(noted))
processes.leave_world()
"""


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    path = tmp_path_factory.mktemp("recorder") / "recorder.py"
    path.write_text(RECORDER)
    return path


@pytest.fixture(scope="module")
def launched(recorder, _demo_pairs, tiny_base, tmp_path_factory):
    """A function: train in two processes -> result, and what each noted."""
    pairs = _demo_pairs[:62].reset_index(drop=True)

    def run(config, kind, run_dir, kill_at=-1):
        def torchrun(n_processes):
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
            ]
            return [
                *command,
                str(n_processes),
                str(recorder),
                str(run_dir / "launch"),
                str(kill_at),
            ]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "_torchrun", torchrun)
            patch.setenv("PYTHONHASHSEED", "0")
            result = fit_launched(
                pairs, dataclasses.replace(config, n_processes=2), run_dir, tiny_base(kind)
            )
        return result, [
            json.loads((run_dir / "launch" / f"noted_{rank}.json").read_text()) for rank in range(2)
        ]

    return run


CASES = {
    "copied encoder": (ENCODER, "modernbert"),
    "parted encoder": (dataclasses.replace(ENCODER, n_processes=2, sharding="full"), "modernbert"),
    "parted LoRA": (dataclasses.replace(DECODER, n_processes=2, sharding="full"), "qwen3"),
}


@pytest.fixture(scope="module", params=CASES)
def both(request, launched, _demo_pairs, tiny_base, tmp_path_factory):
    """The same training in one process and in two."""
    config, kind = CASES[request.param]
    root = tmp_path_factory.mktemp("both")
    alone = dataclasses.replace(config, n_processes=1, sharding="none")
    one = fit_launched(
        _demo_pairs[:62].reset_index(drop=True), alone, root / "one", tiny_base(kind)
    )
    # Three batches a step do not go round in two processes: four are taken.
    two, noted = launched(dataclasses.replace(config, batches_per_step=3), kind, root / "two")
    return config, kind, one, two, noted, root


@pytest.mark.slow
def test_two_processes_learn_what_one_does(both):
    _, _, one, two, _, _ = both
    losses = ["step", "train_loss", "log_loss", "learning_rate"]
    pd.testing.assert_frame_equal(two.history[losses], one.history[losses], atol=1e-4)
    assert two.oof["id"].tolist() == one.oof["id"].tolist()
    np.testing.assert_allclose(probs_of(two.oof), probs_of(one.oof), atol=1e-4)
    assert (two.n_train_pairs, two.n_parameters) == (one.n_train_pairs, one.n_parameters)
    assert two.padding_share == one.padding_share


@pytest.mark.slow
def test_the_weights_of_two_processes_are_those_of_one(both):
    _, _, _, _, _, root = both
    (weights,) = (root / "one" / "model" / "fold_0").glob("*.safetensors")
    one, two = load_file(weights), load_file(root / "two" / "model" / "fold_0" / weights.name)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_what_two_processes_saved_gives_the_held_out_probabilities(both, _demo_pairs, tiny_base):
    config, kind, _, two, _, root = both
    base = tiny_base(kind) if config.lora_rank else None
    model, tokenizer = load_finetuned(root / "two" / "model" / "fold_0", config, base)
    heldout = _demo_pairs.set_index("id").loc[two.oof["id"]].reset_index()
    options = {"max_tokens": config.predict_tokens, "tokens_per_batch": config.tokens_per_batch}
    np.testing.assert_allclose(
        predict_probs(model, tokenizer, heldout, **options), probs_of(two.oof), atol=1e-5
    )


@pytest.mark.slow
def test_both_processes_take_part_and_no_battle_is_lost_or_read_twice(both):
    _, _, one, _, noted, _ = both
    assert [note["world"] for note in noted] == [2, 2]
    assert [note["n_each"] for note in noted] == [2, 2]
    assert len(noted[0]["batches"]) == len(noted[1]["batches"])
    rows = [row for note in noted for batch in note["batches"] for row in batch]
    assert len(rows) == len(set(rows)) == one.n_train_pairs
    assert [note["first_step"] for note in noted] == [0, 0]


@pytest.mark.slow
def test_weights_are_copied_or_parted_as_asked(both):
    config, _, _, _, noted, root = both
    world = json.loads((root / "two" / "checkpoints" / "fold_0" / "world.json").read_text())
    # Nor did this process train it again.
    assert world == {"n_processes": 2, "sharding": config.sharding, "packed": True}
    for note in noted:
        if config.sharding == "none":
            assert (note["wrapper"], note["parted"], note["share"]) == (
                "DistributedDataParallel",
                [],
                1.0,
            )
        else:
            assert note["wrapper"].startswith("FSDP") and len(note["parted"]) >= 2
            assert note["share"] < 0.55


@pytest.mark.slow
@pytest.mark.parametrize("both", ["copied encoder", "parted LoRA"], indirect=True)
def test_a_run_that_lost_a_process_goes_on_and_ends_with_the_same_weights(
    both, launched, _demo_pairs, tiny_base, tmp_path
):
    config, kind, _, unbroken, _, _ = both
    config = dataclasses.replace(config, batches_per_step=3)
    last = int(unbroken.history["step"].iloc[-1])
    with pytest.raises(RuntimeError, match="training in 2 processes failed"):
        launched(config, kind, tmp_path, kill_at=last - 1)
    with pytest.raises(ValueError, match="begun with n_processes=2"):
        alone = dataclasses.replace(config, n_processes=1, sharding="none")
        fit_launched(_demo_pairs[:62].reset_index(drop=True), alone, tmp_path, tiny_base(kind))
    resumed, noted = launched(config, kind, tmp_path)
    assert 0 < noted[0]["first_step"] == noted[1]["first_step"] < last
    losses = ["step", "train_loss", "log_loss", "learning_rate"]
    pd.testing.assert_frame_equal(resumed.history[losses], unbroken.history[losses], atol=1e-7)
    pd.testing.assert_frame_equal(resumed.oof, unbroken.oof, atol=1e-6)


@pytest.mark.slow
def test_a_process_that_fails_is_heard(demo_pairs, tiny_base, tmp_path, monkeypatch):
    real = launch._torchrun
    monkeypatch.setattr(launch, "_torchrun", lambda n_processes: real(1))
    config = dataclasses.replace(ENCODER, n_processes=2)
    with pytest.raises(
        RuntimeError, match="n_processes: expected 2 processes, got 1 from the launcher"
    ):
        fit_launched(demo_pairs[:20], config, tmp_path, tiny_base("modernbert"))


def test_one_process_a_gpu_unless_another_number_is_asked_for(monkeypatch):
    assert count_processes(FinetuneConfig()) == 1
    assert count_processes(FinetuneConfig(n_processes=3)) == 3
    monkeypatch.setattr(launch, "choose_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert count_processes(FinetuneConfig()) == 2
    with pytest.raises(ValueError, match="n_processes: expected at most 2"):
        count_processes(FinetuneConfig(n_processes=3))


def test_the_command_line_reads_notebook_profile_and_settings():
    text = ["artifacts/04_qwen", "--profile", "demo", "--set", "SHARDING=full", "QUANTIZATION=none"]
    options = launch._parse(text)
    config = launch._read_config(options)
    assert options.pairs == Path("artifacts/01_eda/pairs.parquet")
    assert (config.checkpoint, config.sharding, config.quantization) == (
        "tiny:qwen3",
        "full",
        "none",
    )
    assert isinstance(config, DecoderConfig)


def test_a_run_folder_that_no_notebook_has_is_named():
    options = argparse.Namespace(run=Path("artifacts/other"), settings=None)
    with pytest.raises(ValueError, match="RUN: expected a folder named 03_modernbert or 04_qwen"):
        launch._read_config(options)


def test_another_number_of_processes_than_asked_for_is_an_error():
    with pytest.raises(RuntimeError, match="expected 2 processes, got 1"):
        launch._check_world_size(FinetuneConfig(n_processes=2))
    launch._check_world_size(FinetuneConfig(n_processes=0))
    assert processes.world_size() == 1
