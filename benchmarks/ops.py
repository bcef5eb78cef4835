"""Cost of single operations: what recording costs on small tensors, what arrays cost on large.

    python benchmarks/ops.py
    python benchmarks/ops.py --torch-python PATH    # PyTorch beside it

Microseconds, one thread; each figure is the least of several means. "forward" of a small multiply
records a graph, "backward" includes the call; the chain is 100 multiplies and one backward, shown
for one link. Of the large operations "both" is forward and backward with all gradients.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time

from beside import ONE_THREAD, command, measured, with_torch

SIZES = {"small": (16, 64), "middle": (256, 512), "large": (1024, 1536)}
NAMES = ("add", "mul", "matmul", "linear", "relu", "gelu", "softmax", "layer_norm", "sum",
         "cross_entropy")  # fmt: skip


def best_mean(call, seconds=0.02, rounds=7):
    """The least mean time of `call`, in microseconds."""
    call()
    start = time.perf_counter()
    call()
    repeats = max(1, int(seconds / max(time.perf_counter() - start, 1e-7)))
    means = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        means.append((time.perf_counter() - start) / repeats)
    return min(means) * 1e6


def recording_costs(torch):
    """One small multiply, and a chain of 100, with gradients."""
    a = torch.randn(3, requires_grad=True)
    b = torch.randn(3, requires_grad=True)
    ones = torch.ones(3)

    def both():
        (a * b).backward(ones)

    def chain(links=100):
        x = a
        for _ in range(links):
            x = x * b
        x.backward(ones)

    forward = best_mean(lambda: a * b)
    return {
        "mul forward": forward,
        "mul backward": best_mean(both) - forward,
        "chain of 100, a link": best_mean(chain) / 100,
    }


def calls(torch, rows, columns):
    """{name: function of a tensor x (rows, columns) that requires grad}."""
    F = torch.nn.functional
    other = torch.randn(rows, columns, requires_grad=True)
    square = torch.randn(columns, columns, requires_grad=True)
    vector = torch.randn(columns, requires_grad=True)
    target = torch.randint(0, columns, (rows,))
    functions = (
        lambda x: x + other,
        lambda x: x * other,
        lambda x: x @ square,
        lambda x: F.linear(x, square, vector),
        F.relu,
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: torch.softmax(x, 1),
        lambda x: F.layer_norm(x, (columns,), vector, vector),
        lambda x: x.sum(),
        lambda x: F.cross_entropy(x, target),
    )
    return dict(zip(NAMES, functions, strict=True))


def array_costs(torch):
    """{"name size": microseconds} of forward, and of forward and backward."""
    found = {}
    for size, (rows, columns) in SIZES.items():
        x = torch.randn(rows, columns, requires_grad=True)
        for name, function in calls(torch, rows, columns).items():
            seed = torch.ones_like(function(x).detach())

            def both(function=function, x=x, seed=seed):
                function(x).backward(seed)

            found[f"{name} {size} forward"] = best_mean(lambda f=function, x=x: f(x))
            found[f"{name} {size} both"] = best_mean(both)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with torch")
    parser.add_argument("--library", choices=["dtrain", "torch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.library:
        torch = importlib.import_module(args.library)
        torch.set_num_threads(1)
        print(json.dumps({**recording_costs(torch), **array_costs(torch)}))
        return
    env = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}
    python = with_torch(args.torch_python)
    ours, theirs = (
        interpreter
        and measured(command(library, interpreter, 1), __file__, ["--library", library], env)
        for library, interpreter in (("dtrain", sys.executable), ("torch", python))
    )
    sizes = ", ".join(f"{name} {rows}x{columns}" for name, (rows, columns) in SIZES.items())
    print(f"# float32, one thread; {sizes}" + ("" if python else "; no PyTorch to compare with"))
    print(f"# {'':<28}{'us':>10}" + (f"{'torch us':>12}  torch/ours" if python else ""))
    for name, cost in ours.items():
        beside = f"{theirs[name]:>12.1f}{theirs[name] / cost:>11.2f}x" if theirs else ""
        print(f"{name:<30}{cost:>10.1f}{beside}")


if __name__ == "__main__":
    main()
