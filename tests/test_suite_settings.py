import nbformat
import pytest

from src.utils.config import (
    SuiteError,
    check_parameter,
    make_parameters,
    read_parameters,
    split_settings,
)

DEFAULTS = {
    "01_eda": {"PROFILE": "auto", "DATA": "", "TEST": "", "SEED": 1},
    "02_baseline": {"PROFILE": "auto", "SEED": 1, "RIDGE": 1.0, "FOLDS": [0], "FAST": False},
}


def write_notebook(path, parameters):
    cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell("1")]), path)


def test_parameters_are_read_without_running_anything(tmp_path):
    write_notebook(
        tmp_path / "a.ipynb",
        'NAME: str = "a # b"  # text\nFOLDS: tuple[int, ...] = (0, 1)\nRATE: float = -1e-3',
    )
    assert read_parameters(tmp_path / "a.ipynb") == {
        "NAME": "a # b",
        "FOLDS": (0, 1),
        "RATE": -1e-3,
    }


def test_a_parameter_that_is_no_literal_is_named(tmp_path):
    write_notebook(tmp_path / "a.ipynb", "WIDTH: int = 2**18")
    with pytest.raises(SuiteError, match=r"WIDTH: int = 2 \*\* 18"):
        read_parameters(tmp_path / "a.ipynb")


def test_kernels_see_only_what_is_injected():
    parameters = make_parameters(
        DEFAULTS, profile={"02_baseline": {"RIDGE": 2}}, data="/x", settings=["SEED=7"]
    )
    assert parameters["01_eda"] == {"PROFILE": "none", "DATA": "/x", "SEED": 7}
    assert parameters["02_baseline"] == {"PROFILE": "none", "RIDGE": 2.0, "SEED": 7}


def test_a_setting_wins_over_the_profile_and_is_yaml():
    profile = {"02_baseline": {"RIDGE": 2.0}}
    settings = ["02.RIDGE=3", "02_baseline.FOLDS=[0,1]", "02.FAST=true"]
    chosen = make_parameters(DEFAULTS, profile=profile, settings=settings)["02_baseline"]
    assert (chosen["RIDGE"], chosen["FOLDS"], chosen["FAST"]) == (3.0, [0, 1], True)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("02_baseline.RIGDE=1", "did you mean 'RIDGE'"),
        ("02_basline.RIDGE=1", "did you mean '02_baseline'"),
        ("SEDE=1", "did you mean 'SEED'"),
        ("02.SEED=one", "expected int, got 'one'"),
        ("02.SEED=true", "expected int, got True"),
        ("02.SEED=1.5", "expected int, got 1.5"),
        ("02.RIDGE", "expected NOTEBOOK.NAME=value"),
    ],
)
def test_a_misspelt_setting_is_an_error(setting, message):
    with pytest.raises(SuiteError, match=message):
        make_parameters(DEFAULTS, profile={}, settings=[setting])


def test_a_text_needs_no_quotes_whatever_yaml_sees_in_it():
    settings = ["01.PROFILE=no", "01.DATA=", "01.TEST=1e3"]
    chosen = make_parameters(DEFAULTS, profile={}, settings=settings)["01_eda"]
    assert chosen == {"PROFILE": "no", "DATA": "", "TEST": "1e3"}


def test_settings_in_one_text_are_told_apart():
    assert split_settings(" 03.FOLDS=[0, 1]  SEED=2 ") == ["03.FOLDS=[0, 1]", "SEED=2"]


def test_a_misspelt_profile_key_is_an_error():
    with pytest.raises(SuiteError, match="did you mean 'RIDGE'"):
        make_parameters(DEFAULTS, profile={"02_baseline": {"RIGDE": 1.0}})


def test_a_whole_number_passes_for_a_float_and_comes_back_as_one():
    value = check_parameter("02_baseline", "RIDGE", 2, DEFAULTS["02_baseline"])
    assert (value, type(value)) == (2.0, float)
