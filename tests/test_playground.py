"""Claims about the page: its numbers, its limits, hostile text, and many visitors at once."""

import gzip
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("gradio", reason="the playground's packages are not installed: make play")

from src.utils.battles.readers import load_pairs
from src.utils.delivery import playground
from src.utils.delivery.playground import make_battle, score_file, show_prediction
from src.utils.delivery.predictor import Predictor
from src.utils.schema import LABELS, TEXTS
from tests import play_load

HOSTILE = "</div><script>alert(1)</script>\ud83d & <img src=x onerror=alert(1)> ${alert(1)}"


@pytest.fixture(scope="module")
def predictor(small_artifacts):
    loaded = Predictor(small_artifacts)
    loaded.load_networks(ask_all=True)
    return loaded


# ---- what is shown -----------------------------------------------------------


def test_a_battle_shows_the_probabilities_of_the_blend_and_of_each_model(predictor):
    pairs = make_battle([["Hello?"], ["Yes, hello to you, too."], ["No."]])
    page = show_prediction(predictor, pairs)
    answer = predictor.predict(pairs)
    shown = re.findall(r"<b>([\d.]+)%</b>", page)
    assert shown == [f"{100 * share:.1f}" for share in answer.probs[0]]
    for probs in answer.members.values():
        assert f"{probs[0, 0]:.1%}" in page
    assert "tiny decoder (stand-in)" in page and "0.0 points" in page


def test_style_terms_point_towards_their_answer(predictor):
    pairs = make_battle([["Hello?"], ["Yes, hello. " * 30], ["I'm sorry, I cannot."]])
    terms = predictor.baseline.style_terms(pairs).iloc[0]
    top = terms.abs().sort_values().index[-1]
    assert f"{abs(terms[top]):.2f}" in show_prediction(predictor, pairs)


def test_no_hostile_text_becomes_markup(predictor, tmp_path):
    rows = [
        {"id": HOSTILE.replace("\ud83d", ""), "prompt": 3, "response_a": "x", "response_b": "y"}
    ]
    path = tmp_path / "hostile.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pages = [score_file(predictor, path)[1], playground._show_mistake(ValueError(HOSTILE))]
    for page in pages:
        assert "&lt;script" in page
        assert "<script" not in page and "<img" not in page
        page.encode("utf-8")


def test_before_its_networks_are_loaded_the_page_says_so(small_artifacts):
    fresh = Predictor(small_artifacts)
    assert "Still loading: 03_modernbert, 04_qwen" in playground._show_status(fresh)
    page = show_prediction(fresh, make_battle([["a"], ["b"], ["c"]]))
    assert "still loading" in page and "tiny" not in page


# ---- limits ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([["a"], ["b"], ["c" * playground.MAX_CHARS]], "200,000"),
        ([["a"] * 5, ["b"], ["c"]], "prompt.*1 to 4 turns, got 5"),
        ([["a"], [], ["c"]], "response_a.*turns"),
        ([["a"], "b", ["c"]], "response_a.*list"),
        ([["a"], [1], ["c"]], "response_a.*list"),
    ],
)
def test_a_battle_beyond_the_limits_is_refused(texts, expected):
    with pytest.raises(ValueError, match=expected):
        make_battle(texts)


def test_a_file_beyond_the_limits_is_refused(predictor, battles, tmp_path, monkeypatch):
    monkeypatch.setattr(playground, "MAX_ROWS", 29)
    with pytest.raises(ValueError, match="29 battles"):
        score_file(predictor, battles)
    monkeypatch.setattr(playground, "MAX_ROWS", 30)
    monkeypatch.setattr(playground, "MAX_CHARS", 10)
    with pytest.raises(ValueError, match="10 characters"):
        score_file(predictor, battles)
    monkeypatch.setattr(playground, "MAX_UNPACKED_MB", 1)
    table = pd.DataFrame({"id": "1"} | dict.fromkeys(TEXTS, "x" * 10**6), index=[0])
    with gzip.open(tmp_path / "bomb.csv.gz", "wt") as file:
        table.to_csv(file, index=False)
    table.to_parquet(tmp_path / "bomb.parquet")
    for name in ("bomb.csv.gz", "bomb.parquet"):
        with pytest.raises(ValueError, match=f"{name}.*1 MB unpacked"):
            score_file(predictor, tmp_path / name)
    monkeypatch.setattr(playground, "MAX_FILE_MB", 0.001)
    with pytest.raises(ValueError, match=r"0\.001 MB"):
        score_file(predictor, battles)
    for name in ("a.zip", "a.parquet"):
        shutil.copy(battles, tmp_path / name)
        monkeypatch.setattr(playground, "MAX_FILE_MB", 20)
        with pytest.raises(ValueError, match=name):
            score_file(predictor, tmp_path / name)


def test_a_file_gives_what_the_model_gives(predictor, battles):
    shares = []
    table, page = score_file(predictor, battles, lambda share, desc: shares.append(share))
    expected = predictor.predict(load_pairs(battles, labelled=False)[0]).probs
    assert np.abs(table[list(LABELS)].to_numpy() - expected).max() < 1e-6
    assert shares[-1] == 1.0 and "30 battles" in page


# ---- served ------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(small_artifacts):
    """The address of a page in a process of its own."""
    with play_load.serve(small_artifacts / "02_baseline") as (url, _):
        yield url


def test_it_listens_on_this_machine_only_and_asks_no_other(page):
    assert page.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(page) as answer:
        policy = answer.headers["content-security-policy"]
        text = answer.read().decode()
    assert policy.startswith("default-src 'self'") and "http" not in policy
    assert "fonts.googleapis" not in text
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_a_request_that_is_too_long_is_refused_unread(page):
    url = f"{page}gradio_api/call/battle"
    body = json.dumps({"data": [["x" * 5_000_000], ["a"], ["b"]]}).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)) as refused:
        urllib.request.urlopen(request)
    if isinstance(refused.value, urllib.error.HTTPError):
        assert refused.value.code == 413
        refused.value.close()  # else its socket is found open in a later test


def test_the_api_and_the_boxes_give_text_back_as_text(page, small_artifacts):
    texts = [[HOSTILE], ["a" * 100_000], [HOSTILE]]
    expected = Predictor(small_artifacts / "02_baseline").predict(make_battle(texts)).probs[0]
    assert np.allclose(play_load.ask_probs(page, texts), expected, rtol=0, atol=1e-12)
    number = play_load.find_exchange(page)
    boxes = play_load.ask_exchange(page, number, texts)
    assert boxes[:2] == [HOSTILE.replace("\ud83d", "\ufffd")] * 2 and boxes[2] == texts[1][0]


def test_battles_are_drawn_with_their_votes(small_artifacts, predictor):
    drawer = playground._Drawer(predictor)
    assert drawer.has_battles
    texts, note = drawer.draw()
    assert len(texts) == 3 and re.search("People voted.*(A wins|B wins|tie)", note)
    assert "has learned from this battle" in note


def test_what_is_no_model_ends_with_a_message(tmp_path, capsys):
    assert playground.main(["--model", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.slow
def test_eight_clients_get_right_answers_and_nobody_elses_text(small_artifacts):
    mistakes, _, memory = play_load.run(small_artifacts, n_requests=50, n_clients=8)
    assert mistakes == []
    assert memory[-1] - memory[0] < 300, memory


@pytest.mark.slow
def test_the_page_is_ready_within_seconds_of_processor_time(small_artifacts):
    """Five on an idle machine; a busy one is measured by its processor time."""
    with play_load.serve(small_artifacts / "02_baseline") as (url, process):
        spent = process.cpu_times()
        with urllib.request.urlopen(url, timeout=60) as answer:
            answer.read()
    assert spent.user + spent.system < 5


# ---- a real browser ----------------------------------------------------------


def find_browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = [os.environ.get("ARENA_BROWSER"), *map(shutil.which, names)]
    return next(filter(None, found), None)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        path = find_browser() or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium here: install one, or name it in ARENA_BROWSER")
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


def read_bars(tab, place="#result"):
    """The three percentages, once they are there."""
    tab.locator(f"{place} .bar").nth(2).wait_for()
    shown = tab.locator(f"{place} .bar b").all_inner_texts()[:3]  # style terms follow
    return [float(text.rstrip("%")) for text in shown]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1100, 400])
def test_a_visitor_types_presses_exchanges_and_uploads(
    browser, page, battles, small_artifacts, tmp_path, width
):
    asked, dialogs = [], []
    tab = browser.new_page(viewport={"width": width, "height": 1000})
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    tab.goto(page)
    texts = {
        "Prompt": HOSTILE[:-8].replace("\ud83d", ""),
        "Answer A": "yes, " * 50,
        "Answer B": "No.",
    }
    for label, text in texts.items():
        tab.get_by_label(label, exact=True).fill(text)
    tab.click("#predict")
    first = read_bars(tab)
    model = Predictor(small_artifacts / "02_baseline")
    expected = model.predict(make_battle([[text] for text in texts.values()])).probs[0]
    assert np.abs(np.array(first) / 100 - expected).max() < 0.0006
    tab.click("#exchange")
    tab.wait_for_function(
        "text => document.querySelector('#result .bar b').innerText != text", arg=f"{first[0]:.1f}%"
    )
    assert read_bars(tab) == [first[1], first[0], first[2]]
    assert tab.get_by_label("Answer B", exact=True).input_value() == texts["Answer A"]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.click("#more")
    tab.get_by_label("Prompt 2").wait_for()
    tab.get_by_role("tab", name="A file of battles").click()
    tab.locator("#upload input[type=file]").set_input_files(str(battles))
    tab.locator("#upload").get_by_text("battles").first.wait_for()
    tab.click("#score")
    read_bars(tab, "#file-result")
    with tab.expect_download() as download:
        tab.locator("#probs a").first.click()
    download.value.save_as(tmp_path / "probs.csv")
    found = pd.read_csv(tmp_path / "probs.csv")[list(LABELS)].to_numpy()
    pairs = load_pairs(battles, labelled=False)[0]
    assert np.abs(found - model.predict(pairs).probs).max() < 1e-6
    assert dialogs == [] and all(url.startswith((page, "data:", "blob:")) for url in asked)
    tab.close()
