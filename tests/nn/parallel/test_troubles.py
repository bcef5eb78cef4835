"""What people trip over with DDP elsewhere, where no other test shows it; docs/ddp.md lists all."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.nn.parallel import DistributedDataParallel as DDP
from dtrain.testing.distributed import run_distributed

nn = torch.nn


class Branches(nn.Module):
    """Two layers of which a pass uses one, or both, or one twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, path):
        for name in path:
            x = torch.tanh(getattr(self, name)(x))
        return x


def passes(options):
    """Gradients of passes that use now this and now that, on each rank something else."""
    torch.manual_seed(0)
    model = DDP(Branches(), bucket_cap_mb=1e-6, **options)
    found = []
    for paths in (("ab", "ab"), ("a", "b"), ("bb", "a"), ("a", "a")):
        model.zero_grad()
        model(torch.ones(2, 4), paths[dist.get_rank()]).sum().backward()
        found += [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
    return found


@pytest.mark.parametrize("flag", ["find_unused_parameters", "static_graph"])
def test_flags_for_unused_parameters_change_nothing(flag):
    plain, with_flag = (run_distributed(2, passes, {flag: value}) for value in (False, True))
    assert plain == with_flag
    assert plain[0] == plain[1]
    assert plain[0][-2:] == [None, None]  # nobody used b in the last pass


def check_several_forwards():
    """Two forwards, of which the second uses other layers, then one backward over both."""
    torch.manual_seed(0)
    model, x = DDP(Branches(), bucket_cap_mb=1e-6), torch.ones(2, 4) * (dist.get_rank() + 1)
    for _ in range(3):
        model.zero_grad()
        (model(x, "a").sum() + model(x, "aab").sum()).backward()
    both = [p.grad.numpy().copy() for p in model.parameters()]
    model.zero_grad()
    model(x, "a").sum().backward()
    model(x, "aab").sum().backward()
    for p, total in zip(model.parameters(), both, strict=True):
        np.testing.assert_allclose(p.grad.numpy(), total, rtol=1e-5)


def test_several_forwards_before_one_backward():
    run_distributed(2, check_several_forwards)


def check_accumulation():
    """The peak of passes that accumulate is below one more set of gradients."""
    model = DDP(nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)]))
    x = torch.ones(2, 256)
    for _ in range(2):
        model(x).sum().backward()
    size = sum(p.grad.numpy().nbytes for p in model.parameters())
    views = [id(view) for bucket in model.reducer.buckets for view in bucket.views]
    tracemalloc.start()
    try:
        with model.no_sync():
            for _ in range(4):
                model(x).sum().backward()
        grown, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(id(p.grad) in views for p in model.parameters())
    assert grown < size / 10, (grown, size)
    assert peak < size / 2, (peak, size)  # a weight's gradient or two on its way, not eight


def test_accumulating_gradients_needs_no_more_memory():
    run_distributed(1, check_accumulation)


def check_clipping():
    """The norm is that of the mean gradients, and the same on every rank."""
    torch.manual_seed(0)
    model = DDP(nn.Linear(3, 2), bucket_cap_mb=1e-6)
    rows = torch.tensor([[1.0, 2.0, 3.0], [30.0, -20.0, 10.0]])
    model(rows[dist.get_rank()]).sum().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    mean = rows.numpy().mean(axis=0)
    expected = np.sqrt(2 * (mean**2).sum() + 2)
    assert np.isclose(norm, expected)
    clipped = np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])
    np.testing.assert_allclose(clipped, [*mean, *mean, 1, 1] / expected, rtol=1e-4)


def test_clipping_is_by_the_norm_of_the_mean():
    run_distributed(2, check_clipping)


def gives(value):
    """A communication hook whose future has this value."""

    def hook(state, bucket):
        future = torch.futures.Future()
        future.set_result(value)
        return future

    return hook


def check_wrong_input():
    with pytest.raises(TypeError, match=r"wraps an nn\.Module, got function"):
        DDP(lambda x: x)
    for every in (-1, 1.5, None):
        with pytest.raises(ValueError, match="is a number of passes, or 0, got"):
            DDP(nn.Linear(2, 2), divergence_check_every=every)
    for wrong in (("mine", nn.Parameter(torch.ones(1))), "mine"):
        with pytest.raises(ValueError, match="of the model that is wrapped, and 'mine' is none"):
            DDP(nn.Linear(2, 2), delay_all_reduce_named_params=[wrong])
    model = DDP(nn.Linear(2, 2))
    model._set_static_graph()
    for weight in (float("inf"), float("nan"), -1):
        with pytest.raises(ValueError, match="finite and not negative, got"):
            model.set_loss_weight(weight)
    for value, shown in ((torch.ones(3), r"\[3\]"), ("text", "str"), ([], "list")):
        model = DDP(nn.Linear(2, 2))
        model.register_comm_hook(None, gives(value))
        with pytest.raises(ValueError, match=f"hook hook gave {shown} for bucket 0, expected a T"):
            model(torch.ones(1, 2)).sum().backward()


def test_wrong_input_is_refused():
    run_distributed(1, check_wrong_input)
