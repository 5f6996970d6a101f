"""The suite without its notebooks: each writes at once what it promises, and can be killed."""

import functools
import io
from contextlib import redirect_stdout
from pathlib import Path

import nbformat

from src.utils import paths
from src.utils.config import SuiteError
from src.utils.runs import atomic_folder, hash_json, write_text
from src.utils.suite import run as runner
from src.utils.suite.pipeline import NOTEBOOKS, STAGES, Pipeline, measure_states

TRAINED = ("03_modernbert", "04_qwen")


class KilledError(BaseException):
    """Stands for SIGKILL: nothing in the suite catches it."""


def write_stubs(folder):
    """Write notebooks that hold nothing but the parameters cells of the real ones."""
    folder.mkdir()
    for stage in STAGES:
        cells = nbformat.read(NOTEBOOKS / f"{stage.name}.ipynb", as_version=4).cells
        (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        notebook = nbformat.v4.new_notebook(cells=[cell])
        nbformat.write(notebook, folder / f"{stage.name}.ipynb")
    return folder


def read_models(artifacts):
    """Read every file of the finished models of 03 and 04: path -> text."""
    files = [file for name in TRAINED for file in (artifacts / name).glob("model/[!.]*/**/*")]
    return {file: file.read_text() for file in files if file.is_file()}


class FakeSuite:
    """Runs commands of the suite in this process; `ran` has notebook -> parameters of the last."""

    def __init__(self, patch, root, stubs):
        self.ran, self.root, self.steps_left = {}, root, None
        root.mkdir(exist_ok=True)
        patch.chdir(root)
        patch.setattr(paths, "ROOT", root)
        patch.setattr(runner, "_execute", self.execute)
        patch.setattr(runner, "hash_library", lambda: "the same")
        patch.setattr(runner, "count_idle_cores", lambda: 1)
        patch.setattr(runner, "Pipeline", functools.partial(Pipeline, notebooks=stubs))
        patch.setattr(runner.HTMLExporter, "from_filename", lambda *_: ("<html>", {}))
        for name in ("write_text", "write_json"):
            patch.setattr(runner, name, self.count_steps(getattr(runner, name)))
        patch.setattr(runner.shutil, "rmtree", self.count_steps(runner.shutil.rmtree))
        self.write = self.count_steps(write_text)
        self.patch = patch

    def count_steps(self, function):
        """Wrap a function that changes files: the run is killed before one of its calls."""

        def counted(*arguments, **options):
            if self.steps_left == 0:
                raise KilledError
            if self.steps_left:
                self.steps_left -= 1
            return function(*arguments, **options)

        return counted

    def execute(self, pipeline, stage, progress, copy):
        """Write the outputs, of 03 and 04 a model for each combination of settings and data."""
        folder, parameters = pipeline.artifacts / stage.name, pipeline.all_parameters(stage.name)
        self.ran[stage.name] = parameters
        states = measure_states(pipeline.inputs(stage))
        made_from = hash_json([parameters, {name: state[2] for name, state in states.items()}])
        text = f'{{"log_loss": 1.0, "n_pairs": 6, "made_from": "{made_from}"}}'
        self.write(copy, "{}")
        model = folder / "model" / f"fold_{made_from}"
        if stage.name in TRAINED and not (model / "model.safetensors").exists():
            with atomic_folder(model) as tmp:
                self.write(tmp / "model.safetensors", made_from)
                self.write(tmp / "tokenizer.json", made_from)
        for promise in stage.outputs:
            if promise != "model/" or stage.name not in TRAINED:
                self.write(folder / (f"{promise}file" if promise[-1] == "/" else promise), text)

    def run(self, *arguments, kill_after=None):
        """Run a command; return what it printed, its error included, and whether it ended well."""
        self.ran, self.steps_left = {}, kill_after
        printed, ended_well = io.StringIO(), False
        unlink = self.count_steps(Path.unlink)
        # Where files are removed a kill must do no harm; `atomic_path` cleans up after itself.
        clear = runner.clear_outputs

        def clear_slowly(*given):
            with type(self.patch).context() as patch:
                patch.setattr(Path, "unlink", unlink)
                clear(*given)

        try:
            with redirect_stdout(printed), type(self.patch).context() as patch:
                patch.setattr(runner, "clear_outputs", clear_slowly)
                patch.setenv("ARENA_ARTIFACTS", str(self.root / "artifacts"))
                runner.main(list(map(str, arguments)))
                ended_well = True
        except (SuiteError, ValueError, FileNotFoundError) as error:
            printed.write(str(error))
        except KilledError:
            pass
        self.steps_left = None
        return printed.getvalue(), ended_well
