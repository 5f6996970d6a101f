"""Claims about states on disk: read once, added to, and whole after a kill or damage."""

import dataclasses
import multiprocessing
import signal
import time

import numpy as np
import pandas as pd
import pytest

from src.utils.config import FinetuneConfig
from src.utils.models.reading import StateReader
from src.utils.schema import swap_pairs
from src.utils.training import states as module
from src.utils.training.states import make_keys, read_states

CONFIG = FinetuneConfig(
    checkpoint="tiny:modernbert",
    revision="",
    train="head",
    max_tokens=96,
    predict_tokens=96,
    tokens_per_batch=512,
)


@pytest.fixture
def run(tmp_path, tiny_base):
    def run(pairs, **changes):
        config = dataclasses.replace(CONFIG, **changes)
        return read_states(pairs, config, tmp_path, tiny_base("modernbert"))

    return run


def take(states, pairs):
    rows = states.find(make_keys(pairs))
    assert (rows >= 0).all()
    return states.take(rows.ravel()).reshape(*rows.shape, -1)


def test_each_battle_is_read_once_in_each_order_and_never_again(run, read_batches, demo_pairs):
    first = take(run(demo_pairs[:40]), demo_pairs[:40])
    assert sum(read_batches) == 80 and not np.allclose(first[:, 0], first[:, 1])
    read_batches.clear()
    np.testing.assert_array_equal(take(run(demo_pairs[:40]), demo_pairs[:40]), first)
    exchanged = take(run(swap_pairs(demo_pairs[:40])), swap_pairs(demo_pairs[:40]))
    np.testing.assert_array_equal(exchanged, first[:, ::-1])
    assert read_batches == []


def test_more_battles_add_to_what_is_there(run, read_batches, demo_pairs):
    first = take(run(demo_pairs[:20]), demo_pairs[:20])
    read_batches.clear()
    # Others between them, in another order, with other ids, votes and folds.
    more = pd.concat([demo_pairs[20:30], demo_pairs[:20][::-1]]).assign(id="x", label=0, fold=1)
    np.testing.assert_array_equal(take(run(more), more)[10:][::-1], first)
    assert sum(read_batches) == 20


def test_other_settings_do_not_mix_and_come_back(run, read_batches, demo_pairs):
    few = demo_pairs[:10]
    first = take(run(few), few)
    for changes in ({"predict_tokens": 64}, {"state_layers": (1.0,)}):
        read_batches.clear()
        assert not np.array_equal(take(run(few, **changes), few), first)
        assert sum(read_batches) == 20
    read_batches.clear()
    np.testing.assert_array_equal(take(run(few), few), first)
    assert read_batches == []


@pytest.mark.parametrize("harm", ["cut", "changed", "empty"])
def test_a_damaged_part_is_named_and_read_again(run, read_batches, demo_pairs, monkeypatch, harm):
    monkeypatch.setattr(module, "_PART_MIB", 0)  # a part for each batch
    first = take(run(demo_pairs[:20]), demo_pairs[:20])
    states = run(demo_pairs[:20])
    assert len(states.parts) > 2
    path = sorted(states.folder.glob("part-*"))[1]
    content = path.read_bytes()
    damaged = {"cut": content[:-100], "changed": content[:-1] + b"?", "empty": b""}
    path.write_bytes(damaged[harm])
    read_batches.clear()
    with pytest.warns(UserWarning, match=f"{path.name} is damaged"):
        again = run(demo_pairs[:20])
    assert 0 < sum(read_batches) < 40
    # A battle may have other neighbours now, which moves what is rounded.
    np.testing.assert_allclose(take(again, demo_pairs[:20]), first, atol=2e-3)


def test_states_that_are_not_finite_are_refused_if_many_and_read_again(
    run, read_batches, demo_pairs, monkeypatch
):
    def lose(self, values):
        return np.full(values.shape, np.nan, dtype=np.float16)

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="20 of 20"):
        patch.setattr(StateReader, "_finish", lose)
        run(demo_pairs[:10])
    take(run(demo_pairs[:10]), demo_pairs[:10])


def read_slowly(pairs, run_dir, base, counts):
    """Read in a process of its own, a part for each batch; says after each that it was read."""
    module._PART_MIB, read = 0, StateReader.read

    def count(self, rows):
        values = read(self, rows)
        with open(counts, "a") as file:
            file.write(f"{len(rows)} ")
        return values

    StateReader.read = count
    read_states(pairs, CONFIG, run_dir, base)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_killed_at_any_moment_goes_on_where_it_was(run, demo_pairs, tiny_base, tmp_path):
    pairs, counts = demo_pairs[:150], tmp_path / "counts"
    fresh = take(read_states(pairs, CONFIG, tmp_path / "fresh", tiny_base("modernbert")), pairs)
    rng, exit_codes = np.random.default_rng(0), []
    counts.touch()
    # Torch is loaded before the fork, so that a kill meets the reading and not the imports; the
    # server has no threads, whose locks a fork would keep for ever.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_states"])
    while len(exit_codes) < 20 and 0 not in exit_codes:
        arguments = (pairs, tmp_path, tiny_base("modernbert"), counts)
        process = context.Process(target=read_slowly, args=arguments)
        process.start()
        wanted = len(counts.read_text().split()) + rng.integers(1, 12)
        while process.is_alive() and len(counts.read_text().split()) < wanted:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        exit_codes.append(process.exitcode)
    n_kills = exit_codes.count(-signal.SIGKILL)
    assert n_kills > 3 and exit_codes[-1] == 0
    sizes = [*map(int, counts.read_text().split())]
    # What a kill costs is the batch that was under way.
    assert 300 <= sum(sizes) <= 300 + n_kills * max(sizes)
    states = run(pairs)
    assert not [*states.folder.glob(".part-*")]
    np.testing.assert_allclose(take(states, pairs), fresh, atol=2e-3)
