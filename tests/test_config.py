"""Claims about settings, profiles, and values as people write them."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from docs.parameters import PAGE, describe_parameters
from src.utils.config import (
    CONFIGS,
    PROFILES,
    BaselineConfig,
    Config,
    DecoderConfig,
    EdaConfig,
    FinetuneConfig,
    SuiteError,
    check_parameter,
    choose_names,
    find_name,
    make_parameters,
    name_model,
    read_parameters,
    read_profile,
)

ROOT = PROFILES.parents[1]
NOTEBOOKS = {path.stem: path for path in sorted(PROFILES.parent.glob("*.ipynb"))}
DEFAULTS = {name: read_parameters(path) for name, path in NOTEBOOKS.items()}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def read(setting: str, notebook: str = "03_modernbert") -> object:
    """What a notebook gets of `NAME=value` on the command line."""
    name = setting.partition("=")[0]
    chosen = make_parameters(DEFAULTS, profile={}, settings=[f"{notebook}.{setting}"])[notebook]
    return (chosen | chosen.get("OPTIONS", {}))[name]


# Settings


@every_config
def test_settings_survive_json_and_other_processes(config: type[Config]) -> None:
    content = json.loads(json.dumps(config().to_json()))
    assert config.from_json(content) == config()
    assert pickle.loads(pickle.dumps(config())) == config()


@pytest.mark.parametrize(("rank", "train"), [(0, "all"), (8, "lora")])
@pytest.mark.parametrize("kind", [FinetuneConfig, DecoderConfig])
def test_settings_of_an_older_run_say_by_their_rank_what_was_trained(kind, rank, train) -> None:
    content = kind(quantization="none").to_json() | {"lora_rank": rank}
    del content["train"]
    config = kind.from_json(content)
    assert (config.train, config.uses_lora, config.is_frozen) == (train, rank > 0, rank > 0)
    assert config.lora_rank == (rank or kind.lora_rank)


def test_a_rank_alone_does_not_turn_lora_on() -> None:
    assert not FinetuneConfig.from_parameters({"LORA_RANK": 8}, "03_modernbert").uses_lora


@every_config
def test_every_setting_says_what_it_means_in_its_limits(config: type[Config]) -> None:
    for entry in config.__pydantic_fields__.values():
        assert entry.description
        assert "unit" in entry.json_schema_extra


def test_positions_replace_and_hashes_work_as_for_any_dataclass() -> None:
    config = DecoderConfig("tiny:qwen3", "", lora_rank=4)
    assert (config.checkpoint, config.revision) == ("tiny:qwen3", "")
    longer = dataclasses.replace(config, n_epochs=3)
    assert (longer.n_epochs, longer.lora_rank) == (3.0, 4)
    assert len({config, longer, dataclasses.replace(longer, n_epochs=1.0)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_the_settings_of_03_read_the_runs_of_04() -> None:
    config = FinetuneConfig.from_json(DecoderConfig(seed=3).to_json())
    assert config.to_json() == DecoderConfig(seed=3).to_json()


def test_a_pinned_revision_is_that_of_its_own_checkpoint() -> None:
    assert DecoderConfig().revision != FinetuneConfig().revision != ""
    assert FinetuneConfig("microsoft/deberta-v3-base").revision == ""
    assert FinetuneConfig("microsoft/deberta-v3-base", "8ccc9b6").revision == "8ccc9b6"
    assert FinetuneConfig.from_json(DecoderConfig().to_json()).revision == DecoderConfig().revision


def test_both_networks_have_the_same_limits() -> None:
    ours, theirs = FinetuneConfig.__pydantic_fields__, DecoderConfig.__pydantic_fields__
    for name, entry in ours.items():
        assert (entry.metadata, entry.description) == (
            theirs[name].metadata,
            theirs[name].description,
        )


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"quantization": "3bit"}, "quantization.*'none', '8bit' or '4bit'.*'3bit'"),
        ({"quantization": "8bit"}, "train.*lora or head.*8bit.*got all"),
        ({"tokens_per_batch": 100}, "tokens_per_batch.*3072.*got 100"),
        ({"n_epochs": 0}, "n_epochs.*greater than 0.*got 0"),
        ({"n_epochs": float("inf")}, "n_epochs.*finite.*got inf"),
        ({"warmup_share": 1.0}, "warmup_share.*less than 1.*got 1.0"),
        ({"folds": []}, "folds.*at least 1"),
        ({"folds": [0, "b"]}, "folds.1.*integer.*got 'b'"),
        ({"n_seeds": "3"}, "n_seeds.*integer.*got '3'"),
        ({"n_seeds": True}, "n_seeds.*integer.*got True"),
        ({"learning_rat": 1}, "'learning_rat'.*'learning_rate'"),
        ({"sharding": "full"}, "'sharding'"),
    ],
)
def test_a_wrong_value_names_field_expected_and_found(change: dict, found: str) -> None:
    with pytest.raises(SuiteError, match=found):
        FinetuneConfig.from_json(change)


def test_a_wrong_value_is_refused_without_json_too() -> None:
    with pytest.raises(ValueError, match="n_epochs"):
        dataclasses.replace(FinetuneConfig(), n_epochs=-1.0)
    with pytest.raises(ValueError, match="n_epoch"):
        FinetuneConfig(n_epoch=1.0)  # type: ignore[call-arg]


def test_settings_load_in_a_moment_and_without_torch() -> None:
    script = (
        "import sys, time; start = time.process_time(); import src.utils.config; "
        "print(time.process_time() - start); "
        "assert not {'torch', 'pandas', 'nbformat'} & {*sys.modules}"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 2


# Settings from a notebook


def test_a_profile_fills_in_only_what_was_left_untouched(tmp_path: Path) -> None:
    profile = tmp_path / "p.yaml"
    profile.write_text("03_modernbert: {N_EPOCHS: 7, SEED: 1, N_SEEDS: 2, N_EVALS: 9}\n")
    parameters = DEFAULTS["03_modernbert"] | {"SEED": 99, "OPTIONS": {"N_EVALS": 3}}
    config = FinetuneConfig.from_parameters(parameters, "03_modernbert", str(profile))
    assert (config.n_epochs, config.seed, config.n_seeds, config.n_evals) == (7.0, 99, 2, 3)
    untouched = FinetuneConfig.from_parameters(parameters, "03_modernbert")
    assert untouched == FinetuneConfig(seed=99, n_evals=3)


@pytest.mark.parametrize("name", ["EXTRA_BATTLES", "extra_battles"])
def test_options_reach_every_setting(name: str) -> None:
    parameters = DEFAULTS["04_qwen"] | {"OPTIONS": {name: ["a.csv"]}}
    config = DecoderConfig.from_parameters(parameters, "04_qwen")
    assert config == DecoderConfig(extra_battles=("a.csv",))


def test_a_misspelt_option_is_refused_with_the_nearest_name() -> None:
    parameters = DEFAULTS["03_modernbert"] | {"OPTIONS": {"N_SEDES": 3}}
    with pytest.raises(SuiteError, match=r"03_modernbert.*'N_SEDES'.*'N_SEEDS'"):
        FinetuneConfig.from_parameters(parameters, "03_modernbert")


# Values as people write them


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("LEARNING_RATE=1e-4", 1e-4),
        ("LEARNING_RATE=.0001", 1e-4),
        ("LEARNING_RATE='1E-4'", 1e-4),
        ("N_EPOCHS=2", 2.0),
        ("N_EPOCHS=1_000", 1000.0),
        ("N_SEEDS=3", 3),
        ("N_SEEDS=010", 10),
        ("N_SEEDS=1_000", 1000),
        ("MAX_PAIRS=1e3", 1000),
        ("MAX_PAIRS=2.5e+3", 2500),
        ("MAX_PAIRS= 7 ", 7),
        ("SEED=12345678901234567890", 12345678901234567890),
        *((f"REFIT={text}", True) for text in ("true", "True", "on", "yes", "1", "ON")),
        *((f"BOTH_ORDERS={text}", False) for text in ("false", "False", "off", "no", "0")),
        ("FOLDS=[0]", [0]),
        ("FOLDS=[0, 1]", [0, 1]),
        ("FOLDS=0,1", [0, 1]),
        ("FOLDS=2", [2]),
        ("EXTRA_BATTLES=", []),
        ("EXTRA_BATTLES=[]", []),
        ("EXTRA_BATTLES=a b.csv", ["a b.csv"]),
        ("EXTRA_BATTLES=['a, b.csv', ~/c.csv]", ["a, b.csv", "~/c.csv"]),
        ("EXTRA_BATTLES=1e3,on", ["1e3", "on"]),
        ("REVISION=", ""),
        ("REVISION=''", ""),
        *(
            (f"REVISION={text}", text)
            for text in "12345e67 1e-4 010 0x10 1_000 on yes null ~ true 2024-01-01 [0] 0,1".split()
        ),
        ('CHECKPOINT="my model"', "my model"),
        ("CHECKPOINT=~/models/a=b", "~/models/a=b"),
        ("CHECKPOINT=it's", "it's"),
        ("HEAD=contrast", "contrast"),
    ],
)
def test_a_value_is_read_by_the_type_of_its_parameter(setting: str, value: object) -> None:
    found = read(setting)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("setting", ["WRITE_SOFT_LABELS=on", "N_BOOTSTRAP=1e2"])
def test_notebooks_without_options_read_them_alike(setting: str) -> None:
    assert read(setting, "05_ensemble") == {"on": True, "1e2": 100}[setting.split("=")[1]]


def test_parameters_without_a_settings_class_are_read_by_their_default() -> None:
    assert read("DEADLINE_S=3e4", "06_kaggle_inference") == 30000.0
    assert read("DRY_RUN=no", "07_publish") is False
    assert read("N_PARITY_PAIRS=010", "07_publish") == 10
    assert read("REPO_ID=on", "07_publish") == "on"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("N_SEEDS=1.5", "integer"),
        ("N_SEEDS=1e-3", "integer"),
        ("N_SEEDS=one", "integer"),
        ("N_SEEDS=true", "integer"),
        ("N_SEEDS=0x10", "integer"),
        ("N_SEEDS=null", "integer"),
        ("N_SEEDS=", "integer"),
        ("N_SEEDS=[3]", "integer"),
        ("N_SEEDS=0", "greater than or equal to 1"),
        ("LEARNING_RATE=fast", "number"),
        ("LEARNING_RATE=2024-01-01", "number"),
        ("LEARNING_RATE=~", "number"),
        ("LEARNING_RATE=1e", "number"),
        ("REFIT=maybe", "boolean"),
        ("REFIT=2", "boolean"),
        ("REFIT=", "boolean"),
        ("FOLDS=a", "integer"),
        ("FOLDS=[[0]]", "integer"),
        ("FOLDS=[0", "tuple"),
        ("FOLDS={a: b}", "integer"),
        ("EXTRA_BATTLES=['a", "tuple"),
        ("HEAD=contrst", "'joint' or 'contrast'"),
        ("CHECKPOINT=", "at least 1"),
    ],
)
def test_a_wrong_value_names_notebook_parameter_expected_and_found(
    setting: str, expected: str
) -> None:
    name, _, text = setting.partition("=")
    with pytest.raises(SuiteError, match=f"03_modernbert.{name}.*{expected}") as error:
        read(setting)
    assert "got" in str(error.value)
    assert all(letter in str(error.value) for letter in text)


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("02_baseline.RIGDE=1", "02_baseline.*'RIGDE'.*'RIDGE'"),
        ("02_basline.RIDGE=1", "'02_basline'.*'02_baseline'"),
        ("SEDE=1", "'SEDE'.*'SEED'"),
        ("03.N_SEDES=1", "03_modernbert.*'N_SEDES'.*'N_SEEDS'"),
        ("02.N_SEEDS=1", "02_baseline.*'N_SEEDS'"),
        ("9.SEED=1", "'9'.*01_eda"),
        ("02.RIDGE", "'02.RIDGE'.*NOTEBOOK.NAME=value"),
        ("=3", "'=3'.*NOTEBOOK.NAME=value"),
    ],
)
def test_a_misspelt_setting_is_refused(setting: str, found: str) -> None:
    with pytest.raises(SuiteError, match=found):
        make_parameters(DEFAULTS, profile={}, settings=[setting])


@pytest.mark.parametrize("notebook", CONFIGS)
def test_every_default_is_read_back_from_its_own_text(notebook: str) -> None:
    for name, default in DEFAULTS[notebook].items():
        if name != "OPTIONS":
            text = str(default).replace("'", '"')
            assert check_parameter(notebook, name, text, DEFAULTS[notebook]) == default


def test_a_value_that_is_not_a_text_must_have_the_type() -> None:
    shown = DEFAULTS["02_baseline"]
    value = check_parameter("02_baseline", "RIDGE", 2, shown)
    assert (value, type(value)) == (2.0, float)
    for name, wrong in (("N_TREES", 1.5), ("N_TREES", "many"), ("N_TREES", None)):
        with pytest.raises(SuiteError, match=f"02_baseline.{name}.*{wrong}"):
            check_parameter("02_baseline", name, wrong, shown)


def test_settings_in_one_text_are_split() -> None:
    text = " 03.FOLDS=[0, 1]  03.N_SEEDS=2 04.CHECKPOINT=my model "
    chosen = make_parameters(DEFAULTS, profile={}, settings=[text])
    assert chosen["03_modernbert"]["FOLDS"] == [0, 1]
    assert chosen["03_modernbert"]["OPTIONS"] == {"N_SEEDS": 2}
    assert chosen["04_qwen"]["CHECKPOINT"] == "my model"


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("", list(NOTEBOOKS)),
        ("02", ["02_baseline"]),
        ("5,2", ["02_baseline", "05_ensemble"]),
        ("03-05", ["03_modernbert", "04_qwen", "05_ensemble"]),
        ("01 04_qwen", ["01_eda", "04_qwen"]),
        ("02_baseline-03", ["02_baseline", "03_modernbert"]),
    ],
)
def test_notebooks_are_chosen_by_number_range_or_name(text: str, chosen: list[str]) -> None:
    assert choose_names(text, list(NOTEBOOKS)) == chosen


@pytest.mark.parametrize(
    ("text", "named"), [("02_baselin", "02_baseline"), ("9", "01_eda"), ("05-02", "05-02")]
)
def test_an_unknown_notebook_or_a_falling_range_is_an_error(text: str, named: str) -> None:
    with pytest.raises(SuiteError, match=named):
        choose_names(text, list(NOTEBOOKS))


def test_a_notebook_is_found_by_name_or_number() -> None:
    assert [find_name(text, list(NOTEBOOKS)) for text in ("3", "03", "03_modernbert")] == [
        "03_modernbert"
    ] * 3


# What the runner injects


def test_what_a_notebook_does_not_show_goes_through_options() -> None:
    profile = {"03": {"N_SEEDS": "2", "N_EPOCHS": "1"}}
    chosen = make_parameters(DEFAULTS, profile=profile, settings=["03.N_SEEDS=3", "N_EVALS=2"])
    assert chosen["03_modernbert"] == {
        "PROFILE": "none",
        "N_EPOCHS": 1.0,
        "OPTIONS": {"N_SEEDS": 3, "N_EVALS": 2},
    }
    assert chosen["04_qwen"] == {"PROFILE": "none", "OPTIONS": {"N_EVALS": 2}}
    edited = {"03_modernbert": DEFAULTS["03_modernbert"] | {"OPTIONS": {"N_PROCESSES": 1}}}
    kept = make_parameters(edited, profile={}, settings=["N_SEEDS=3"])["03_modernbert"]
    assert kept["OPTIONS"] == {"N_PROCESSES": 1, "N_SEEDS": 3}
    parameters = DEFAULTS["03_modernbert"] | chosen["03_modernbert"]
    config = FinetuneConfig.from_parameters(parameters, "03_modernbert")
    assert config == FinetuneConfig(n_epochs=1.0, n_seeds=3, n_evals=2)


def test_later_sources_win_and_data_go_where_they_are_asked_for() -> None:
    chosen = make_parameters(
        DEFAULTS,
        profile={"02_baseline": {"RIDGE": "2", "SEED": "1"}},
        data="/x y",
        settings=["SEED=7"],
    )
    assert chosen["01_eda"] == {"PROFILE": "none", "DATA": "/x y", "SEED": 7}
    assert chosen["02_baseline"] == {"PROFILE": "none", "RIDGE": 2.0, "SEED": 7}
    assert chosen["03_modernbert"] == {"PROFILE": "none", "SEED": 7}


def test_parameters_are_read_without_running_anything(tmp_path: Path) -> None:
    path = tmp_path / "a.ipynb"
    assert read_parameters(write_notebook(path, 'A: str = "a # b"  # x\nB: float = -1e-3')) == {
        "A": "a # b",
        "B": -1e-3,
    }
    with pytest.raises(SuiteError, match=r"a\.ipynb.*NAME: type = literal.*C: int = 2 \*\* 18"):
        read_parameters(write_notebook(path, "C: int = 2**18"))


def write_notebook(path: Path, parameters: str) -> Path:
    """A notebook with nothing but a parameters cell."""
    cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    return path


# Profiles and the page of all parameters


def test_a_profile_is_read_as_the_command_line_is(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "03:\n  LEARNING_RATE: 1e-4\n  REVISION: 12345e67\n  REFIT: on\n"
        "  N_SEEDS: 010\n  FOLDS: [0, 1]\n  CHECKPOINT: on\n  SOFT_LABELS: 2024-01-01\n"
        "  EXTRA_BATTLES:\n  - null\n  OPTIONS: {N_PROCESSES: 1_0}\n01_eda:\n"
    )
    config = FinetuneConfig.from_parameters(DEFAULTS["03_modernbert"], "03_modernbert", str(path))
    assert config.learning_rate == 1e-4
    assert (config.revision, config.checkpoint, config.soft_labels) == (
        "12345e67",
        "on",
        "2024-01-01",
    )
    assert (config.refit, config.n_seeds, config.folds) == (True, 10, (0, 1))
    assert (config.extra_battles, config.n_processes) == (("null",), 10)


def test_the_profile_reward_is_full_with_another_start_of_04() -> None:
    for name, kind in CONFIGS.items():
        full = kind.from_parameters(DEFAULTS[name], name, "full")
        if isinstance(full, DecoderConfig):
            changes = {"checkpoint": "Skywork/Skywork-Reward-V2-Qwen3-4B", "revision": ""}
            full = dataclasses.replace(full, **changes)
        assert kind.from_parameters(DEFAULTS[name], name, "reward") == full


def test_the_real_run_has_one_more_model_on_every_battle_and_tiny_ones_do_not() -> None:
    for name in ("03_modernbert", "04_qwen"):
        for profile, refit in {"full": True, "reward": True, "demo": False, "small": False}.items():
            config = CONFIGS[name].from_parameters(DEFAULTS[name], name, profile)
            assert config.refit is refit  # type: ignore[attr-defined]


def test_an_unknown_profile_lists_the_existing_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"'dmeo'.*'demo'"):
        read_profile("dmeo")


@pytest.mark.parametrize("text", ["- 1", "03_modernbert: [a]", "03_modernbert: 3", "a: {b"])
def test_a_malformed_profile_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(SuiteError, match=r"p\.yaml.*section per notebook"):
        read_profile(str(path))


def test_a_misspelt_profile_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"'RIGDE'.*'RIDGE'"):
        make_parameters(DEFAULTS, profile={"02_baseline": {"RIGDE": "1.0"}})
    path = tmp_path / "p.yaml"
    path.write_text("02_baseline: {RIGDE: 1}")
    with pytest.raises(SuiteError, match=r"'RIGDE'.*'RIDGE'"):
        BaselineConfig.from_parameters(DEFAULTS["02_baseline"], "02_baseline", str(path))


def test_the_page_of_parameters_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == describe_parameters(), (
        "run python -m docs.parameters"
    )


def test_the_page_of_parameters_lists_every_one() -> None:
    page = describe_parameters()
    for notebook, config in CONFIGS.items():
        section = page.split(f"## {notebook}")[1].split("\n## ")[0]
        for name in {
            *DEFAULTS[notebook],
            *(field.name.upper() for field in dataclasses.fields(config)),
        }:
            assert section.count(f"\n| `{name}` |") == 1, name
    assert EdaConfig.__pydantic_fields__["n_folds"].description in page


def test_the_recipe_covers_every_setting_of_training() -> None:
    recipe = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    missing = [
        f.name for f in dataclasses.fields(FinetuneConfig) if f"`{f.name.upper()}`" not in recipe
    ]
    assert not missing


def test_a_stand_in_is_never_named_as_the_model_that_it_stands_in_for():
    assert name_model("tiny:modernbert") == "tiny encoder (stand-in)"
    assert name_model("tiny:qwen3") == "tiny decoder (stand-in)"
    assert name_model("Qwen/Qwen3-4B-Instruct-2507") == "Qwen3-4B-Instruct-2507"
    assert name_model("tiny:qwen3", "head") == "tiny decoder (stand-in), frozen, small head"
