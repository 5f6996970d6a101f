import shutil
import zipfile

import nbformat

from src.utils.suite.pipeline import STAGES, Pipeline, Stage, measure_states

NAMES = [stage.name for stage in STAGES]


def write_notebook(path, parameters):
    cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell("1")]), path)


def test_a_notebook_needs_only_the_models_that_were_chosen(tmp_path):
    reads = dict.fromkeys(("01_eda", "02_baseline", "03_modernbert"), ("x",))
    stage = Stage("05_e", ("x",), reads=reads, chosen_by="MEMBERS")
    write_notebook(tmp_path / "05_e.ipynb", "MEMBERS: list[str] = []")
    for members, needed in ((["02_baseline"], ["01_eda", "02_baseline"]), ([], list(reads))):
        pipeline = Pipeline(tmp_path, {"05_e": {"MEMBERS": members}}, tmp_path, [stage])
        assert list(pipeline.needs(stage)) == needed


def test_a_retrained_network_makes_the_published_one_stale(tmp_path):
    weights = tmp_path / "04_qwen" / "model" / "fold_0" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    (stage,) = [stage for stage in STAGES if stage.name == "07_publish"]
    found = Pipeline(tmp_path, {}).inputs(stage)
    assert weights in found.values()
    assert Pipeline(tmp_path, {}).missing_input(stage)  # 01 must run first


def test_raw_data_count_by_their_content_and_not_by_their_place(tmp_path):
    stage = Stage("01_words", ("x",), raw=("train",))
    write_notebook(tmp_path / "01_words.ipynb", 'DATA: str = ""')
    states = []
    for folder, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.csv").write_text(text)
        parameters = {"01_words": {"DATA": str(tmp_path / folder)}}
        pipeline = Pipeline(tmp_path / "artifacts", parameters, tmp_path, [stage])
        assert "DATA" not in pipeline.all_parameters("01_words")
        states.append(measure_states(pipeline.inputs(stage))["training file 1"][2])
    assert states[0] == states[1] != states[2]


def test_a_table_in_a_zip_counts_by_the_content_of_the_zip(tmp_path):
    stage = Stage("01_words", ("x",), raw=("train", "test"))
    write_notebook(tmp_path / "01_words.ipynb", 'DATA: str = ""')
    with zipfile.ZipFile(tmp_path / "k.zip", "w") as archive:
        archive.writestr("train.csv", "1")
        archive.writestr("test.csv", "2")
    pipeline = Pipeline(
        tmp_path / "artifacts", {"01_words": {"DATA": str(tmp_path / "k.zip")}}, tmp_path, [stage]
    )
    found = pipeline.inputs(stage)
    assert found["training file 1"] == found["raw test"] == tmp_path / "k.zip"


def test_a_notebook_that_predicts_needs_test_battles(tmp_path):
    stage = Stage("06_predict", ("x",), raw=("test",))
    write_notebook(tmp_path / "06_predict.ipynb", 'DATA: str = ""')
    (tmp_path / "train.csv").touch()
    parameters = {"06_predict": {"DATA": str(tmp_path / "train.csv")}}
    pipeline = Pipeline(tmp_path / "artifacts", parameters, tmp_path, [stage])
    assert pipeline.lacks_test(stage)
    shutil.copy(tmp_path / "train.csv", tmp_path / "test.csv")
    assert not pipeline.lacks_test(stage)


def test_notebooks_read_only_from_earlier_ones():
    for i, stage in enumerate(STAGES):
        assert {*stage.reads, *stage.may_read} <= set(NAMES[:i]), stage.name
