"""A training step of transformer blocks with the layers cut over ranks, with PyTorch's beside it.

    python benchmarks/tensor_parallel.py                      # 1 process, and 2 ranks
    python benchmarks/tensor_parallel.py --torch-python PATH  # PyTorch with gloo beside it

Forward, backward and AdamW; median of the steps after the first three, one thread a rank.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time

from beside import ONE_THREAD, command, measured, with_torch

WARM = 3


def blocks(torch, width, heads, count):
    nn, F = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            y = self.ln1(x)
            q, k, v = (t(y).unflatten(-1, (-1, width // heads)).transpose(1, 2)
                       for t in (self.q, self.k, self.v))  # fmt: skip
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(y.transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))

    return nn.Sequential(*[Block() for _ in range(count)])


def cut(library, model, mesh):
    parallel = importlib.import_module(f"{library}.distributed.tensor.parallel")
    columns = {f"*.{name}": parallel.ColwiseParallel() for name in ("[qkv]", "up")}
    rows = {f"*.{name}": parallel.RowwiseParallel() for name in ("proj", "down")}
    return parallel.parallelize_module(model, mesh, columns | rows)


def rank_main(args):
    """What the child runs: rank 0 prints one line of JSON."""
    torch = importlib.import_module(args.library)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, dist = blocks(torch, args.width, 8, args.blocks), torch.distributed
    if args.ranks > 1:
        dist.init_process_group("gloo" if args.library == "torch" else None)
        mesh = dist.device_mesh.init_device_mesh("cpu", (args.ranks,))
        cut(args.library, model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, times = torch.randn(args.batch, args.length, args.width), []
    for _ in range(args.steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    found = {"ms": statistics.median(times[WARM:]) * 1e3, "loss": loss.item()}
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found), flush=True)
    if args.ranks > 1:
        dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", help="an interpreter that has PyTorch")
    parser.add_argument("--library", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=2)
    sizes = {"width": 512, "blocks": 4, "batch": 8, "length": 128, "steps": 12}
    for option, default in sizes.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    if args.library:
        rank_main(args)
        return
    env = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}
    flags = [flag for name in sizes for flag in (f"--{name}", str(getattr(args, name)))]
    pythons = {"dtrain": sys.executable}
    if args.torch_python and with_torch(args.torch_python):
        pythons["torch"] = args.torch_python
    for ranks in (1, args.ranks):
        for library, python in pythons.items():
            own = ["--library", library, "--ranks", str(ranks), *flags]
            found = measured(command(library, python, ranks), __file__, own, env)
            print(f"{library:7s} {ranks} rank(s)  {found['ms']:7.1f} ms  loss {found['loss']:.6f}")


if __name__ == "__main__":
    main()
