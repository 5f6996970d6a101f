import numpy as np
import pytest
import torch
from torch import multiprocessing, nn

from src.utils.training import processes


def work(number, rendezvous, results):
    """What one of two processes does with every function."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=number, world_size=2
    )
    layer = nn.Linear(2, 1)
    nn.init.constant_(layer.weight, number)
    processes.copy_from_first(layer.parameters())
    if number == 1:  # the first process has no batch in this step
        layer(torch.tensor([[1.0, 2.0]])).sum().backward()
    sums = torch.tensor([number + 1.0, 5.0])
    processes.sum_gradients(layer.parameters(), sums)
    results[number] = {
        "world": (processes.rank(), processes.world_size()),
        "weight": layer.weight.tolist(),
        "gradient": layer.weight.grad.tolist(),
        "sums": sums.tolist(),
        "rows": processes.gather_rows(np.arange(10).reshape(5, 2)[number::2]).tolist(),
        "first": processes.on_first(processes.rank)(),
    }
    processes.leave_world()


@pytest.mark.slow
def test_two_processes_share_weights_gradients_rows_and_what_the_first_one_does(tmp_path):
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        arguments = (tmp_path / "rendezvous", results)
        multiprocessing.spawn(work, arguments, nprocs=2)  # raises unless both exit with 0
        results = dict(results)
    for number in (0, 1):
        assert results[number].pop("world") == (number, 2)
    assert results[0] == results[1]
    assert results[0] == {
        "weight": [[0, 0]],
        "gradient": [[1, 2]],
        "sums": [3, 10],
        "rows": np.arange(10).reshape(5, 2).tolist(),
        "first": 0,
    }


def test_one_process_is_a_world_of_one():
    assert (processes.world_size(), processes.rank()) == (1, 0)
    assert processes.on_first(lambda value: value + 1)(1) == 2
    assert processes.gather_rows(np.eye(2)).tolist() == [[1, 0], [0, 1]]


def test_a_process_that_torchrun_did_not_start_does_not_train_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match=r"torchrun.*RANK"):
        processes.join_world()
