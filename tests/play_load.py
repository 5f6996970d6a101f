"""Ask a playground from several clients at once: right answers, no leak, bounded memory.

The thousand requests of the documentation: `python -m tests.play_load --requests 1000`.
"""

import argparse
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from src.utils import paths
from src.utils.delivery.playground import MAX_CHARS, MAX_TURNS, make_battle
from src.utils.delivery.predictor import Predictor
from src.utils.schema import LABELS

WORDS = (
    "the cat <b>sat</b> on - a\n mat; 東京 \U0001f600 \ud83d **now** ``` I'm sorry & ${x}".split(
        " "
    )
)


def draw_texts(rng, mark):
    """Three texts of a few turns, each with a mark; a twentieth are too long to be taken."""
    n_turns = rng.randint(1, MAX_TURNS)
    is_long = rng.random() < 0.05
    # Of all sizes up to the limit, as many of each order of magnitude.
    n_chars = MAX_CHARS if is_long else int(10 ** rng.uniform(0, 5.2) / 3 / n_turns)
    texts = []
    for _ in range(3):
        turns = []
        for _ in range(n_turns):
            words = rng.choices(WORDS, k=200)
            filler = " ".join(words)
            turns.append(f"{mark} {(filler * (n_chars // len(filler) + 1))[:n_chars]}")
        texts.append(turns)
    return texts, is_long


def post(url, content):
    request = urllib.request.Request(
        url, json.dumps(content).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def read_events(url):
    """The messages of a stream of events, until it ends."""
    with urllib.request.urlopen(url, timeout=120) as stream:
        for line in stream.read().decode().splitlines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def ask_probs(url, texts):
    """Probabilities by the page's API; None where it refuses."""
    call = f"{url}gradio_api/call/battle"
    event = post(call, {"data": texts})["event_id"]
    last = list(read_events(f"{call}/{event}"))[-1]
    return [last[0][name] for name in LABELS] if isinstance(last, list) else None


def find_exchange(url):
    """The number of the event behind the button that exchanges A and B."""
    with urllib.request.urlopen(f"{url}config", timeout=60) as answer:
        config = json.loads(answer.read())
    (button,) = [
        each["id"] for each in config["components"] if each["props"].get("elem_id") == "exchange"
    ]
    targets = [
        each["id"] for each in config["dependencies"] if [button, "click"] in each["targets"]
    ]
    return targets[0]


def ask_exchange(url, number, texts):
    """What the page's boxes hold after A and B were exchanged in its first turn."""
    session = uuid.uuid4().hex
    boxes = [turns[0] for turns in texts] + [""] * (3 * MAX_TURNS - 3)
    content = {"data": [None, None, *boxes], "fn_index": number, "session_hash": session}
    post(f"{url}gradio_api/queue/join", content)
    for message in read_events(f"{url}gradio_api/queue/data?session_hash={session}"):
        if message["msg"] == "process_completed":
            return message["output"]["data"][-3 * MAX_TURNS :]
    return None


@contextlib.contextmanager
def serve(model):
    """Serve a model in a process of its own; yields its address and process."""
    command = [sys.executable, "-m", "src.utils.delivery.playground", "--model", str(model)]
    with (
        tempfile.NamedTemporaryFile("w") as printed,  # a pipe that nobody reads would fill up
        subprocess.Popen(command, cwd=paths.ROOT, stdout=printed, stderr=printed) as process,
    ):
        found = None
        try:
            while not found and process.poll() is None:
                time.sleep(0.1)
                found = re.search(r"^Open (http\S+)", Path(printed.name).read_text(), re.MULTILINE)
            yield found[1], psutil.Process(process.pid)
        finally:
            process.terminate()


def check_one(url, number, predictor, rng, lock):
    """Send one request of each kind; returns what was wrong, "" if nothing was."""
    mark = uuid.uuid4().hex
    texts, is_long = draw_texts(rng, mark)
    found = ask_probs(url, texts)
    if is_long:
        return "" if found is None else "a battle that is too long was predicted"
    with lock:
        expected = predictor.predict(make_battle(texts)).probs[0]
    if found is None or not np.allclose(found, expected, rtol=0, atol=1e-9):
        return f"expected {expected}, got {found}"
    boxes = ask_exchange(url, number, texts)
    expected = [turns[0].replace("\ud83d", "\ufffd") for turns in (texts[0], texts[2], texts[1])]
    return "" if boxes[:3] == expected and not any(boxes[3:]) else "the boxes hold another text"


def run(model, n_requests, n_clients, seed=0):
    """Run the test: the mistakes, seconds, and the server's MiB after a tenth and at the end."""
    predictor = Predictor(model)
    with contextlib.suppress(RuntimeError):
        predictor.load_networks()
    mistakes, done, lock, memory = [], [], threading.Lock(), []
    with serve(model) as (url, process):
        number = find_exchange(url)
        while ask_probs(url, [["x"], ["y"], ["z"]]) is None:
            time.sleep(0.5)
        await_networks(url, predictor)
        start = time.monotonic()

        def work(client):
            rng = random.Random(1000 * seed + client)
            for _ in range(client, n_requests, n_clients):
                try:
                    mistake = check_one(url, number, predictor, rng, lock)
                except (OSError, urllib.error.URLError, ValueError) as error:
                    mistake = f"{type(error).__name__}: {error}"
                mistakes.extend([mistake] if mistake else [])
                done.append(client)
                if len(done) in (n_requests // 10, n_requests // 2):
                    memory.append(process.memory_info().rss / 2**20)

        with ThreadPoolExecutor(n_clients) as pool:
            list(pool.map(work, range(n_clients)))
        memory.append(process.memory_info().rss / 2**20)
        return mistakes, time.monotonic() - start, [round(mib) for mib in memory]


def await_networks(url, predictor):
    """Wait until the server's networks are loaded: it then says what this process says."""
    texts = [["What is it?"], ["This."], ["Not this, but that."]]
    expected = predictor.predict(make_battle(texts)).probs[0]
    until = time.monotonic() + 120
    while not np.allclose(ask_probs(url, texts), expected, rtol=0, atol=1e-9):
        if time.monotonic() > until:
            raise RuntimeError("the server's networks are not loaded after two minutes")
        time.sleep(0.5)


def main():
    """Print what was found; ends with 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description="Ask a playground from several clients at once.")
    parser.add_argument("--model", type=Path, default=paths.artifacts_dir())
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    given = parser.parse_args()
    mistakes, seconds, memory = run(given.model, given.requests, given.clients)
    print(f"{given.requests} battles, {given.clients} clients, {seconds:.0f} s; MiB {memory}")
    print(f"{len(mistakes)} mistakes", *mistakes[:5], sep="\n")
    return bool(mistakes)


if __name__ == "__main__":
    sys.exit(main())
