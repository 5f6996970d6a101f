"""Claims about readers: which devices they take, and that states are read as probabilities are."""

import dataclasses
import functools
from contextlib import closing

import numpy as np
import pytest
import torch

from src.utils.config import FinetuneConfig
from src.utils.models import reading
from src.utils.models.checkpoints import load_base_tokenizer
from src.utils.models.reading import choose_devices, load_state_reader, open_reader
from src.utils.models.template import encode_pairs

CONFIG = FinetuneConfig(
    checkpoint="tiny:qwen3", revision="", train="head", max_tokens=160, state_layers=(0.5, 1.0)
)


@pytest.fixture(params=["modernbert", "qwen3"])
def config(request):
    return dataclasses.replace(CONFIG, checkpoint=f"tiny:{request.param}")


def read(config, base, rows, **options):
    return load_state_reader(dataclasses.replace(config, **options), base).read(rows)


def test_states_do_not_depend_on_packing_or_on_their_neighbours(config, tiny_base, demo_pairs):
    base = tiny_base(config.checkpoint[5:])
    rows = encode_pairs(demo_pairs[:12], load_base_tokenizer(config, base), 160)
    states = read(config, base, rows)
    assert states.shape == (12, 2 * 3 * 64) and states.dtype == np.float16
    np.testing.assert_allclose(read(config, base, rows, packing=False), states, atol=2e-3)
    np.testing.assert_allclose(read(config, base, rows[:1]), states[:1], atol=2e-3)


def test_states_that_memory_does_not_hold_are_nan_in_their_row_alone(config, tiny_base, demo_pairs):
    base = tiny_base(config.checkpoint[5:])
    rows = encode_pairs(demo_pairs[:6], load_base_tokenizer(config, base), 160)
    longest = max(map(len, rows))
    reader = load_state_reader(config, base)
    compute = reader._compute

    def refuse_the_longest(batch):
        if longest in batch["cu_seq_lens"].diff().tolist():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(batch)

    reader._compute = refuse_the_longest
    is_lost = np.isnan(reader.read(rows)).all(axis=1)
    assert is_lost.tolist() == [len(row) == longest for row in rows]


@pytest.mark.slow
def test_processes_read_the_states_that_this_one_reads(tiny_base, demo_pairs):
    base = tiny_base("qwen3")
    rows = encode_pairs(demo_pairs[:4], load_base_tokenizer(CONFIG, base), 160)
    load = functools.partial(load_state_reader, CONFIG, base)
    with closing(open_reader(load, float("inf"), 2)) as reader:
        for key in range(4):
            reader.send(key, rows[key : key + 1])
        received = dict(reader.receive(float("inf")) for _ in range(4))
    states = np.concatenate([received[key] for key in range(4)])
    np.testing.assert_allclose(states, read(CONFIG, base, rows), atol=2e-3)


def test_a_gpu_that_torch_has_no_kernels_for_falls_back_to_the_cpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (6, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    assert choose_devices(None) == [None]
    assert "6.0" in caplog.text


def test_each_gpu_gets_a_process(monkeypatch):
    monkeypatch.setattr(reading, "choose_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_devices(None) == [0, 1] and choose_devices(3) == [0, 1, 0]
