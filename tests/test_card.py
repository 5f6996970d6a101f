"""Claims about the model card: its numbers, its honesty, and the front matter of the hub."""

import dataclasses

import numpy as np
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from src.utils.config import FinetuneConfig
from src.utils.delivery.card import (
    fold_source,
    make_card,
    measure_facts,
    render_card,
    summarise_check,
)

TINY = FinetuneConfig(
    checkpoint="tiny:qwen3", revision="", train="lora", lora_rank=4, predict_tokens=160
)
REAL = dataclasses.replace(TINY, checkpoint="Qwen/Qwen3-4B-Instruct-2507")
METRICS = {
    "log_loss": 1.0512,
    "accuracy": 0.4321,
    "brier": 0.61,
    "ece": 0.021,
    "n_pairs": 2400,
    "n_train_pairs": 9600,
    "swap_gap": 0.0123,
    "machine": "Linux",
    "versions": {"torch": "2", "transformers": "5", "peft": "0"},
}
PARITY = {"max_abs_difference": 2e-7, "n_pairs": 200, "tolerance": 1e-4, "passed": True} | {
    "log_loss_trained": 1.05,
    "log_loss_merged": 1.06,
    "dtype": "float32",
    "is_decoder": True,
    "template": "{prompt}{response_a}{response_b}",
}
FACTS = {
    "n_pairs": 2400,
    "ladder": [{"name": "class prior", "loss": "1.09 (1.0–1.1)", "accuracy": 0.3}],
    "slices": [],
    "leanings": [],
    "oracle": None,
    "why": "It is the best network.",
}
CHECK = {"n_within": 48, "n_cut": 2, "within": 1.2e-7, "cut": 0.2, "cut_mean": 0.1} | {
    "tolerance": 1e-4,
    "passed": True,
    "pipeline": 3e-3,
}


def make(config=REAL, is_demo=False, **options):
    return make_card(config, METRICS, PARITY, FACTS, "me/model", is_demo, **options)


def test_the_card_states_the_measured_numbers():
    card = str(make(check=CHECK, seconds=7200, dataset="arena-55k"))
    for number in (
        "1.0512",
        "2,400",
        "9,600",
        "2.0e-07",
        "1.2e-07",
        "0.20",
        "3.0e-03",
        "2.0 hours",
    ):
        assert number in card
    assert "{{" not in card and "{%" not in card and "None" not in card.replace("top_k=None", "")
    assert "It is the best network." in card and "Apache 2.0" in card


def test_a_demo_and_a_real_card_do_not_contradict_themselves():
    demo, real = make(TINY, is_demo=True), make()
    assert "No person voted" in demo.text and "visitors of one web site" not in demo.text
    assert "visitors of one web site" in real.text and "No person voted" not in real.text
    assert demo.data.base_model is None and real.data.base_model == REAL.checkpoint
    assert demo.data.license == "mit" and real.data.license == "apache-2.0"
    assert make(dataclasses.replace(REAL, checkpoint="a/b")).data.license == "other"


def test_a_stand_in_is_never_called_by_the_name_of_the_real_model():
    card = str(make(TINY, is_demo=True))
    assert "Qwen3" not in card.replace("tiny:qwen3", "") and "stand-in" in card


def test_the_hub_reads_the_scores_in_the_front_matter():
    data = ModelCard(str(make(dataset="arena-55k"))).data.to_dict()
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "model"
    assert {one.metric_type: one.metric_value for one in results} == {
        "log_loss": 1.0512,
        "accuracy": 0.4321,
    }
    assert {one.dataset_type for one in results} == {"lmarena-ai/arena-human-preference-55k"}
    assert data["datasets"] == ["lmarena-ai/arena-human-preference-55k"]
    assert data["pipeline_tag"] == "text-classification"


def test_a_contrast_is_named_in_the_first_line_and_a_joint_head_has_a_pipeline():
    contrast = make(dataclasses.replace(REAL, head="contrast"))
    first = next(line for line in contrast.text.splitlines() if line.strip())
    assert "pipeline" in first and "other probabilities" in first
    assert "classify = pipeline" in make().text and "classify = pipeline" not in contrast.text
    assert "src.utils" not in contrast.text and "src.utils" not in make().text


def test_merged_adapters_and_complete_weights_are_named_what_they_are():
    assert "not an adapter" in make().text
    assert "adapter" not in make(dataclasses.replace(REAL, train="all")).text


def test_a_head_without_its_base_says_so_first():
    card = make(dataclasses.replace(REAL, train="head"))
    first = next(line for line in card.text.splitlines() if line.strip())
    assert "without its base" in first and 'train="head"' in card.text
    assert "needs the suite" in summarise_check(None)


def test_facts_are_those_of_the_votes(demo_pairs):
    labels = demo_pairs["label"].to_numpy()
    good = np.eye(3)[labels] * 0.7 + 0.1
    even = np.full((len(labels), 3), 1 / 3)
    members, names = {"02_baseline": even, "03_x": good}, {"02_baseline": "02", "03_x": "03 x"}
    facts = measure_facts(members, names, "03_x", demo_pairs, even, truth=good, n_boot=50)
    rows = {row["name"]: row for row in facts["ladder"]}
    assert rows["**03 x: this model**"]["log_loss"] == pytest.approx(-np.log(0.8))
    assert rows["02"]["log_loss"] == pytest.approx(np.log(3))
    assert facts["oracle"] == pytest.approx(-np.log(0.8)) and facts["n_pairs"] == len(labels)
    assert all(30 <= row["n_pairs"] < len(labels) for row in facts["slices"])
    longer = next(row for row in facts["leanings"] if row["leaning"] == "the longer answer")
    assert longer["people"].endswith(")") and longer["people"] != longer["model"]


def test_a_check_says_how_far_cut_battles_differ():
    assert "0.20" in summarise_check(CHECK)
    assert "longer" not in summarise_check(CHECK | {"n_cut": 0})
    assert "–" in summarise_check(CHECK | {"within": None, "n_within": 0})


def test_a_page_and_a_folded_source_show_markup_as_text():
    page = render_card(make())
    assert "<table>" in page and "<h1" in page and "apache-2.0" in page
    card = make()
    card.data.tags = ["<script>alert(1)</script>"]
    assert "<script>" not in render_card(card)
    assert "<script>" not in fold_source(card) and "model-index" in fold_source(card)
