import nbformat
import pytest

from src.utils.config import SuiteError
from src.utils.suite.pipeline import (
    STAGES,
    HashCache,
    River,
    Stage,
    absolute_data,
    choose_notebooks,
)

NAMES = ("01_eda", "02_baseline", "03_modernbert", "04_qwen", "05_ensemble")


def write_notebook(path, parameters):
    cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell("1")]), path)


@pytest.mark.parametrize(
    ("only", "chosen"),
    [
        ("", NAMES),
        ("02", ["02_baseline"]),
        ("5,2", ["02_baseline", "05_ensemble"]),
        ("03-05", ["03_modernbert", "04_qwen", "05_ensemble"]),
        ("01 04_qwen", ["01_eda", "04_qwen"]),
        ("02_baseline-03", ["02_baseline", "03_modernbert"]),
    ],
)
def test_notebooks_are_chosen_by_number_range_or_name(only, chosen):
    assert choose_notebooks(only, NAMES) == list(chosen)


@pytest.mark.parametrize("only", ["02_baselin", "9", "05-02", "two"])
def test_an_unknown_notebook_is_an_error(only):
    with pytest.raises(SuiteError, match=r"did you mean '02_baseline'|expected"):
        choose_notebooks(only, NAMES)


def test_data_paths_are_made_absolute_and_may_hold_spaces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my rows.csv").touch()
    assert absolute_data(["my rows.csv"]) == str(tmp_path / "my rows.csv")
    assert absolute_data(["a.csv b.csv"]) == f"{tmp_path / 'a.csv'} | {tmp_path / 'b.csv'}"
    assert (
        absolute_data(["a.csv", "my rows.csv"])
        == f"{tmp_path / 'a.csv'} | {tmp_path / 'my rows.csv'}"
    )
    assert absolute_data([""]) == ""


def test_equal_runs_have_equal_hashes_although_their_timings_differ(tmp_path):
    hashes = HashCache(tmp_path / "hashes.json")
    for i, text in enumerate(
        ['{"log_loss": 1.0, "seconds": 2}', '{"log_loss": 1.0, "seconds": 3}', '{"log_loss": 1.1}']
    ):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "metrics.json").write_text(text)
    first, second, third = (hashes.of(tmp_path / str(i) / "metrics.json") for i in range(3))
    assert first == second != third


def test_a_changed_file_changes_its_hash_also_across_calls(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    hashes = HashCache(tmp_path / "hashes.json")
    before = hashes.of(file)
    hashes.save()
    file.write_text("two")
    assert HashCache(tmp_path / "hashes.json").of(file) != before


def test_a_notebook_needs_only_the_models_that_it_was_told_to_use(tmp_path):
    stage = Stage(
        "05_e",
        ("x",),
        "x",
        reads=dict.fromkeys(("02_baseline", "03_modernbert"), ("oof",)),
        chosen_by="MEMBERS",
    )
    write_notebook(tmp_path / "05_e.ipynb", "MEMBERS: list[str] = []")
    river = River(tmp_path / "artifacts", {"05_e": {"MEMBERS": ["02_baseline"]}}, tmp_path, [stage])
    assert list(river.needs(stage)) == ["02_baseline"]
    assert list(River(tmp_path / "artifacts", {}, tmp_path, [stage]).needs(stage)) == [
        "02_baseline",
        "03_modernbert",
    ]


def test_the_river_flows_down():
    names = [stage.name for stage in STAGES]
    for i, stage in enumerate(STAGES):
        assert {*stage.reads, *stage.may_read} <= set(names[:i]), stage.name
        assert stage.mark in stage.leaves
