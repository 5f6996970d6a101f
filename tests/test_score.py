"""`make score`: any submission on any labelled battles, with errors that name the cell."""

import json

import numpy as np
import pandas as pd
import pytest

from src.utils.battles.readers import add_groups_and_folds, load_pairs
from src.utils.delivery import score as module
from src.utils.delivery.score import (
    choose_battles,
    format_scores,
    read_labelled,
    read_submission,
    score_submission,
)
from src.utils.paths import REAL_DATA
from src.utils.runs import write_pairs
from src.utils.schema import LABELS, TEXTS, TIE
from src.utils.stats.scores import log_loss, paired_difference, row_losses

N_BOOT = 100


@pytest.fixture
def battles(demo_pairs):
    return demo_pairs.assign(id=demo_pairs["id"].astype(str))


@pytest.fixture
def predicted(battles):
    """Better than chance: a third of the probability moved to the vote."""
    noise = np.random.default_rng(0).dirichlet([3, 3, 3], len(battles))
    probs = (2 * noise + np.eye(3)[battles["label"]]) / 3
    table = pd.DataFrame(probs, columns=list(LABELS))
    table.insert(0, "id", battles["id"])
    return table


def write(table, path):
    table.to_csv(path, index=False)
    return path


def write_battles(battles, path, with_votes=True):
    table = battles[["id"]].assign(**{name: battles[name].map(json.dumps) for name in TEXTS})
    for label, name in enumerate(LABELS if with_votes else ()):
        table[name] = (battles["label"] == label).astype(int)
    return write(table, path)


def probs_in(table):
    return table[list(LABELS)].to_numpy()


def test_it_reads_what_a_submission_may_be(predicted, tmp_path):
    expected = read_submission(write(predicted, tmp_path / "a.csv"))
    np.testing.assert_allclose(expected.to_numpy(), probs_in(predicted))
    packed = read_submission(write(predicted, tmp_path / "a.csv.gz"))
    pd.testing.assert_frame_equal(packed, expected)
    other = predicted[[LABELS[2], "id", *LABELS[:2]]].assign(fold=0)
    other["id"] = other["id"].astype(float)  # as a spreadsheet writes them
    other.to_parquet(tmp_path / "a.parquet")
    pd.testing.assert_frame_equal(read_submission(tmp_path / "a.parquet"), expected)
    pd.testing.assert_frame_equal(read_submission(write(other, tmp_path / "b.csv")), expected)
    rounded = read_submission(write(predicted.round(3), tmp_path / "c.csv"))
    np.testing.assert_allclose(rounded.sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        (LABELS[1], np.nan, ["row 3", LABELS[1], "''"]),
        (LABELS[1], -0.1, ["row 3", LABELS[1], "-0.1"]),
        (LABELS[2], "abc", ["row 3", LABELS[2], "abc", "1 of 300"]),
        (LABELS[0], 0.99, ["row 3", "sum of 1", "1 of 300"]),
        ("id", " ", ["row 3", "column id", "blank"]),
        ("id", "first", ["rows [1, 3]", "once"]),
    ],
)
def test_a_cell_that_is_wrong_is_named(predicted, tmp_path, column, value, named):
    predicted = predicted.astype(object)
    predicted.loc[2, column] = predicted.loc[0, "id"] if value == "first" else value
    path = write(predicted, tmp_path / "wrong.csv")
    with pytest.raises(ValueError, match=r"wrong\.csv") as caught:
        read_submission(path)
    assert [text for text in named if text not in str(caught.value)] == []
    if column != "id":
        assert str(predicted.loc[2, "id"]) in str(caught.value)


def test_a_missing_column_is_named_with_those_that_are_there(predicted, tmp_path):
    path = write(predicted.rename(columns={"winner_tie": "tie"}), tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"missing \['winner_tie'\].*'tie'"):
        read_submission(path)


def test_votes_are_read_from_battles_and_from_files_of_their_own(battles, tmp_path):
    whole = read_labelled([write_battles(battles, tmp_path / "train.csv")])
    test = write_battles(battles, tmp_path / "test.csv", with_votes=False)
    label = write(battles[["id", "label"]][::-1], tmp_path / "label.csv")
    names = battles["label"].map(["model_a", "model_b", "tie"].__getitem__)
    winner = write(pd.DataFrame({"id": battles["id"], "winner": names}), tmp_path / "winner.csv")
    for votes in (label, winner):
        joined = read_labelled([test, votes])
        columns = ["id", "label", "group", "fold", *TEXTS]
        pd.testing.assert_frame_equal(joined[columns], whole[columns], check_dtype=False)
    frozen = tmp_path / "pairs.parquet"
    write_pairs(frozen, battles.assign(id=battles["id"].astype(int), fold=0))
    assert read_labelled([frozen])["fold"].eq(0).all(), "its own folds are kept"
    alone = read_labelled([label])
    assert "prompt" not in alone and alone["group"].nunique() == len(battles)


def test_labels_without_votes_or_with_odd_ones_are_refused(battles, predicted, tmp_path):
    test = write_battles(battles, tmp_path / "test.csv", with_votes=False)
    with pytest.raises(ValueError, match=r"test\.csv: expected votes.*LABELS="):
        read_labelled([test])
    odd = write(battles[["id", "label"]].replace({"label": {2: 5}}), tmp_path / "odd.csv")
    with pytest.raises(ValueError, match=r"odd\.csv: row \d+, id \d+, column label.*found '5'"):
        read_labelled([odd])
    with pytest.raises(ValueError, match=r"sub\.csv: expected a single 1"):
        read_labelled([write(predicted, tmp_path / "sub.csv")])
    twice = write(battles[["id", "label"]].iloc[[0, 1, 0]], tmp_path / "twice.csv")
    with pytest.raises(ValueError, match=rf"twice\.csv.*{battles['id'][0]}"):
        read_labelled([twice])
    others = write(pd.DataFrame({"id": ["x"], "label": [0]}), tmp_path / "others.csv")
    with pytest.raises(ValueError, match=r"others\.csv.*no id in common"):
        read_labelled([test, others])


def test_every_vote_needs_a_prediction_unless_a_part_is_asked_for(battles, predicted):
    probs = predicted.set_index("id")
    assert len(choose_battles(battles, {"a": probs})) == len(battles)
    with pytest.raises(ValueError, match=r"a: .*290 of 300.*PARTIAL=1"):
        choose_battles(battles, {"b": probs, "a": probs[10:]})
    kept = choose_battles(battles, {"b": probs[:280], "a": probs[10:]}, partial=True)
    assert kept["id"].tolist() == battles["id"].tolist()[10:280]
    strange = probs.set_axis("x" + probs.index)
    with pytest.raises(ValueError, match=r"a: .*0 of 300.*other battles"):
        choose_battles(battles, {"a": strange}, partial=True)


def test_scores_are_those_of_the_votes_and_differences_are_the_submission_minus_the_other(
    battles, predicted
):
    probs, labels = probs_in(predicted), battles["label"].to_numpy()
    flat = np.full_like(probs, 1 / 3)
    result = score_submission(battles, {"mine": probs, "flat": flat}, battles, N_BOOT)
    assert result["log_loss"] == pytest.approx(log_loss(probs, labels))
    assert result["log_loss_low"] < result["log_loss"] < result["log_loss_high"]
    assert result["share_of_ties"] == (labels == TIE).mean()
    assert result["mean_p_tie"] == pytest.approx(probs[:, TIE].mean())
    models = result["models"].set_index("model")
    assert models.index.tolist() == ["mine", "flat", "length alone", "the class prior"]
    losses = row_losses(probs, labels), row_losses(flat, labels)
    gap = paired_difference(*losses, battles["group"], N_BOOT, module.SEED)
    found = models.loc["flat", ["difference", "difference_low", "difference_high"]].astype(float)
    np.testing.assert_allclose(found, [gap["mean"], gap["low"], gap["high"]])
    classes = result["classes"]
    assert (classes["log_loss"] * classes["n"]).sum() / len(labels) == pytest.approx(
        result["log_loss"]
    )
    slices = result["slices"]
    assert "length: more than twice" in slices["slice"].tolist() and "flat" in slices
    assert slices["n_pairs"].min() >= module.MIN_SLICE


def test_a_part_is_compared_with_a_prior_and_lengths_of_all_labelled_battles(battles, predicted):
    part = battles[battles["fold"] == 0].reset_index(drop=True)
    probs = probs_in(predicted)[battles["fold"] == 0]
    models = score_submission(part, {"mine": probs}, battles, N_BOOT)["models"].set_index("model")
    rest = battles.loc[battles["fold"] != 0, "label"].to_numpy()
    prior = (np.bincount(rest) + 1) / (len(rest) + 3)
    expected = -np.log(prior[part["label"]]).mean()
    assert models.loc["the class prior", "log_loss"] == pytest.approx(expected)


def test_several_votes_on_a_battle_count_once_each(battles, predicted):
    battles[["votes_a", "votes_b", "votes_tie"]] = [2, 1, 0]
    probs = probs_in(predicted)
    result = score_submission(battles, {"mine": probs}, battles, N_BOOT)
    assert result["n_votes"] == 900 and result["n_pairs"] == 300
    expected = -(2 * np.log(probs[:, 0]) + np.log(probs[:, 1])).sum() / 900
    assert result["log_loss"] == pytest.approx(expected)
    assert result["slices"].empty and "No slices" in format_scores(result), "nobody voted tie"


def test_sure_errors_are_counted(battles, predicted):
    probs = np.eye(3)[(battles["label"] + (np.arange(len(battles)) < 5)) % 3]
    result = score_submission(battles, {"mine": probs}, battles, N_BOOT)
    assert result["n_ruled_out"] == 5 and "5 votes" in format_scores(result)


def test_the_command_prints_and_writes_every_number(battles, predicted, tmp_path, capsys):
    labels = write_battles(battles, tmp_path / "train.csv")
    more = pd.concat([predicted[20:], predicted[20:].assign(id=lambda t: "x" + t["id"])])
    mine, other = write(more, tmp_path / "mine.csv"), write(predicted, tmp_path / "other.csv")
    call = [str(mine), "--labels", str(labels), "--against", str(other)]
    assert module.main(call) == 1
    assert "280 of 300" in capsys.readouterr().err
    assert module.main([*call, "--partial", "--write", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "280 of 300" in printed and "280 of 560 rows" in printed and "prompt: " in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert f"{written['log_loss']:.4f}" in printed and written["n_pairs"] == 280
    own, against, *_ = written["models"]
    assert own["difference"] is None and against["difference"] == pytest.approx(0)
    assert written["classes"][2]["vote"] == "tie" and written["slices"][0]["low"] is not None
    assert module.main([str(mine), "--labels", str(tmp_path / "none.csv")]) == 1
    assert "none.csv" in capsys.readouterr().err


def test_real_layouts_can_be_scored(real_pairs):
    for name in ("several_votes.csv.gz", "plain_texts_wsdm.csv", "arena_140k_sample.csv"):
        labelled = read_labelled([REAL_DATA / "layouts" / name])
        probs = np.full((len(labelled), 3), 1 / 3)
        result = score_submission(labelled, {"flat": probs}, labelled, N_BOOT)
        assert result["log_loss"] == pytest.approx(np.log(3)), name


def test_groups_are_those_that_the_suite_makes(battles, tmp_path):
    path = write_battles(battles, tmp_path / "train.csv")
    expected = add_groups_and_folds(load_pairs(path, quiet=True)[0])
    assert read_labelled([path])["group"].tolist() == expected["group"].tolist()
