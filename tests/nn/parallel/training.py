"""A few steps of training under DDP, for the tests that compare it with one process."""

from __future__ import annotations

import dtrain as torch
import dtrain.distributed as dist


def descend(model, loss_of, steps):
    """Take SGD steps with momentum on `loss_of()`; the losses, each the mean over ranks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total, dist.ReduceOp.AVG)
        losses.append(total.item())
    return losses
