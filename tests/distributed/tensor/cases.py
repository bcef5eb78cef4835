"""Cases of DTensor that run under PyTorch and under dtrain alike: cuts, and where results lie.

`library` has the names of torch.distributed.tensor; placements are written as expressions.
"""

from __future__ import annotations

import itertools
from typing import Any

SHAPES = [(5, 7), (1, 3), (6, 2), (3,), (4, 4, 4), (0, 3)]
MESHES = {"line": (4,), "grid": (2, 2)}

# {expression over x: (shape of x, whether it is asked for a Partial x too)}
RESULTS = {
    "x + 1": (4, 6), "x * 2": (4, 6), "x * x": (4, 6), "x + x": (4, 6), "-x": (4, 6),
    "x.relu()": (4, 6), "x.exp()": (4, 6), "x > 0": (4, 6), "x.clone()": (4, 6),
    "x.sum()": (4, 6), "x.sum(0)": (4, 6), "x.sum(1, keepdim=True)": (4, 6), "x.mean()": (4, 6),
    "x.mean(1)": (4, 6), "x.softmax(1)": (4, 6), "x.log_softmax(0)": (4, 6),
    "x.t()": (4, 6), "x.transpose(0, 1)": (4, 6), "x.permute(2, 0, 1)": (4, 6, 2),
    "x.view(24)": (4, 6), "x.view(4, 2, 3)": (4, 6), "x.view(2, 2, 6)": (4, 6),
    "x.unsqueeze(0)": (4, 6), "x.flatten(1)": (4, 6, 2), "x @ x.t()": (4, 6),
    "x.t() @ x": (4, 6), "x.to(float64)": (4, 6), "zeros_like(x)": (4, 6),
}  # fmt: skip
# (kind, shape of x, placement of x, of weight, of bias)
LINEARS = [
    ("R", "S(0)", "S(0)"), ("S(-1)", "S(1)", "R"), ("S(0)", "R", "R"), ("R", "R", "R"),
]  # fmt: skip


def placement(library: Any, text: str) -> Any:
    """A placement by its short text: R, S(0), P."""
    made = {"R": library.Replicate(), "P": library.Partial()}
    return made[text] if text in made else library.Shard(int(text[2:-1]))


def texts(axes: int, ndim: int) -> list[tuple[str, ...]]:
    """All cuts over a mesh of so many axes."""
    return list(itertools.product(["R", *(f"S({d})" for d in range(ndim))], repeat=axes))


def boxes(library: Any, mesh: Any, compute: Any) -> dict[str, Any]:
    """{shape and placements: this rank's (shape, offset)}, by torch's function for it."""
    found = {}
    for shape in SHAPES:
        for cut in texts(mesh.ndim, len(shape)):
            places = [placement(library, text) for text in cut]
            sizes, offsets = compute(shape, mesh, places)
            found[f"{list(shape)} {' '.join(cut)}"] = [list(sizes), list(offsets)]
    return found


def results(torch: Any, library: Any, mesh: Any) -> dict[str, Any]:
    """{expression and placement of x: placement and shape of the result}, on a mesh of one axis."""
    found = {}
    for expression, shape in RESULTS.items():
        for text in ["R", *(f"S({d})" for d in range(len(shape))), "P"]:
            local = torch.ones(shape)
            place = placement(library, text)
            if place.is_shard():
                local = local.chunk(2, place.dim)[0].clone()
            x = library.DTensor.from_local(local, mesh, [place])
            try:
                y = eval(expression, {"x": x, "float64": torch.float64,
                                      "zeros_like": torch.zeros_like})  # fmt: skip
            except (RuntimeError, NotImplementedError):
                found[f"{expression} | {text}"] = None
                continue
            found[f"{expression} | {text}"] = [repr(y.placements[0]), list(y.shape)]
    for cuts in LINEARS:
        inputs = []
        for shape, text in zip(((4, 6), (2, 6), (2,)), cuts, strict=True):
            place = placement(library, text)
            local = torch.ones(shape)
            if place.is_shard():
                local = local.chunk(2, place.dim)[0].clone()
            inputs.append(library.DTensor.from_local(local, mesh, [place]))
        y = torch.nn.functional.linear(*inputs)
        found[f"linear | {' '.join(cuts)}"] = [repr(y.placements[0]), list(y.shape)]
    return found
