"""README's scores are those of the committed results."""

import importlib.util

from src.utils.paths import ROOT

SPEC = importlib.util.spec_from_file_location(
    "record", ROOT / "benchmarks" / "results" / "record.py"
)
record = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(record)


def test_the_result_table_of_readme_is_made_from_the_committed_files():
    readme = (ROOT / "README.md").read_text()
    shown = readme.split(record.START)[1].split(record.END)[0].strip()
    assert shown == record.format_results()
