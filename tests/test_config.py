"""Claims about settings and profiles."""

from pathlib import Path

import pytest

from src.utils.config import BaselineConfig, DecoderConfig, EdaConfig, FinetuneConfig, read_profile


def capitals(config: object) -> dict:
    """Settings as a notebook's globals hold them."""
    return {key.upper(): value for key, value in config.to_json().items()}


@pytest.mark.parametrize(
    "config",
    [EdaConfig(tokenizers=("x",)), BaselineConfig(), FinetuneConfig(folds=(0, 2)), DecoderConfig()],
)
def test_settings_survive_json(config: object) -> None:
    assert type(config).from_json(config.to_json()) == config


def test_an_unknown_setting_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        ValueError, match="unknown setting 'learning_rat', did you mean 'learning_rate'"
    ):
        FinetuneConfig.from_json({"learning_rat": 1})


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"quantization": "3bit"}, "quantization: expected none, 8bit or 4bit, got '3bit'"),
        ({"quantization": "8bit"}, "lora_rank: expected above 0"),
        ({"tokens_per_batch": 100}, "tokens_per_batch: expected at least 4096"),
        ({"n_epochs": 0}, "n_epochs"),
        ({"warmup_share": 1.0}, "warmup_share"),
        ({"folds": ()}, "folds"),
        ({"sharding": "half"}, "sharding: expected none or full"),
        ({"sharding": "full", "n_processes": 1}, "sharding: expected none for one process"),
        (
            {"sharding": "full", "quantization": "4bit", "lora_rank": 8},
            "sharding: expected none for a quantised base",
        ),
        (
            {"sharding": "full", "optimizer": "adamw_8bit"},
            "optimizer: expected adamw for parted weights",
        ),
    ],
)
def test_a_value_out_of_range_is_refused(change: dict, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        FinetuneConfig(**change)


def test_a_profile_fills_in_only_what_was_left_untouched(tmp_path: Path) -> None:
    profile = tmp_path / "p.yaml"
    profile.write_text("03_modernbert: {N_EPOCHS: 7, SEED: 1}\n")
    parameters = capitals(FinetuneConfig()) | {"SEED": 99}
    config = FinetuneConfig.from_parameters(parameters, "03_modernbert", str(profile))
    assert (config.n_epochs, config.seed) == (7, 99)
    untouched = FinetuneConfig.from_parameters(parameters, "03_modernbert", "none")
    assert (untouched.n_epochs, untouched.seed) == (FinetuneConfig().n_epochs, 99)


def test_an_unknown_profile_lists_those_there_are() -> None:
    with pytest.raises(FileNotFoundError, match=r"profile 'dmeo'.*'demo'"):
        read_profile("dmeo")


def test_a_profile_that_is_no_mapping_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match=r"p\.yaml: expected one section"):
        read_profile(str(path))
