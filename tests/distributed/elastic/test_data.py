"""ElasticDistributedSampler: torch's orders (values noted from PyTorch 2.13), and refusals."""

from __future__ import annotations

import pytest

from dtrain.distributed.elastic.utils.data import ElasticDistributedSampler


@pytest.mark.parametrize(
    ("length", "replicas", "rank", "start", "order"),
    [
        (11, 3, 0, 2, [6, 8, 5]),
        (11, 3, 2, 2, [7, 4, 9]),
        (7, 2, 1, 0, [3, 6, 2, 5]),
        (5, 4, 3, 4, [4]),  # PyTorch fails: fewer indices than ranks
    ],
)
def test_orders(length, replicas, rank, start, order):
    sampler = ElasticDistributedSampler(range(length), replicas, rank, start)
    sampler.set_epoch(3)
    assert list(sampler) == order
    assert len(sampler) == len(order)


def test_what_it_refuses():
    with pytest.raises(TypeError, match=r"must be an instance of collections\.abc\.Sized"):
        ElasticDistributedSampler(iter([1]), 1, 0)
    with pytest.raises(ValueError, match="Start index 3 should be less than dataset size 3"):
        ElasticDistributedSampler(range(3), 1, 0, 3)
    state = ElasticDistributedSampler(range(9), 1, 0, 2).state_dict()
    with pytest.raises(ValueError, match="a sampler with length=7, this one has length=8"):
        ElasticDistributedSampler(range(9), 1, 0, 1).load_state_dict(state)
