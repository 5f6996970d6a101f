import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoTokenizer

from src.utils.config import FinetuneConfig
from src.utils.models.template import encode_pairs
from src.utils.schema import LABELS, TEXTS, probs_table, swap_pairs
from src.utils.training.data import (
    NO_VOTE,
    Examples,
    add_extra_battles,
    loss_of,
    make_targets,
    plan_steps,
    split_step,
)

ALTERNATING = FinetuneConfig(
    max_tokens=96, predict_tokens=96, tokens_per_step=512, n_epochs=2.0, both_orders=False
)


def test_without_both_orders_an_epoch_has_every_battle_once_and_the_next_in_the_other_order():
    lengths = np.random.default_rng(0).integers(5, 90, 101)
    plan = plan_steps(lengths, ALTERNATING)
    items = np.concatenate(plan)
    assert len(items) == 202
    first, second = items[:101], items[101:]
    assert sorted(first // 2) == sorted(second // 2) == list(range(101))
    order = {item // 2: item % 2 for item in first}
    assert all(item % 2 == 1 - order[item // 2] for item in second)
    assert 30 < sum(order.values()) < 70


def test_both_orders_of_a_battle_share_a_step_within_the_budget():
    lengths = np.random.default_rng(0).integers(5, 97, 101)
    plan = plan_steps(lengths, dataclasses.replace(ALTERNATING, both_orders=True, n_epochs=1.0))
    assert sorted(np.concatenate(plan)) == list(range(202))
    for batch in plan:
        items = np.array(batch)
        assert (items[0::2] ^ 1 == items[1::2]).all()
        assert len(items) * lengths[items // 2].max() <= 512


def test_a_packed_plan_spends_its_budget_on_real_tokens():
    lengths = np.random.default_rng(0).integers(5, 97, 101)
    config = dataclasses.replace(ALTERNATING, both_orders=True, n_epochs=1.0)
    packed, padded = plan_steps(lengths, config, is_packed=True), plan_steps(lengths, config)
    assert sorted(np.concatenate(packed)) == list(range(202))
    for batch in packed:
        items = np.array(batch)
        assert (items[0::2] ^ 1 == items[1::2]).all()
        assert lengths[items // 2].sum() <= 512
    assert len(packed) < len(padded)


def test_a_fraction_of_an_epoch_takes_that_share_of_its_steps():
    lengths = np.random.default_rng(0).integers(5, 90, 400)
    full = plan_steps(lengths, dataclasses.replace(ALTERNATING, n_epochs=1.0))
    half = plan_steps(lengths, dataclasses.replace(ALTERNATING, n_epochs=0.5))
    assert half == full[: len(half)]
    assert abs(len(half) - len(full) / 2) <= 1


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("budget", [1, 97, 300, 10_000])
def test_a_step_is_split_into_passes_within_the_budget_and_no_item_is_lost(is_packed, budget):
    lengths = np.random.default_rng(0).integers(5, 97, 40)
    items = [10 * place for place in range(40)]
    passes = split_step(items, lengths, budget, is_packed)
    assert sorted(np.concatenate(passes)) == items
    for each in passes:
        inside = lengths[np.array(each) // 10]
        n_tok = inside.sum() if is_packed else len(each) * inside.max()
        assert n_tok <= budget or len(each) == 1
    least = lengths.sum() / budget
    assert len(passes) <= 2 * max(1, least) + 1 or budget == 1
    assert split_step([], lengths[:0], budget, is_packed) == []


def test_an_example_is_a_battle_as_given_and_the_next_one_has_its_answers_exchanged(
    demo_pairs, tiny_base
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base("modernbert"))
    pairs = demo_pairs[:30]
    examples = Examples(pairs, tokenizer, ALTERNATING)
    for order, table in enumerate((pairs, swap_pairs(pairs))):
        rows = encode_pairs(table, tokenizer, ALTERNATING.max_tokens)
        for battle, (row, label) in enumerate(zip(rows, table["label"], strict=True)):
            ids, target = examples[2 * battle + order]
            assert ids.tolist() == row and len(row) == examples.lengths[battle]
            assert target.tolist() == [np.eye(3)[label].tolist(), [0, 0, 0]]
    assert ids.dtype == np.int32 and target.dtype == np.float32


def soft_file(folder, pairs, probs):
    path = folder / "soft_labels.parquet"
    probs_table(pairs["id"], probs).to_parquet(path, index=False)
    return path


def test_targets_are_the_votes_beside_the_soft_labels_where_there_are_some(demo_pairs, tmp_path):
    pairs, soft = demo_pairs.head(6), np.random.default_rng(0).dirichlet(np.ones(3), 4)
    votes = np.eye(3)[pairs["label"]]
    config = FinetuneConfig(soft_labels=str(soft_file(tmp_path, pairs.iloc[[3, 2, 1, 0]], soft)))
    targets = make_targets(pairs, config)
    np.testing.assert_array_equal(targets[:, 0], votes)
    np.testing.assert_allclose(targets[:4, 1], soft[::-1], atol=1e-6)
    assert not targets[4:, 1].any()
    assert not make_targets(pairs, FinetuneConfig())[:, 1].any()


def test_targets_of_several_votes_are_their_shares(demo_pairs):
    pairs = demo_pairs.head(3).assign(votes_a=[3, 0, 1], votes_b=[1, 0, 1], votes_tie=[0, 2, 2])
    targets = make_targets(pairs, FinetuneConfig())
    np.testing.assert_allclose(targets[:, 0], [[0.75, 0.25, 0], [0, 0, 1], [0.25, 0.25, 0.5]])
    logits = torch.zeros(3, 3)
    loss, reported = loss_of(logits, torch.from_numpy(targets), FinetuneConfig())
    assert loss == reported == pytest.approx(3 * np.log(3))


def test_the_other_order_has_vote_and_soft_label_exchanged(demo_pairs, tmp_path, tiny_base):
    pairs, soft = demo_pairs.head(5), np.tile([0.2, 0.3, 0.5], (5, 1))
    config = dataclasses.replace(ALTERNATING, soft_labels=str(soft_file(tmp_path, pairs, soft)))
    examples = Examples(pairs, AutoTokenizer.from_pretrained(tiny_base("modernbert")), config)
    for row in range(5):
        given, exchanged = examples[2 * row][1], examples[2 * row + 1][1]
        np.testing.assert_array_equal(exchanged, given[:, [1, 0, 2]])
        np.testing.assert_allclose(exchanged[1], [0.3, 0.2, 0.5], atol=1e-6)


# ---- the loss ----------------------------------------------------------------


@pytest.fixture
def rows():
    """Logits, votes (the last battle has none) and soft labels (the first has none)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator).requires_grad_()
    soft = torch.randn(4, 3, generator=generator).softmax(1)
    votes = torch.eye(3)[[2, 0, 1, 0]]
    soft[0], votes[3] = 0, 0
    return logits, votes, soft


def loss_with(rows, temperature, weight):
    logits, votes, soft = rows
    config = FinetuneConfig(soft_temperature=temperature, soft_weight=weight)
    return loss_of(logits, torch.stack([votes, soft], dim=1), config)


def test_without_soft_labels_the_loss_is_that_of_the_votes(rows):
    logits, votes, _ = rows
    expected = cross_entropy(logits[:3], votes[:3].argmax(1), reduction="sum")
    targets = torch.stack([votes, torch.zeros(4, 3)], dim=1)[:3]
    for loss in loss_of(logits[:3], targets, FinetuneConfig()):
        torch.testing.assert_close(loss, expected)


def test_at_temperature_1_soft_labels_are_mixed_with_the_votes(rows):
    logits, votes, soft = rows
    mixed = 0.75 * votes + 0.25 * soft
    mixed[0], mixed[3] = votes[0], soft[3]
    loss, _ = loss_with(rows, 1.0, 0.25)
    torch.testing.assert_close(loss, cross_entropy(logits, mixed, reduction="sum"))


def test_the_gradient_is_that_of_hintons_loss(rows):
    logits, votes, soft = rows
    loss, _ = loss_with(rows, 5.0, 0.9)
    (found,) = torch.autograd.grad(loss, logits)
    teacher = (soft[1:].log() / 5).softmax(1)
    divergence = kl_div((logits[1:] / 5).log_softmax(1), teacher, reduction="none").sum(1)
    expected = 25 * (torch.tensor([0.9, 0.9, 1.0]) * divergence).sum()
    expected = expected + cross_entropy(logits[0:1], votes[0:1])
    expected = expected + 0.1 * cross_entropy(logits[1:3], votes[1:3], reduction="sum")
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_a_student_that_agrees_with_its_teacher_stays_calibrated_at_any_temperature(
    rows, temperature
):
    _, votes, soft = rows
    logits = soft[1:].log().requires_grad_()
    loss, _ = loss_with((logits, votes[1:], soft[1:]), temperature, 1.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.5), (5.0, 0.9)])
def test_the_loss_to_report_is_that_of_the_votes_at_any_temperature_and_weight(
    rows, temperature, weight
):
    logits, votes, soft = rows
    expected = cross_entropy(logits[:3], votes[:3].argmax(1), reduction="sum")
    expected = expected + cross_entropy(logits[3:], soft[3:], reduction="sum")
    _, reported = loss_with(rows, temperature, weight)
    torch.testing.assert_close(reported, expected)


def test_a_teacher_that_is_certain_gives_a_finite_loss():
    logits = torch.zeros(1, 3, requires_grad=True)
    certain = torch.tensor([[1.0, 0.0, 0.0]])
    for loss in loss_with((logits, certain, certain), 5.0, 0.9):
        assert loss.isfinite()


def test_soft_labels_of_other_battles_or_of_no_file_are_refused(demo_pairs, tmp_path):
    with pytest.raises(FileNotFoundError, match="WRITE_SOFT_LABELS"):
        make_targets(demo_pairs, FinetuneConfig(soft_labels=str(tmp_path / "none.parquet")))
    path = soft_file(tmp_path, demo_pairs.head(2), np.full((2, 3), 1 / 3))
    others = demo_pairs[2:][demo_pairs["fold"][2:] != 0]
    expected = rf"{len(others)} battles .* folds \[1, 2, 3, 4\], found none.*WRITE_SOFT_LABELS=True"
    with pytest.raises(ValueError, match=expected):
        make_targets(others, FinetuneConfig(soft_labels=str(path)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda table: table.drop(columns="winner_tie"), "winner_tie"),
        (lambda table: table.assign(id=1), "one row per id"),
        (lambda table: table.assign(winner_tie=2.0), "row 0"),
    ],
)
def test_a_file_that_holds_no_soft_labels_is_named(demo_pairs, tmp_path, damage, message):
    path = soft_file(tmp_path, demo_pairs, np.full((300, 3), 1 / 3))
    damage(pd.read_parquet(path)).to_parquet(path)
    with pytest.raises(ValueError, match=rf"soft_labels.parquet.*{message}"):
        make_targets(demo_pairs, FinetuneConfig(soft_labels=str(path)))


# ---- extra battles -----------------------------------------------------------


def battle_file(path, pairs, labelled=True):
    """Battles as the competition writes them."""
    table = pd.DataFrame({"id": pairs["id"]})
    for name in TEXTS:
        table[name] = [json.dumps(list(turns)) for turns in pairs[name]]
    if labelled:
        table[list(LABELS)] = np.eye(3, dtype=int)[pairs["label"]]
    table.to_csv(path, index=False)
    return str(path)


@pytest.fixture
def arena_and_extra(demo_pairs):
    """Arena of 200 battles; 40 more with ids and prompts of their own."""
    arena = demo_pairs[:200].reset_index(drop=True)
    extra = demo_pairs[200:240].reset_index(drop=True)
    prompts = [(f"a question of its own, number {row}",) for row in range(len(extra))]
    return arena, extra.assign(id=range(10_000, 10_040), prompt=pd.Series(prompts, dtype=object))


def test_extra_battles_are_only_trained_on_and_dropped_where_their_prompt_is_held_out(
    arena_and_extra, tmp_path, capsys
):
    arena, extra = arena_and_extra
    is_heldout = (arena["fold"] == 0).to_numpy()
    question = arena["prompt"][is_heldout].iloc[0][0]
    extra["prompt"] = pd.Series(
        [(f"  {question.upper()} \n", "more"), *extra["prompt"][1:]], dtype=object
    )
    config = FinetuneConfig(extra_battles=(battle_file(tmp_path / "extra.csv", extra),))
    train_pairs = add_extra_battles(arena, is_heldout, config)
    assert train_pairs["id"].tolist() == [*arena["id"][~is_heldout], *extra["id"][1:]]
    assert not set(train_pairs["group"]) & set(arena["group"][is_heldout])
    assert train_pairs["label"].tolist()[-39:] == extra["label"].tolist()[1:]
    assert (
        "40 read, 39 added (39 with a vote); dropped 0 repeated and 1 with a held-out prompt"
        in capsys.readouterr().out
    )
    # A model that holds nothing out takes all.
    assert len(add_extra_battles(arena, np.zeros(200, dtype=bool), config)) == 240


def test_extra_battles_of_another_layout_are_kept_from_held_out_prompts_of_a_users_group(
    arena_and_extra, tmp_path
):
    arena, _ = arena_and_extra
    is_heldout = (arena["fold"] == 0).to_numpy()
    question = arena["prompt"][is_heldout].iloc[0][0]
    table = pd.DataFrame({"id": ["x", "y"], "prompt": [question, "a new one"]})
    table = table.assign(response_a="1", response_b="2", winner="tie")
    table.to_csv(tmp_path / "extra.csv", index=False)
    config = FinetuneConfig(extra_battles=(str(tmp_path / "extra.csv"),))
    joined = arena.assign(group=7)  # named by another prompt of its user
    added = add_extra_battles(joined, is_heldout, config)
    assert added["id"].tolist()[-1] == "y" and len(added) == (~is_heldout).sum() + 1


def test_battles_without_votes_learn_from_a_submission(arena_and_extra, tmp_path):
    arena, extra = arena_and_extra
    soft = np.random.default_rng(0).dirichlet(np.ones(3), len(extra))
    probs_table(extra["id"], soft).to_csv(tmp_path / "submission.csv", index=False)
    files = (battle_file(tmp_path / "extra.csv", extra, labelled=False),)
    config = FinetuneConfig(
        extra_battles=files, soft_labels=str(tmp_path / "submission.csv"), soft_weight=0.25
    )
    train_pairs = add_extra_battles(arena, np.zeros(200, dtype=bool), config)
    assert (train_pairs["label"][200:] == NO_VOTE).all()
    targets = make_targets(train_pairs, config)
    np.testing.assert_array_equal(targets[:200, 0], np.eye(3)[arena["label"]])
    np.testing.assert_allclose(targets[200:, 1], soft, atol=1e-6)
    assert not targets[200:, 0].any() and not targets[:200, 1].any()


def test_extra_battles_with_votes_need_no_soft_labels(arena_and_extra, tmp_path):
    arena, extra = arena_and_extra
    soft = soft_file(tmp_path, arena, np.full((200, 3), 1 / 3))
    files = (battle_file(tmp_path / "extra.csv", extra),)
    config = FinetuneConfig(extra_battles=files, soft_labels=str(soft))
    train_pairs = add_extra_battles(arena, np.zeros(200, dtype=bool), config)
    targets = make_targets(train_pairs, config)
    assert (
        targets[:, 0].any(1).all() and targets[:, 1].any(1).tolist() == [True] * 200 + [False] * 40
    )


def test_a_battle_without_a_vote_or_a_soft_label_is_named(arena_and_extra, tmp_path):
    arena, extra = arena_and_extra
    files = (battle_file(tmp_path / "extra.csv", extra, labelled=False),)
    with pytest.raises(
        ValueError,
        match=r"extra\.csv, row 1, id 10000: expected a vote or a soft label.*40 battles",
    ):
        add_extra_battles(arena, np.zeros(200, dtype=bool), FinetuneConfig(extra_battles=files))
    soft = soft_file(tmp_path, extra.drop(index=[7]), np.full((39, 3), 1 / 3))
    with pytest.raises(ValueError, match=r"extra\.csv, row 8, id 10007"):
        add_extra_battles(
            arena,
            np.zeros(200, dtype=bool),
            FinetuneConfig(extra_battles=files, soft_labels=str(soft)),
        )


def test_an_id_of_another_battle_is_refused_and_a_battle_of_the_arena_is_not_taken_twice(
    arena_and_extra, tmp_path
):
    arena, extra = arena_and_extra
    is_heldout = np.zeros(200, dtype=bool)
    again = battle_file(tmp_path / "again.csv", pd.concat([extra[:3], arena[5:9]]))
    assert (
        len(add_extra_battles(arena, is_heldout, FinetuneConfig(extra_battles=(again, again))))
        == 203
    )
    extra.loc[4, "id"] = arena["id"][0]
    clash = battle_file(tmp_path / "clash.csv", extra)
    with pytest.raises(
        ValueError, match=rf"clash\.csv, row 5, id {arena['id'][0]}: expected an id of its own"
    ):
        add_extra_battles(arena, is_heldout, FinetuneConfig(extra_battles=(clash,)))


def test_a_missing_file_of_extra_battles_is_named(demo_pairs):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        add_extra_battles(
            demo_pairs, np.zeros(300, dtype=bool), FinetuneConfig(extra_battles=("nowhere.csv",))
        )
