"""The first steps of examples/train_gpt.py, driven from a test or under PyTorch.

The example's own classes are used, with the import line changed for PyTorch, on a text that is the
same everywhere (this repository's LICENSE) and in the example's own way of sharing out the batch.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH, CONTEXT = 20, 8, 32


def example(library: str = "dtrain") -> types.ModuleType:
    """examples/train_gpt.py as a module that computes with `library`."""
    path = ROOT / "examples" / "train_gpt.py"
    source = path.read_text(encoding="utf-8")
    line = "import dtrain as torch"
    assert source.count(f"\n{line}\n") == 1, "the example imports dtrain in exactly one line"
    module = types.ModuleType("train_gpt")
    exec(compile(source.replace(line, f"import {library} as torch"), str(path), "exec"),
         module.__dict__)  # fmt: skip
    return module


def losses(library: str = "dtrain", rank: int = 0, world: int = 1) -> list[float]:
    """The mean loss over all ranks of each of the first STEPS steps; seed 0."""
    gpt = example(library)
    torch: Any = gpt.torch
    torch.manual_seed(0)
    text = gpt.read_text(ROOT / "LICENSE")
    model = gpt.GPT(CONTEXT, width=32, layers=2)
    ddp = model
    if world > 1:
        ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    share, found = BATCH // world, []
    for step in range(STEPS):
        x, y = gpt.batch_of(text, BATCH, CONTEXT, step)
        loss = ddp(*(t[rank * share : (rank + 1) * share] for t in (x, y)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach() / world
        if world > 1:
            torch.distributed.all_reduce(mean)
        found.append(mean.item())
    return found
