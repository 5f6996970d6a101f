import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from src.utils.config import DecoderConfig, FinetuneConfig
from src.utils.models.checkpoints import load_finetuned
from src.utils.models.predict import predict_probs
from src.utils.paths import SETTINGS
from src.utils.runs import write_json
from src.utils.schema import probs_of
from src.utils.training import launch
from src.utils.training.launch import count_processes, fit_launched, read_config

LOSSES = ["step", "train_loss", "log_loss", "learning_rate"]
# Runs in each process: notes what it reads, runs out of memory in the second, can die at a step.
RECORDER = """
import json, os, signal, sys
from pathlib import Path
import torch
from src.utils.training import launch, processes, trainer

folder, kill_at = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
noted = {"rows": [], "first_step": None, "tokens_per_batch": 0}
take_step = trainer.FoldTrainer.take_step

def limit_memory(module, args, inputs):
    if module.training and inputs["input_ids"].numel() > 300:
        raise torch.OutOfMemoryError("expected in this test")

def noting_step(self):
    number = processes.rank()
    if noted["first_step"] is None:
        noted["first_step"], noted["world"] = self.step, processes.world_size()
        if number == 1:
            self.model.register_forward_pre_hook(limit_memory, with_kwargs=True)
    if self.step == kill_at and number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    items = self.steps[self.step][number :: processes.world_size()]
    noted["rows"] += [item // 2 for item in items]
    take_step(self)
    noted["tokens_per_batch"] = self.tokens_per_batch

trainer.FoldTrainer.take_step = noting_step
launch.main()
(folder / f"noted_{os.environ['RANK']}.json").write_text(json.dumps(noted))
processes.leave_world()
"""


@pytest.fixture(scope="module")
def pairs(_demo_pairs):
    return _demo_pairs[:62].reset_index(drop=True)


@pytest.fixture(scope="module")
def config(tiny_configs):
    changes = {"tokens_per_batch": 480, "tokens_per_step": 1920, "n_epochs": 1.0, "n_processes": 1}
    return dataclasses.replace(tiny_configs["modernbert"], **changes)


@pytest.fixture(scope="module")
def launched(pairs, config, tiny_base, tmp_path_factory):
    """A function: train in two processes -> result, and what each noted."""
    recorder = tmp_path_factory.mktemp("recorder") / "recorder.py"
    recorder.write_text(RECORDER)
    settings = dataclasses.replace(config, n_processes=2)

    def run(run_dir, kill_at=-1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "PROGRAM", (str(recorder), str(run_dir), str(kill_at)))
            result = fit_launched(pairs, settings, run_dir, tiny_base("modernbert"))
        return result, [json.loads((run_dir / f"noted_{n}.json").read_text()) for n in range(2)]

    return run


@pytest.fixture(scope="module")
def both(launched, pairs, config, tiny_base, tmp_path_factory):
    """The same training in one process and in two."""
    root = tmp_path_factory.mktemp("both")
    one = fit_launched(pairs, config, root / "one", tiny_base("modernbert"))
    two, noted = launched(root / "two")
    return one, two, noted, root


@pytest.mark.slow
def test_two_processes_learn_what_one_does(both):
    one, two, _, root = both
    pd.testing.assert_frame_equal(two.history[LOSSES], one.history[LOSSES], atol=1e-4)
    assert two.oof["id"].tolist() == one.oof["id"].tolist()
    np.testing.assert_allclose(probs_of(two.oof), probs_of(one.oof), atol=1e-4)
    assert (two.n_train_pairs, two.n_parameters) == (one.n_train_pairs, one.n_parameters)
    assert two.padding_share == one.padding_share
    file = "model/fold_0/model.safetensors"
    expected, found = load_file(root / "one" / file), load_file(root / "two" / file)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_what_two_processes_saved_gives_the_held_out_probabilities(both, pairs, config):
    _, two, _, root = both
    model, tokenizer = load_finetuned(root / "two" / "model" / "fold_0", config)
    heldout = pairs.set_index("id").loc[two.oof["id"]].reset_index()
    probs = predict_probs(model, tokenizer, heldout, max_tokens=96, tokens_per_batch=480)
    np.testing.assert_allclose(probs, probs_of(two.oof), atol=1e-5)


@pytest.mark.slow
def test_both_processes_take_part_and_one_that_runs_out_of_memory_splits_its_own_batches(both):
    one, _, noted, _ = both
    assert [note["world"] for note in noted] == [2, 2]
    assert [note["first_step"] for note in noted] == [0, 0]
    assert noted[0]["tokens_per_batch"] == 480 > noted[1]["tokens_per_batch"]
    rows = noted[0]["rows"] + noted[1]["rows"]
    assert min(len(note["rows"]) for note in noted) > 10
    assert sorted(rows) == list(range(one.n_train_pairs))


@pytest.mark.slow
def test_a_run_that_lost_a_process_resumes_and_ends_with_the_same_weights(
    both, launched, pairs, config, tiny_base, tmp_path
):
    unbroken = both[1]
    last = int(unbroken.history["step"].iloc[-1])
    with pytest.raises(RuntimeError, match="2 processes failed"):
        launched(tmp_path, kill_at=last - 1)
    alone = shutil.copytree(tmp_path, tmp_path.with_name("alone"))
    resumed, noted = launched(tmp_path)
    assert 0 < noted[0]["first_step"] == noted[1]["first_step"] < last
    pd.testing.assert_frame_equal(resumed.history[LOSSES], unbroken.history[LOSSES], atol=1e-5)
    np.testing.assert_allclose(probs_of(resumed.oof), probs_of(unbroken.oof), atol=1e-5)
    # One process takes the same steps as two: it may go on where they ended.
    resumed = fit_launched(pairs, config, alone, tiny_base("modernbert"))
    np.testing.assert_allclose(probs_of(resumed.oof), probs_of(unbroken.oof), atol=1e-4)


@pytest.mark.slow
def test_the_error_of_a_process_reaches_the_notebook(pairs, config, tiny_base, tmp_path):
    two = dataclasses.replace(config, n_processes=2, folds=(9,))
    with pytest.raises(RuntimeError, match="ValueError: folds: expected fold 9"):
        fit_launched(pairs, two, tmp_path, tiny_base("modernbert"))


def test_one_process_per_gpu_unless_another_number_is_asked_for(monkeypatch):
    assert count_processes(FinetuneConfig()) == 1
    assert count_processes(FinetuneConfig(n_processes=3)) == 3
    monkeypatch.setattr(launch, "choose_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert count_processes(FinetuneConfig()) == 2
    with pytest.raises(ValueError, match=r"n_processes: .* 2, .* 3"):
        count_processes(FinetuneConfig(n_processes=3))


def test_the_settings_are_those_of_the_notebook_the_profile_and_the_command_line():
    config = read_config(
        Path("artifacts/04_qwen"), None, "demo", ["N_SEEDS=2", "QUANTIZATION=none"]
    )
    assert isinstance(config, DecoderConfig)
    assert (config.checkpoint, config.n_seeds, config.quantization) == ("tiny:qwen3", 2, "none")


def test_the_profile_is_the_one_that_the_last_run_of_the_artifacts_named(tmp_path):
    write_json(tmp_path / SETTINGS, {"PROFILE": "demo"})
    for artifacts, checkpoint in ((tmp_path, "tiny:qwen3"), (tmp_path / "other", "Qwen/")):
        config = read_config(artifacts / "04_qwen", None, "auto", [])
        assert config.checkpoint.startswith(checkpoint)


def test_a_run_folder_that_no_notebook_has_is_named():
    with pytest.raises(ValueError, match=r"RUN: .*03_modernbert.*04_qwen.*artifacts/other"):
        read_config(Path("artifacts/other"), None, "full", [])
