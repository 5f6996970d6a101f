"""How far people agree: by hand, against simulated voters, and on public votes."""

import numpy as np
import pandas as pd
import pytest

from src.utils.paths import REAL_DATA
from src.utils.schema import LABELS
from src.utils.stats import agreement
from tests.conftest import NO_REAL_DATA


def test_agreement_and_loss_by_hand():
    votes = np.array([[2, 0, 0], [1, 1, 0], [0, 0, 1]])  # the last has a single vote
    found = agreement.measure_agreement(votes, np.array(["p", "q", "r"]))
    assert found["agreement"] == pytest.approx(0.5)  # both of the first, none of the second
    agreed, not_agreed = -np.log(1.5 / 2.5), -np.log(0.5 / 2.5)
    assert found["log_loss"] == pytest.approx((agreed + not_agreed) / 2)
    assert found["prior_log_loss"] == pytest.approx(-(3 * np.log(4 / 7) + np.log(2 / 7)) / 4)
    assert (found["n_votes"], found["n_battles"], found["n_prompts"]) == (4, 2, 2)
    assert found["mean_others"] == 1


def test_many_voters_reach_the_entropy_of_their_votes():
    rng = np.random.default_rng(0)
    truth = rng.dirichlet([1, 1, 1], 400)
    votes = np.stack([rng.multinomial(200, probs) for probs in truth])
    found = agreement.measure_agreement(votes, np.arange(400), n_boot=50)
    assert found["log_loss"] == pytest.approx(-(truth * np.log(truth)).sum(axis=1).mean(), abs=0.02)
    assert found["agreement"] == pytest.approx((truth**2).sum(axis=1).mean(), abs=0.01)
    assert found["agreement_low"] < found["agreement"] < found["agreement_high"]


def test_intervals_resample_prompts():
    votes = np.tile([[4, 0, 0], [2, 2, 0]], (20, 1))
    alone = agreement.measure_agreement(votes, np.arange(40))
    together = agreement.measure_agreement(votes, np.arange(40) % 2)
    width, wider = (f["agreement_high"] - f["agreement_low"] for f in (alone, together))
    assert wider > 2 * width


def test_battles_with_one_vote_have_none_to_compare():
    assert agreement.count_votes(pd.DataFrame({"id": [1]})) is None
    single = pd.DataFrame({"votes_a": [1, 0], "votes_b": [0, 1], "votes_tie": [0, None]})
    assert agreement.count_votes(single) is None
    votes = agreement.count_votes(single.assign(votes_tie=[2, 0]))
    assert votes.tolist() == [[1, 0, 2], [0, 1, 0]]


def test_people_are_a_marked_row_and_the_sentence_has_source_and_caveat():
    found = agreement.read_reference()
    table = agreement.add_people(pd.DataFrame({"model": ["blend"], "log_loss": [1.0]}), found)
    assert table["model"].iloc[1].startswith("people") and table["model"].iloc[1].endswith("*")
    assert table["log_loss"].iloc[1] == found["log_loss"]
    said = agreement.describe_agreement(found)
    for part in (
        "dustalov/llmfao",
        "CC BY 4.0",
        "13 prompts",
        "53%",
        "0.94",
        "1.09",
        found["caveat"],
    ):
        assert part in said


def test_the_committed_reference_is_that_of_the_public_votes():
    path = REAL_DATA / "layouts" / "several_votes.csv.gz"
    if not path.exists():
        pytest.skip(NO_REAL_DATA)
    rows = pd.read_csv(path)
    texts = ["prompt", "response_a", "response_b"]
    battles = rows.groupby(texts, sort=False)[list(LABELS)].sum()
    found = agreement.measure_agreement(
        battles.to_numpy(), battles.index.get_level_values("prompt").to_numpy()
    )
    reference = agreement.read_reference()
    assert reference["n_rows"] == len(rows) == 2100
    assert found == pytest.approx({name: reference[name] for name in found}, abs=1e-4)
