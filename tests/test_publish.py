"""Claims about choosing, merging, loading without the suite, and pushing."""

import dataclasses
import json
import shutil
import weakref

import numpy as np
import pandas as pd
import pytest
import torch

from src.utils.config import FinetuneConfig
from src.utils.delivery import publish
from src.utils.delivery.card import make_card
from src.utils.delivery.publish import check_card, choose_member, publish_model, push_model
from src.utils.models import checkpoints
from src.utils.models.checkpoints import load_classifier, load_frozen, save_model, write_head
from src.utils.models.frozen import DavidsonHead
from src.utils.models.predict import PRECISION_TOLERANCE, predict_probs
from src.utils.schema import LABEL_NAMES, probs_table
from tests.test_card import FACTS, METRICS

CONFIG = FinetuneConfig(
    checkpoint="tiny:qwen3",
    revision="",
    quantization="4bit",
    train="lora",
    lora_rank=4,
    max_tokens=160,
    predict_tokens=160,
    tokens_per_batch=1024,
)


@pytest.fixture(scope="module")
def published(tiny_base, _demo_pairs, tmp_path_factory):
    folder, pairs = tmp_path_factory.mktemp("published"), _demo_pairs[:12].reset_index(drop=True)
    model, tokenizer = load_classifier(CONFIG, tiny_base("qwen3"))
    source = save_model(model, tokenizer, folder / "run" / "model" / "fold_0")
    probs = predict_probs(model, tokenizer, pairs, max_tokens=160, tokens_per_batch=1024)
    oof = probs_table(pairs["id"], probs, fold=0)
    parity = publish_model(source, CONFIG, pairs, oof, folder / "07" / "model", tiny_base("qwen3"))
    (folder / "07" / "README.md").write_text("card")
    return parity, folder / "07"


def test_a_merged_model_gives_the_probabilities_of_the_unmerged_one(published):
    parity, run_dir = published
    assert parity["passed"] and parity["max_abs_difference"] <= 1e-4
    assert parity["n_pairs"] == 12
    assert abs(parity["log_loss_merged"] - parity["log_loss_trained"]) < 0.1
    files = {path.name for path in (run_dir / "model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= files
    assert not any("adapter" in name for name in files)


def test_a_published_model_names_its_classes_and_no_place_on_this_machine(published):
    _, run_dir = published
    config = json.loads((run_dir / "model" / "config.json").read_text())
    assert [config["id2label"][str(index)] for index in range(3)] == list(LABEL_NAMES)
    texts = [path.read_text() for path in (run_dir / "model").glob("*.json")]
    assert not any(str(run_dir.parent) in text for text in texts)


def test_one_classifier_is_in_memory_at_a_time_in_the_dtype_that_it_has_on_disk(
    tiny_base, demo_pairs, tmp_path, monkeypatch
):
    pairs, base = demo_pairs[:4].reset_index(drop=True), tiny_base("qwen3")
    source = save_model(*load_classifier(CONFIG, base), tmp_path / "fold_0")
    oof = probs_table(pairs["id"], torch.full((4, 3), 1 / 3).numpy())
    for place in ("checkpoints", "predict"):  # as on a GPU
        monkeypatch.setattr(f"src.utils.models.{place}.choose_dtype", lambda *_: torch.bfloat16)
    alive, steps = weakref.WeakSet(), []
    load, predict = checkpoints._load_base, publish.predict_probs

    def load_alone(*args, **options):
        steps.append(f"load beside {len(alive)}")
        model, tokenizer = load(*args, **options)
        alive.add(model)
        return model, tokenizer

    def note(model, *args, **options):
        dtypes = {str(p.dtype) for n, p in model.named_parameters() if "layers" in n}
        steps.append(f"predict with {len(alive)}, {sorted(dtypes)}")
        return predict(model, *args, **options)

    monkeypatch.setattr(checkpoints, "_load_base", load_alone)
    monkeypatch.setattr(publish, "predict_probs", note)
    parity = publish_model(source, CONFIG, pairs, oof, tmp_path / "model", base)
    assert steps == [
        "load beside 0",
        "predict with 1, ['torch.bfloat16', 'torch.float32']",  # the adapters are 32-bit
        "load beside 0",
        "load beside 0",
        "predict with 1, ['torch.bfloat16']",
    ]
    assert parity["tolerance"] == PRECISION_TOLERANCE[torch.bfloat16] and parity["passed"]


def test_a_difference_beyond_the_tolerance_fails(tiny_base, demo_pairs, tmp_path, monkeypatch):
    pairs = demo_pairs[:4].reset_index(drop=True)
    model, tokenizer = load_classifier(CONFIG, tiny_base("qwen3"))
    source = save_model(model, tokenizer, tmp_path / "fold_0")
    oof = probs_table(
        pairs["id"], predict_probs(model, tokenizer, pairs, max_tokens=160, tokens_per_batch=1024)
    )

    def merge_badly(*args):
        merged, tokenizer = load_classifier(
            dataclasses.replace(CONFIG, train="all", quantization="none"), args[2]
        )
        merged.score.weight.data *= 50
        return merged, tokenizer

    monkeypatch.setattr("src.utils.delivery.publish.merge", merge_badly)
    assert not publish_model(source, CONFIG, pairs, oof, tmp_path / "model", tiny_base("qwen3"))[
        "passed"
    ]


def test_a_dry_run_pushes_nothing(published, monkeypatch):
    _, run_dir = published
    monkeypatch.setattr("src.utils.delivery.publish.HfApi", None)
    assert "dry run" in push_model(run_dir, "me/model", True)
    assert "me/model" in push_model(run_dir, "me/model", True)


def test_a_push_without_a_repository_is_refused(published):
    _, run_dir = published
    with pytest.raises(ValueError, match="REPO_ID"):
        push_model(run_dir, "", False)


def test_a_run_without_a_card_is_not_pushed(published, tmp_path):
    shutil.copytree(published[1] / "model", tmp_path / "model")
    with pytest.raises(ValueError, match=r"README\.md"):
        push_model(tmp_path, "me/model", True)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["joint", "contrast"])
@pytest.mark.parametrize("kind", ["modernbert", "qwen3"])
def test_the_code_of_a_card_predicts_the_same_without_this_package(
    kind, head, tiny_base, tiny_configs, demo_pairs, ugly_pairs, tmp_path
):
    config = dataclasses.replace(tiny_configs[kind], head=head, predict_tokens=160)
    model, tokenizer = load_classifier(config, tiny_base(kind))
    for name, parameter in model.named_parameters():  # an untrained contrast is zero
        if "contrast" in name:
            torch.nn.init.normal_(parameter)
    source = save_model(model, tokenizer, tmp_path / "fold_0")
    pairs = pd.concat([demo_pairs[:12], ugly_pairs], ignore_index=True)
    oof = probs_table(pairs["id"], np.full((len(pairs), 3), 1 / 3))
    parity = publish_model(source, config, pairs, oof, tmp_path / "model", tiny_base(kind))
    assert parity["passed"]
    text = str(make_card(config, METRICS, parity, FACTS, "me/model", is_demo=True))
    check = check_card(text, tmp_path / "model", config, pairs)
    assert check["passed"] and check["within"] <= 1e-4 and check["n_within"] >= 12
    assert check["n_cut"] >= 1 and check["cut"] < 1
    is_joint = head == "joint"
    assert (check["pipeline"] is not None) == is_joint
    assert ("contrast.safetensors" in {f.name for f in (tmp_path / "model").iterdir()}) != is_joint


@pytest.mark.slow
def test_a_card_whose_code_predicts_otherwise_fails(published, ugly_pairs):
    parity, run_dir = published
    text = str(make_card(CONFIG, METRICS, parity, FACTS, "me/model", is_demo=True))
    pairs, folder = ugly_pairs.iloc[[0, 9]].reset_index(drop=True), run_dir / "model"
    wrong = text.replace("read(prompt, b, a)[[1, 0, 2]]", "read(prompt, b, a)")
    check = check_card(wrong, folder, CONFIG, pairs)
    assert check["n_within"] == 2 and not check["passed"]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        check_card(text.replace("import re\n", "1 / 0\n"), folder, CONFIG, pairs)


def test_the_better_network_is_published_unless_another_is_named():
    labels, groups = np.arange(60) % 3, np.arange(60)
    good = np.full((60, 3), 0.2)
    good[np.arange(60), labels] = 0.6
    members = {
        "02_baseline": np.eye(3)[labels] * 0.7 + 0.1,
        "03_modernbert": good,
        "04_qwen": np.full((60, 3), 1 / 3),
    }
    names = {"02_baseline": "the baseline", "03_modernbert": "encoder", "04_qwen": "decoder"}
    chosen, why = choose_member(members, labels, groups, names)
    assert chosen == "03_modernbert"
    assert "better than decoder" in why and "worse than the baseline" in why
    assert choose_member(members, labels, groups, names, "04_qwen")[0] == "04_qwen"
    for some, named in (({"02_baseline": good}, ""), (members, "02_baseline")):
        with pytest.raises(ValueError, match="SOURCE"):
            choose_member(some, labels, groups, names, named)


def test_a_head_on_a_frozen_base_is_published_without_it_and_says_so(
    tiny_base, demo_pairs, tmp_path
):
    config = dataclasses.replace(CONFIG, train="head", quantization="none")
    frozen, tokenizer = load_frozen(config, tiny_base("qwen3"))
    source = tmp_path / "run" / "model" / "fold_0"
    source.mkdir(parents=True)
    head = DavidsonHead(*frozen.head_shape)
    torch.nn.init.normal_(head.weights, std=0.1)
    write_head(head, config, tiny_base("qwen3"), tokenizer, source)
    pairs = demo_pairs[:6].reset_index(drop=True)
    oof = probs_table(pairs["id"], np.full((6, 3), 1 / 3), fold=0)
    folder, base = tmp_path / "07" / "model", tiny_base("qwen3")
    parity = publish_model(source, config, pairs, oof, folder, base)
    assert parity["passed"] and {"head.safetensors", "origin.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert not (folder / "config.json").exists()
    card = str(make_card(config, METRICS, parity, FACTS, "me/model", is_demo=True))
    assert "not in this repository" in card and 'train="head"' in card
    assert check_card(card, folder, config, pairs) is None
    assert "AutoModelForSequenceClassification" not in card
