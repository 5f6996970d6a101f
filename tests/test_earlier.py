from pathlib import Path

import pytest

from src.utils.config import FinetuneConfig
from src.utils.runs import write_json, write_manifest
from src.utils.training.earlier import (
    BEGUN,
    RECORD,
    arrange_models,
    describe_difference,
    identify,
    list_finished,
)

ONE = identify(FinetuneConfig(learning_rate=1e-4), "hash of the battles", [])
TWO = identify(FinetuneConfig(learning_rate=2e-4), "hash of the battles", [])


def begin(run_dir, name, identity):
    write_json(run_dir / "checkpoints" / name / BEGUN, {"identity": identity})


def finish(run_dir, name, identity):
    folder = run_dir / "model" / name
    folder.mkdir(parents=True)
    (folder / "weights").write_text(f"{name} at {identity['settings']['learning_rate']}")
    write_manifest(folder)
    write_json(folder / RECORD, {"identity": identity})


def read_weights(run_dir: Path):
    return sorted(path.read_text() for path in run_dir.rglob("weights"))


def arrange(run_dir, identity):
    arrange_models(run_dir, lambda name: identity)


def test_settings_that_change_no_weight_are_not_part_of_a_model():
    changes = {"predict_tokens": 100, "folds": (1, 2), "n_evals": 9, "tokens_per_batch": 9999}
    same = identify(FinetuneConfig(learning_rate=1e-4, **changes), "hash of the battles", [])
    assert same == ONE and describe_difference(ONE, same) == ""
    assert describe_difference(ONE, TWO) == "LEARNING_RATE was 0.0001, is 0.0002"
    other = identify(FinetuneConfig(learning_rate=1e-4), "other battles", [])
    assert describe_difference(ONE, other) == "other battles"
    assert describe_difference(None, ONE) == "its settings are unknown"


def test_lora_is_part_of_a_model_only_where_it_is_trained():
    changes = {"lora_rank": 8, "lora_alpha": 2.0, "learning_rate": 1e-4}
    assert identify(FinetuneConfig(**changes), "hash of the battles", []) == ONE
    lora = identify(FinetuneConfig(train="lora", **changes), "hash of the battles", [])
    assert describe_difference(ONE, lora).startswith("TRAIN was all, is lora")


@pytest.mark.parametrize("rank", [0, 8])
def test_a_model_from_before_train_was_named_is_known_again(rank):
    train = "lora" if rank else "all"
    asked = identify(FinetuneConfig(train=train, lora_rank=rank or 32), "hash", [])
    settings = {**asked["settings"], "lora_rank": rank, "lora_alpha": 16.0}
    del settings["train"]
    assert describe_difference({"settings": settings, "data": asked["data"]}, asked) == ""


def test_two_settings_take_turns_and_each_finds_its_models_again(tmp_path, capsys):
    for name in ("fold_0", "fold_1"):
        begin(tmp_path, name, ONE)
        finish(tmp_path, name, ONE)
    arrange(tmp_path, TWO)
    assert list_finished(tmp_path) == []
    finish(tmp_path, "fold_0", TWO)
    arrange(tmp_path, ONE)
    assert list_finished(tmp_path) == ["fold_0", "fold_1"]
    texts = ["fold_0 at 0.0001", "fold_1 at 0.0001"]
    assert read_weights(tmp_path / "model") == texts
    arrange(tmp_path, TWO)
    assert read_weights(tmp_path / "model") == ["fold_0 at 0.0002"]
    assert read_weights(tmp_path) == sorted([*texts, "fold_0 at 0.0002"])
    assert "fold_0 is kept in" in capsys.readouterr().out


def test_a_model_that_is_there_is_not_replaced_by_one_that_was_set_aside(tmp_path):
    finish(tmp_path, "fold_0", ONE)
    arrange(tmp_path, TWO)
    finish(tmp_path, "fold_0", ONE)
    (tmp_path / "model" / "fold_0" / "weights").write_text("newer")
    write_manifest(tmp_path / "model" / "fold_0")
    arrange(tmp_path, ONE)
    assert read_weights(tmp_path / "model") == ["newer"]
    arrange(tmp_path, TWO)
    assert read_weights(tmp_path / "earlier") == ["fold_0 at 0.0001", "newer"]


def test_a_kill_between_two_moves_loses_nothing(tmp_path, monkeypatch):
    begin(tmp_path, "fold_0", ONE)
    finish(tmp_path, "fold_0", ONE)
    moves = []

    def die_at_the_second(source, target):
        moves.append(target)
        if len(moves) == 2:
            raise KeyboardInterrupt
        Path(source).rename(target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", die_at_the_second)
        arrange(tmp_path, TWO)
    arrange(tmp_path, TWO)
    assert list_finished(tmp_path) == [] and len(read_weights(tmp_path)) == 1
    arrange(tmp_path, ONE)
    assert list_finished(tmp_path) == ["fold_0"]


def test_a_folder_of_the_user_is_left_alone(tmp_path):
    finish(tmp_path, "fold_0", ONE)
    finish(tmp_path, "fold_0_copy", TWO)
    arrange(tmp_path, ONE)
    assert list_finished(tmp_path) == ["fold_0"]
    assert (tmp_path / "model" / "fold_0_copy" / "weights").exists()


@pytest.mark.parametrize("damage", ["weights", RECORD])
def test_a_damaged_model_is_named_and_never_comes_back(tmp_path, damage):
    finish(tmp_path, "fold_0", ONE)
    (tmp_path / "model" / "fold_0" / damage).unlink()
    with pytest.warns(UserWarning, match=f"fold_0 is damaged .*{damage}"):
        arrange(tmp_path, ONE)
    arrange(tmp_path, ONE)
    assert list_finished(tmp_path) == []
    assert list((tmp_path / "earlier" / "damaged" / "model" / "fold_0").iterdir())
