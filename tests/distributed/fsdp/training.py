"""Models under `fully_shard`, and a few steps of training: what the tests of this folder share."""

from __future__ import annotations

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.fsdp import fully_shard
from tests.nn.parallel import test_golden as ddp

nn, F = torch.nn, torch.nn.functional

STEPS, BATCH = ddp.STEPS, ddp.BATCH  # samples in equal shares for 1, 2, 3 and 4 ranks


class Tied(nn.Module):
    """One weight as embedding and as output, a layer that is never used, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Embedding(11, 8)
        self.middle = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.outside = nn.Linear(8, 11, bias=False)
        self.outside.weight = self.inside.weight

    def forward(self, tokens, targets):
        hidden = self.frozen(torch.relu(self.middle(self.inside(tokens))))
        return F.cross_entropy(self.outside(hidden), targets)


def tokens(step):
    numbers = torch.arange(BATCH) * 7 + step * 5
    return numbers % 11, (numbers + 3) % 11


MODELS = {**ddp.MODELS, "tied": (Tied, tokens)}
PARTS = {"MLP": ["Linear"], "CNN": ["Conv2d", "Linear"], "GPT": ["Block"], "tied": []}


def sharded(name, model, **options):
    """`model` with a unit for each of its parts, and one for the rest."""
    for part in list(model.modules()):
        if type(part).__name__ in PARTS[name]:
            fully_shard(part, **options)
    return fully_shard(model, **options)


def made(name):
    """The plain model, the same on all ranks."""
    torch.manual_seed(3)
    return MODELS[name][0]()


def descend(model, batch_of, steps=STEPS, clip=None):
    """Mean losses over ranks of AdamW on equal shares of batches."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    share, losses = BATCH // ranks, []
    for step in range(steps):
        loss = model(*(t[rank * share : (rank + 1) * share] for t in batch_of(step)))
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        mean = loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def whole(model):
    """The bytes of all parameters in full."""
    return [p.full_tensor().detach().numpy().tobytes() for p in model.parameters()]
