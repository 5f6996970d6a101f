import numpy as np
import pytest
import torch
from torch import nn

from src.utils.training import processes


def be(monkeypatch, rank, world):
    monkeypatch.setattr(processes, "rank", lambda: rank)
    monkeypatch.setattr(processes, "world_size", lambda: world)


@pytest.mark.parametrize("n_batches", [1, 7, 8, 13])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_step_has_the_rows_that_it_has_in_one_process(n_batches, world, monkeypatch):
    plan = [[10 * batch, 10 * batch + 1] for batch in range(n_batches)]
    dealt = []
    for rank in range(world):
        be(monkeypatch, rank, world)
        per_step = processes.raise_to_world(4)
        dealt.append(processes.deal(plan, per_step))
    assert len({len(batches) for batches in dealt}) == 1
    n_each = per_step // world
    for step in range(-(-n_batches // per_step)):
        together = [
            batch
            for batches in dealt
            for batch in batches[step * n_each : (step + 1) * n_each]
            if batch
        ]
        assert sorted(together) == plan[step * per_step : (step + 1) * per_step]


@pytest.mark.parametrize(
    ("asked", "world", "expected"), [(5, 4, 8), (4, 2, 4), (1, 8, 8), (3, 1, 3)]
)
def test_a_step_has_at_least_the_batches_asked_for(asked, world, expected, monkeypatch):
    be(monkeypatch, 0, world)
    assert processes.raise_to_world(asked) == expected


def test_a_team_reads_every_batch_once_and_in_equally_many_passes(monkeypatch):
    batches = [[np.full(2, key)] for key in range(5)]
    n_passes = []
    for rank in range(2):
        be(monkeypatch, rank, 2)
        passes = []

        def read(rows, passes=passes):
            passes.append(rows[0][0])
            return rows[0][:1].astype(float)

        def gather(into, mine):
            waiting = list(team._waiting)  # noqa: B023 called within this turn of the loop
            into[:] = [waiting[place % len(waiting)][1][0][:1].astype(float) for place in range(2)]

        monkeypatch.setattr(processes.dist, "all_gather_object", gather)
        team = processes.TeamReader(read)
        got, sent = {}, 0
        while len(got) < len(batches):
            while sent < len(batches) and sent - len(got) < team.capacity:
                team.send(sent, batches[sent])
                sent += 1
            key, probs = team.receive(float("inf"))
            got[key] = probs[0]
        assert got == {key: key for key in range(5)}
        n_passes.append(len(passes))
    assert n_passes == [3, 3]


def test_one_process_alone_is_a_world_of_one(tmp_path):
    assert (processes.world_size(), processes.rank()) == (1, 0)
    assert processes.on_first(lambda value: value + 1)(1) == 2
    assert processes.sum_over_ranks(torch.ones(2)).tolist() == [1, 1]
    assert processes.whole_weights(nn.Linear(2, 2)) is None


def test_a_process_that_nothing_launched_does_not_train_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError, match="expected to be started by torchrun"):
        processes.join_world()


def test_weights_are_not_parted_over_one_process():
    with pytest.raises(RuntimeError, match="expected two processes or more"):
        processes.shard(nn.Linear(2, 2))


def test_whole_weights_are_not_taken_for_parted_ones():
    with pytest.raises(RuntimeError, match=r"plain \['Linear'\], whole \['weight', 'bias'\]"):
        processes.check_sharded(nn.Linear(2, 2))


def test_a_model_that_shares_no_gradients_is_refused(monkeypatch):
    be(monkeypatch, 0, 2)
    with pytest.raises(RuntimeError, match="expected the Trainer to see 2 processes, got 1"):
        processes._check_world(1, nn.Linear(2, 2))
    with pytest.raises(
        RuntimeError, match="expected DistributedDataParallel over 2 processes, got a plain Linear"
    ):
        processes._check_world(2, nn.Linear(2, 2))
