import dataclasses
import re

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config

from src.utils.config import DecoderConfig, FinetuneConfig, SuiteError, read_finetuning
from src.utils.models.template import count_tokens
from src.utils.paths import REAL_DATA
from src.utils.training import plan
from src.utils.training.costs import read_machine, read_shape
from src.utils.training.launch import fit_launched
from src.utils.training.plan import (
    MACHINES,
    advise,
    check_device,
    describe,
    main,
    measure_texts,
    plan_here,
    plan_training,
)

KINDS = {"03": FinetuneConfig(refit=False), "04": DecoderConfig(refit=False)}


def plan_full(notebook, machine="24", **changes):
    config = dataclasses.replace(KINDS[notebook], **changes)
    return plan_training(config, measure_texts(None), read_machine(machine), read_shape(config))


def train_hours(need):
    return need.work.hours * (1 - need.work.valid_share)


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(plan, "choose_device", lambda: torch.device("cpu"))


# ── lengths ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("budget", "mean"), [(2048, 684), (3072, 704)])
def test_the_stored_lengths_have_the_mean_of_real_battles(budget, mean):
    texts = measure_texts(None)
    assert len(texts) == 57_477
    means = [np.minimum(texts + template, budget).mean() for template in (12, 68)]
    assert np.mean(means) == pytest.approx(mean, rel=0.03)


def test_four_characters_a_token_come_near_a_real_tokenizer(real_pairs):
    tokenizer = AutoTokenizer.from_pretrained(REAL_DATA / "tokenizers" / "qwen2_5")
    counted = count_tokens(real_pairs, tokenizer)
    assert np.mean(measure_texts(real_pairs) + 68) == pytest.approx(np.mean(counted), rel=0.15)


# ── plans ─────────────────────────────────────────────────────────────────────────────


def test_both_notebooks_fit_into_24_and_80_gb_and_the_encoder_into_16():
    for machine, notebook in [("24", "03"), ("24", "04"), ("80", "03"), ("80", "04"), ("16", "03")]:
        assert advise(plan_full(notebook, machine)) == "It fits.", (machine, notebook)


def test_what_is_too_long_for_kaggle_comes_with_settings_that_make_it_fit():
    text = advise(plan_full("04", "2x16"))
    assert "12 h" in text and re.search(r" TRAIN_HOURS=10\.0 \(some 8\d% of", text)
    assert "REFIT=False MAX_TOKENS=1024 or" in advise(plan_full("04", "2x16", refit=True))
    for change in ({"train_hours": 10.0}, {"max_tokens": 1024}):
        assert advise(plan_full("04", "2x16", **change)) == "It fits."
    text = advise(plan_full("03", "16", folds=tuple(range(5)), refit=True, n_seeds=2))
    assert "FOLDS=[0] N_SEEDS=1 REFIT=False" in text


@pytest.mark.parametrize("train", ["as in the profile", "head"])
def test_each_training_of_the_profile_kaggle_fits_one_session_before_its_deadline(train):
    machine, texts = read_machine("2xT4"), measure_texts(None)
    settings = ["TRAIN=head"] if train == "head" else []
    for name, config in read_finetuning("kaggle", settings).items():
        need = plan_training(config, texts, machine, read_shape(config))
        assert advise(need) == "It fits.", name
        assert (
            need.work.hours < 0.6 * config.train_deadline_s / 3600
        )  # cards may be slower than planned
        # The checkpoint at the end and the last cells need the rest of the session.
        assert config.train_deadline_s == (plan.SESSION_H - 0.5) * 3600
        assert not config.both_orders and config.save_minutes == 20 and not config.train_hours


def test_a_head_costs_one_reading_in_both_orders_and_disk_for_its_states():
    need = plan_full("04", "2x16", train="head")
    assert advise(need) == "It fits." and need.work.n_models == 6
    assert need.work.hours < plan_full("04", "2x16", refit=True).work.hours / 5
    deeper = plan_full("04", "2x16", train="head", state_layers=(0.67, 1.0))
    assert 1.3 < deeper.work.hours / need.work.hours < 1.5  # half of the layers more
    assert need.work.output_gb == pytest.approx(2 * 57_477 * 3 * 2560 * 2 / 1e9, rel=0.02)
    assert deeper.work.output_gb == pytest.approx(2 * need.work.output_gb, rel=0.02)
    assert need.work.submission_h < plan_full("04", "2x16", refit=False).work.submission_h
    assert "set TRAIN=head" in advise(plan_full("04", "16"))


def test_what_needs_too_much_memory_comes_with_settings_that_make_it_fit():
    too_large = {"checkpoint": "Qwen/Qwen3-4B-Instruct-2507", "max_tokens": 1024}
    text = advise(plan_full("03", "24", **too_large))
    assert "memory" in text and "QUANTIZATION=4bit" in text
    change = {"quantization": "4bit", "train": "lora", "gradient_checkpointing": True}
    assert advise(plan_full("03", "24", **too_large, **change)) == "It fits."
    assert sum(plan_full("03", "24", **too_large).memory.values()) > 22


@pytest.mark.parametrize("notebook", KINDS)
def test_validation_takes_at_most_a_tenth_of_the_hours(notebook):
    need = plan_full(notebook)
    assert 0.02 < need.work.valid_share / (1 - need.work.valid_share) < 0.1  # of training


def test_hours_and_tokens_grow_with_what_is_trained():
    one = plan_full("04")
    # 45,982 battles in both orders of some 700 tokens, at some 23 GFLOP a token.
    hours = read_machine("24").hours(45_982 * 2 * 700 * 23e9)
    assert train_hours(one) == pytest.approx(hours, rel=0.1)
    assert plan_full("04", folds=(0, 1)).work.hours == pytest.approx(2 * one.work.hours)
    assert plan_full("04", n_seeds=3).work.hours == pytest.approx(3 * one.work.hours)
    for change, ratio in (({"both_orders": False}, 0.5), ({"max_pairs": 4598}, 0.1)):
        less = train_hours(plan_full("04", **change))
        assert less == pytest.approx(ratio * train_hours(one), rel=0.01)
    refit = plan_full("04", refit=True)
    assert train_hours(refit) == pytest.approx(2.25 * train_hours(one), rel=0.01)
    assert refit.work.n_models == 2
    valid_hours = [need.work.hours * need.work.valid_share for need in (one, refit)]
    assert valid_hours[0] == pytest.approx(valid_hours[1])  # nothing is held out of a refit
    assert plan_full("04", "2x16").work.hours == pytest.approx(plan_full("04", "16").work.hours / 2)


def test_memory_is_counted_for_the_longest_battle_and_the_gpus():
    need = plan_full("03", "16")
    assert need.longest == 2048 < need.most_tokens
    assert sum(need.memory.values()) < read_machine("16").gib
    longer = plan_full("03", "16", max_tokens=4096)
    activations = [each.memory["activations"] for each in (need, longer)]
    assert activations[1] == pytest.approx(2 * activations[0])
    # Of several processes each keeps one vector of all gradients.
    assert plan_full("03", "2x16").memory["gradients"] == pytest.approx(
        2 * need.memory["gradients"]
    )


def test_what_is_cut_is_the_share_of_longer_battles():
    need = plan_full("04")
    assert need.cut_share(1024) == pytest.approx(0.2, abs=0.03)


def test_a_description_names_each_part():
    text = describe(plan_full("04", "2x16"), "04_qwen")
    for word in "hours cut weights gradients optimizer activations passes GB".split():
        assert word in text, word
    assert "26.5, for 100%" in describe(plan_full("04", "2x16", refit=True), "04_qwen")


# ── the command line ──────────────────────────────────────────────────────────────────


def test_the_command_lists_the_four_machines(without_gpu, tmp_path, capsys):
    assert main(["--artifacts", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in MACHINES:
        machine = f"  {read_machine(name).name}  "
        notebooks = [line.split()[0] for line in lines if machine in line]
        assert notebooks == ["03_modernbert", "04_qwen"], name
    for notebook in ("01_eda", "02_baseline", "05_ensemble", "06_kaggle_inference", "07_publish"):
        assert sum(line.startswith(notebook) for line in lines) == 1, notebook


def test_the_page_of_machines_shows_what_the_command_prints(
    without_gpu, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        plan.paths, "find_raw_data", lambda data: plan.paths.RawData("demo", (), None, None)
    )
    assert main(["--artifacts", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    page = (plan.paths.ROOT / "docs" / "machines.md").read_text(encoding="utf-8")
    shown = page.split("```")[1].strip()
    assert shown in printed and shown.count("\n") > 10


def test_the_command_takes_settings_notebooks_and_data(demo_pairs, tmp_path, capsys):
    from src.utils.runs import write_pairs

    arguments = ["--gpu", "2xT4", "--artifacts", str(tmp_path)]
    assert main([*arguments, "--only", "04,06", "--set", "04.MAX_PAIRS=1000 FOLDS=[1]"]) == 0
    text = capsys.readouterr().out
    assert "57,477 battles" in text and "from 1,000 battles" in text
    assert "03_modernbert" not in text and "06_kaggle_inference" in text
    write_pairs(tmp_path / "01_eda" / "pairs.parquet", demo_pairs)
    assert main(arguments) == 0
    assert "300 battles" in capsys.readouterr().out
    (tmp_path / "01_eda" / "truth.parquet").touch()  # the demo arena is no plan for a real run
    assert main(arguments) == 0
    assert "57,477 battles" in capsys.readouterr().out


def test_tiny_models_need_no_plan(tmp_path, capsys):
    assert main(["--profile", "small", "--gpu", "16", "--artifacts", str(tmp_path)]) == 0
    assert "tiny:qwen3" in capsys.readouterr().out


def test_a_wrong_argument_is_one_line_and_an_exit_code(capsys):
    for arguments, word in [
        (["--gpu", "V100"], "V100"),
        (["--only", "09"], "notebook"),
        (["--set", "04.FODLS=[1]"], "FOLDS"),
        (["--data", "nowhere.csv"], "nowhere.csv"),
    ]:
        assert main(["--gpu", "16", *arguments]) == 1
        assert word in capsys.readouterr().err


# ── in the notebooks ──────────────────────────────────────────────────────────────────


@pytest.fixture
def large_folder(tmp_path):
    """A folder with the shape of a large checkpoint, and no weights."""
    size = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
    Qwen3Config(**size, vocab_size=1000).save_pretrained(tmp_path / "large")
    return tmp_path / "large"


def test_a_real_checkpoint_without_a_gpu_is_refused_with_hours(
    without_gpu, large_folder, demo_pairs, monkeypatch, tmp_path
):
    monkeypatch.setattr("src.utils.training.costs.choose_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("src.utils.training.costs.measure_flops", lambda _: 1e10)
    config = FinetuneConfig(checkpoint=str(large_folder))
    with pytest.raises(SuiteError, match=r"GPU.*[1-9][\d,]* hours.*ALLOW_CPU"):
        check_device(config, demo_pairs)
    with pytest.raises(SuiteError, match="ALLOW_CPU"):
        fit_launched(demo_pairs, config, tmp_path / "run")
    check_device(dataclasses.replace(config, allow_cpu=True), demo_pairs)
    check_device(
        dataclasses.replace(config, max_pairs=1, n_epochs=0.01), demo_pairs[:5]
    )  # is quick
    check_device(FinetuneConfig(checkpoint="tiny:modernbert"), demo_pairs)
    monkeypatch.setattr(plan, "choose_device", lambda: torch.device("cuda"))
    check_device(config, demo_pairs)


def test_the_folder_of_the_base_is_read_in_place_of_the_checkpoint(
    without_gpu, large_folder, demo_pairs, monkeypatch
):
    monkeypatch.setattr("src.utils.training.costs.measure_flops", lambda _: 1e10)
    with pytest.raises(SuiteError, match="hours"):
        check_device(FinetuneConfig(checkpoint="owner/unknown"), demo_pairs, large_folder)


def test_a_notebook_prints_the_plan_of_its_device(demo_pairs, large_folder):
    text = plan_here(FinetuneConfig(checkpoint=str(large_folder)), demo_pairs)
    assert "from 240 battles" in text and "hours" in text
    assert "tiny:qwen3" in plan_here(FinetuneConfig(checkpoint="tiny:qwen3"), demo_pairs)
