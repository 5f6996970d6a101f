"""Check a submission as the competition would.

python .ci/check_submission.py submission.csv DATA_FOLDER
"""

import sys
from pathlib import Path

import pandas as pd

from src.utils.delivery.submit import check_submission
from src.utils.paths import find_table

written, folder = map(Path, sys.argv[1:])
expected = find_table(folder, "sample_submission") or find_table(folder, "test")
assert expected, f"{folder}: expected sample_submission or test, found neither"
read = pd.read_parquet if expected.suffix == ".parquet" else pd.read_csv
submission = check_submission(pd.read_csv(written), read(expected)["id"].to_numpy())
print(f"{written}: {len(submission)} rows, valid against {expected.name}")
