"""Claims about the command: what it reads, writes and says, and how it ends."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src.utils.battles.readers import load_pairs
from src.utils.battles.style import STYLE_FEATURES
from src.utils.delivery import cli
from src.utils.delivery.predictor import Predictor
from src.utils.paths import ROOT
from src.utils.schema import LABELS, TEXTS, check_probs

COMMAND = [sys.executable, "-m", "src.utils.delivery.cli"]


@pytest.fixture(scope="module")
def baseline(small_artifacts):
    """A model that is loaded in a second."""
    return small_artifacts / "02_baseline"


def run(*arguments, **options):
    return cli.main([*map(str, arguments)], **options)


def start(*arguments, **options):
    """Start the command in a process of its own."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, **(pipes | options))


def expect(baseline, path):
    """What the CPU baseline says; of a blend, whose networks are not loaded here, too."""
    return Predictor(baseline).predict(load_pairs(path, labelled=False, quiet=True)[0]).probs


def test_a_file_gives_a_row_per_battle(baseline, battles, tmp_path, capsys):
    assert run("--model", baseline, battles, "-o", tmp_path / "probs.csv") == 0
    table = pd.read_csv(tmp_path / "probs.csv")
    assert list(table.columns) == ["id", *LABELS]
    assert table["id"].tolist() == pd.read_csv(battles)["id"].tolist()
    assert np.abs(table[list(LABELS)].to_numpy() - expect(baseline, battles)).max() < 1e-12
    printed = capsys.readouterr()
    assert printed.out == "" and "30 battles" in printed.err and "left" in printed.err


def test_the_blend_of_all_gives_what_a_predictor_gives(small_artifacts, battles, tmp_path):
    assert run("--model", small_artifacts, battles, "-o", tmp_path / "probs.csv") == 0
    predictor = Predictor(small_artifacts)
    predictor.load_networks()
    expected = predictor.predict(load_pairs(battles, labelled=False)[0]).probs
    found = pd.read_csv(tmp_path / "probs.csv")[list(LABELS)].to_numpy()
    assert np.abs(found - expected).max() < 1e-9


def write_layouts(folder):
    """The same battle in files of every layout."""
    plain = {"prompt": "Hi there", "response_a": "Hello!", "response_b": "No."}
    talk = {}
    for side in "ab":
        messages = [("user", plain["prompt"]), ("assistant", plain[f"response_{side}"])]
        talk[f"conversation_{side}"] = [{"role": r, "content": c} for r, c in messages]
    chosen = {"prompt": "Hi there", "chosen": "Hello!", "rejected": "No."}
    rows = {
        "competition": plain | {"id": "1"} | dict(zip(LABELS, (1, 0, 0), strict=True)),
        "lists": {name: [text] for name, text in plain.items()} | {"id": "1"},
        "wsdm": plain | {"id": "1", "winner": "model_a"},
        "arena": talk | {"question_id": "1", "winner": "model_b", "tstamp": 1.0},
        "mt_bench": talk | {"question_id": "1", "judge": "me", "turn": 1, "winner": "tie"},
        "no_id": plain,
        "chosen": chosen,
    }
    for name, row in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        pd.DataFrame([row]).to_parquet(folder / f"{name}.parquet")
        yield path
        yield folder / f"{name}.parquet"


def test_every_layout_and_several_files_give_the_same_battle(baseline, tmp_path):
    files = list(write_layouts(tmp_path))
    assert run("--model", baseline, *files, "-o", tmp_path / "out.csv", "--quiet") == 0
    table = pd.read_csv(tmp_path / "out.csv")
    assert table["file"].tolist() == [str(file) for file in files]
    assert (table["id"] == 1).all()
    assert np.ptp(table[list(LABELS)].to_numpy(), axis=0).max() < 1e-12


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".csv.gz"])
def test_chunks_give_what_one_piece_gives(baseline, battles, tmp_path, monkeypatch, suffix):
    table = pd.read_csv(battles)
    path = tmp_path / f"chunked{suffix}"
    if "csv" in suffix:
        table.to_csv(path, index=False)
    elif suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_parquet(path)
    monkeypatch.setattr(cli, "N_ROWS", 7)
    assert run("--model", baseline, path, "-o", tmp_path / "out.csv") == 0
    found = pd.read_csv(tmp_path / "out.csv")
    assert found["id"].tolist() == table["id"].tolist()
    assert np.abs(found[list(LABELS)].to_numpy() - expect(baseline, battles)).max() < 1e-12


def test_explained_rows_have_the_style_terms(baseline, battles, tmp_path):
    assert run("--model", baseline, battles, "-o", tmp_path / "out.jsonl", "--explain") == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 30
    assert [name for name in rows[0] if name.startswith("style_")] == [
        f"style_{name}" for name in STYLE_FEATURES
    ]
    pairs = load_pairs(battles, labelled=False)[0]
    terms = Predictor(baseline).baseline.style_terms(pairs)
    assert rows[3]["style_n_chars"] == pytest.approx(terms["n_chars"].iloc[3], abs=1e-12)


def test_a_pipe_is_answered_line_by_line_while_it_is_open(baseline):
    with start("--model", baseline, "-") as process:
        for number, text in enumerate(("yes", ["one", "two"], "\ud83d <b>")):
            row = {"id": number, "prompt": text, "response_a": text, "response_b": text}
            process.stdin.write(json.dumps(row).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert answer["id"] == number
            check_probs(np.array([[answer[name] for name in LABELS]]))
        process.stdin.close()
        assert process.wait() == 0, process.stderr.read()


def test_how_a_line_is_read_depends_on_no_other_line(baseline, tmp_path):
    lines = [
        {"prompt": '["not", "turns"]', "response_a": "x", "response_b": "y"},
        {"prompt": '["p"]', "response_a": '["x"]', "response_b": '["y"]'},
        {"conversation_a": [{"role": "user", "content": "p"}], "conversation_b": []},
    ]
    texts = [json.dumps(line) + "\n" for line in lines]
    together = pipe(baseline, "".join(texts))
    alone = [pipe(baseline, text)[0] for text in texts]
    assert [each["winner_tie"] for each in together] == [each["winner_tie"] for each in alone]
    assert [each["id"] for each in together] == ["1", "2", "3"]


def pipe(baseline, text):
    ended = subprocess.run(
        [*COMMAND, "--model", baseline, "-"], input=text, capture_output=True, text=True, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_a_bad_line_ends_the_pipe_after_the_answers_before_it(baseline):
    good = json.dumps(dict.fromkeys(TEXTS, "x"))
    ended = subprocess.run(
        [*COMMAND, "--model", baseline, "-"],
        input=f"{good}\n[1]\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ended.returncode == 1 and "line 2" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("id,prompt,response_a\n1,x,y\n", "response_b"),
        ("id,prompt,response_a,response_b\n1,x,y,z\n,x,y,z\n", r"row 2, column id"),
        ("id,prompt,response_a,response_b\n1,x,y,z\n2,x\n", r"row 2"),
        ("", "battles.csv"),
    ],
)
def test_bad_input_is_named_and_leaves_no_output(baseline, tmp_path, capsys, text, expected):
    (tmp_path / "battles.csv").write_text(text)
    output = tmp_path / "out.csv"
    output.write_text("kept")
    assert run("--model", baseline, tmp_path / "battles.csv", "-o", output) == 1
    message = capsys.readouterr().err
    assert re.search(expected, message) and "battles.csv" in message
    assert output.read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["battles.csv", "out.csv"]


def test_missing_files_and_models_are_named(baseline, tmp_path, battles, capsys):
    assert run("--model", baseline, tmp_path / "none.csv") == 1
    assert "none.csv" in capsys.readouterr().err
    assert run("--model", tmp_path / "no_model", battles) == 1
    assert "no_model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["-", "a.csv"], ["a.csv", "-o", "a.csv"], ["--deadline-s", "0", "a.csv"]]
)
def test_wrong_usage_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2 and "usage" in capsys.readouterr().err


def test_style_terms_need_a_baseline(small_artifacts, battles, capsys):
    with pytest.raises(SystemExit) as ended:
        run("--model", small_artifacts / "03_modernbert", battles, "--explain")
    assert ended.value.code == 2 and "baseline" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error(baseline, battles):
    reading, writing = os.pipe()
    os.close(reading)
    with start("--model", baseline, battles, "--quiet", stdout=writing) as process:
        assert process.wait() == 141
        assert process.stderr.read() == b""
    os.close(writing)


def obey_ctrl_c():
    # Of a test run in the background of a shell, every process would ignore it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_with_130_and_leaves_no_file(baseline, tmp_path):
    options = {"preexec_fn": obey_ctrl_c}
    with start("--model", baseline, "-", "-o", tmp_path / "out.jsonl", **options) as process:
        process.stdin.write(json.dumps(dict.fromkeys(TEXTS, "x")).encode() + b"\n")
        process.stdin.flush()
        until = time.monotonic() + 60
        while time.monotonic() < until and not any(
            path.stat().st_size for path in tmp_path.glob(".out*")
        ):
            time.sleep(0.05)
        process.send_signal(2)
        assert process.wait(60) == 130
    assert list(tmp_path.iterdir()) == []


def test_under_a_deadline_quality_is_given_up_but_no_row(
    small_artifacts, battles, tmp_path, capsys
):
    assert (
        run("--model", small_artifacts, battles, "-o", tmp_path / "a.csv", "--deadline-s", 0.01)
        == 0
    )
    found = pd.read_csv(tmp_path / "a.csv")[list(LABELS)].to_numpy()
    assert np.abs(found - expect(small_artifacts, battles)).max() < 1e-9
    assert "given up" in capsys.readouterr().err


def test_a_lone_network_fills_what_it_has_no_time_for(
    small_artifacts, battles, tmp_path, monkeypatch
):
    monkeypatch.setattr(cli, "N_ROWS", 10)
    predict, calls = Predictor.predict, []

    def predict_once(self, pairs, deadline_s, ask_all=False):
        calls.append(deadline_s)
        return predict(self, pairs, deadline_s if len(calls) == 1 else 0.0)

    monkeypatch.setattr(Predictor, "predict", predict_once)
    model = small_artifacts / "03_modernbert"
    output = tmp_path / "a.csv"
    assert run("--model", model, battles, "-o", output, "--deadline-s", 60) == 0
    probs = check_probs(pd.read_csv(output)[list(LABELS)].to_numpy(), 30)
    assert np.allclose(probs[10:], probs[10]) and probs[10, 0] == pytest.approx(probs[10, 1])
    assert 0 < calls[0] < 55 and calls[-1] > 0  # something is left for the last rows


def measure_peak_mib(baseline, path, output):
    # Not ru_maxrss, which begins with what this process, its parent, holds.
    script = (
        "import re, sys; from src.utils.delivery import cli; "
        "assert cli.main(sys.argv[1:]) == 0; "
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024)"
    )
    arguments = ["--model", baseline, path, "-o", output, "--quiet"]
    command = [sys.executable, "-c", script, *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return float(ended.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak in /proc")
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(baseline, tmp_path, suffix):
    peaks = []
    for n_rows in (1_000, 12_000):
        path = tmp_path / f"{n_rows}.{suffix}"
        texts = [f"word {'some more words ' * 150} {row}" for row in range(n_rows)]
        table = pd.DataFrame({"id": range(n_rows)} | dict.fromkeys(TEXTS, texts))
        if suffix == "csv":
            table.to_csv(path, index=False, quoting=csv.QUOTE_ALL)
        elif suffix == "jsonl":
            table.to_json(path, orient="records", lines=True)
        else:
            table.to_parquet(path, row_group_size=1000)
        peaks.append(measure_peak_mib(baseline, path, tmp_path / "out.csv"))
        size_mib = path.stat().st_size / 2**20
        assert len(pd.read_csv(tmp_path / "out.csv")) == n_rows
    assert suffix == "parquet" or size_mib > 80
    assert peaks[1] - peaks[0] < 40, peaks
