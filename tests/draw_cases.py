"""The draws that are recorded from PyTorch and compared with ours: one table for both sides.

A case is a method of `Generator` and its arguments. `record_random.py` draws it with PyTorch,
`test_random.py` with the Generator, both from every one of `SEEDS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SEEDS = (0, 7, 1234, 2**40 + 5)
FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")


@dataclass(frozen=True)
class Draw:
    """`method(**arguments)`, of which the last `keep` numbers are recorded (long draws)."""

    method: str
    arguments: tuple[tuple[str, Any], ...]
    keep: int = 64

    def __str__(self) -> str:
        return f"{self.method}({', '.join(f'{name}={value}' for name, value in self.arguments)})"

    def get(self, name: str) -> Any:
        return dict(self.arguments)[name]


def draw(method: str, **arguments: Any) -> Draw:
    return Draw(method, tuple(arguments.items()))


WEIGHTS = ((0.1, 0.2, 0.3, 0.4), (5.0, 0.0, 2.5, 1.25), (1e-3, 1.0, 1e-3, 1e-3))
SIZES = (1, 7, 15, 16, 17, 40, 48, 70_000)
RANGES = (
    *((0, 2), (0, 1000), (-50, 27), (0, 2**28 - 1)),
    *((0, 2**28), (0, 2**32), (-(2**40), 2**40 + 3), (-(2**63), 2**63 - 1)),
)

CASES = (
    *(draw("uniform", shape=(n,), dtype=d, low=0, high=1) for d in FLOATS for n in (9, 70_000)),
    *(
        draw("uniform", shape=(3, 50), dtype=d, low=low, high=high)
        for d in FLOATS
        for low, high in ((-0.3, 0.3), (0, 0.1), (1, 1.5), (-5.3, 0.7))
    ),
    *(draw("normal", shape=(n,), dtype=d, mean=0, std=1) for d in FLOATS for n in SIZES),
    *(draw("normal", shape=(n,), dtype=d, mean=2, std=0.02) for d in FLOATS for n in (5, 37)),
    *(draw("normal", shape=(2, 3, 8), dtype=d, mean=0, std=0.02) for d in FLOATS),
    *(draw("exponential", shape=(40,), dtype=d, lambd=k) for d in FLOATS for k in (1, 2.5)),
    *(draw("randint", low=a, high=b, shape=(20,), dtype="int64") for a, b in RANGES),
    *(draw("randint", low=0, high=100, shape=(9,), dtype=d) for d in (*INTEGERS, *FLOATS)),
    *(draw("randint", low=0, high=2, shape=(9,), dtype="bool") for _ in "1"),
    *(draw("randint", low=0, high=9, shape=(9,), dtype=d) for d in ("uint16", "uint32", "uint64")),
    *(draw("random", shape=(20,), dtype=d) for d in (*INTEGERS, *FLOATS, "bool")),
    *(draw("randperm", n=n, dtype="int64") for n in (0, 1, 2, 10, 1000, 60_000)),
    *(draw("randperm", n=40, dtype=d) for d in ("int32", "float32", "float16")),
    *(draw("bernoulli", p=p, shape=(50,)) for p in (0, 0.3, 0.5, 1)),
    *(draw("bernoulli_each", shape=(50,), dtype=d) for d in FLOATS),
    *(draw("dropout_mask", p=p, shape=(4, 25)) for p in (0, 0.1, 0.5, 0.9, 1)),
    *(
        draw("multinomial", rows=rows, dtype=d, num_samples=k, replacement=r)
        for rows in (1, 3)
        for d in ("float32", "float64", "float16")
        for k, r in ((1, False), (1, True), (3, False), (9, True))
    ),
)

# One generator, draws of every kind in a row: what each leaves behind matters to the next.
MIXED = (
    draw("normal", shape=(3,), dtype="float32", mean=0, std=1),
    draw("uniform", shape=(5,), dtype="float32", low=0, high=1),
    draw("normal", shape=(1,), dtype="float64", mean=0, std=1),
    draw("randperm", n=7, dtype="int64"),
    draw("normal", shape=(3,), dtype="float32", mean=0, std=1),
    draw("normal", shape=(20,), dtype="float32", mean=0, std=1),
    draw("randint", low=0, high=10, shape=(3,), dtype="int64"),
    draw("normal", shape=(2,), dtype="float16", mean=0, std=1),
    draw("normal", shape=(18,), dtype="bfloat16", mean=0, std=1),
    draw("dropout_mask", p=0.2, shape=(6,)),
    draw("exponential", shape=(3,), dtype="float32", lambd=1),
    draw("random", shape=(2,), dtype="int64"),
    draw("uniform", shape=(625,), dtype="float64", low=0, high=1),
    draw("normal", shape=(1,), dtype="float32", mean=0, std=1),
)
