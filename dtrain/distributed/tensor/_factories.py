"""New DTensors: zeros, ones, empty, full, rand, randn with a mesh and placements.

Each rank makes its part alone and nothing is sent. Random ones are those that one process would
draw from the same seed: every rank draws the whole and keeps its part, so ranks must be seeded
alike, and stay so. Source: torch.distributed.tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.tensor._api import DTensor, wrap
from dtrain.distributed.tensor._dtensor_spec import DTensorSpec
from dtrain.distributed.tensor.placement_types import Placement, normalized
from dtrain.ops import create, random
from dtrain.ops.create import shape_of

Placed = Sequence[Placement] | None


def _spec(size: tuple[Any, ...], mesh: DeviceMesh | None, placements: Placed) -> DTensorSpec:
    if mesh is None:
        raise RuntimeError("a factory of DTensors needs device_mesh=")
    shape = shape_of(size)
    return DTensorSpec(mesh, normalized(placements, mesh.ndim, len(shape)), shape)


def _made(local: Any, spec: DTensorSpec, requires_grad: bool) -> DTensor:
    return wrap(local, spec).requires_grad_(requires_grad)  # type: ignore[return-value]


def _filled(name: str) -> Callable[..., DTensor]:
    fill = getattr(create, name)

    def factory(
        *size: Any, requires_grad: bool = False, dtype: dtypes.dtype | None = None,
        layout: Any = "strided", device_mesh: DeviceMesh | None = None, placements: Placed = None,
    ) -> DTensor:  # fmt: skip
        spec = _spec(size, device_mesh, placements)
        return _made(fill(spec.box[1], dtype=dtype), spec, requires_grad)

    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = (
        f"`dtrain.{name}` over a mesh; `placements` default to all `Replicate`. `layout` is "
        f"accepted and changes nothing. Source: torch.distributed.tensor.{name}."
    )
    return factory


zeros, ones, empty = _filled("zeros"), _filled("ones"), _filled("empty")


def full(
    size: Any, fill_value: Any, *, dtype: dtypes.dtype | None = None, layout: Any = "strided",
    requires_grad: bool = False, device_mesh: DeviceMesh | None = None, placements: Placed = None,
) -> DTensor:  # fmt: skip
    """`dtrain.full` over a mesh. Source: torch.distributed.tensor.full."""
    spec = _spec((size,), device_mesh, placements)
    return _made(create.full(spec.box[1], fill_value, dtype=dtype), spec, requires_grad)


def _drawn(name: str) -> Callable[..., DTensor]:
    draw = getattr(random, name)

    def factory(
        *size: Any, requires_grad: bool = False, dtype: dtypes.dtype | None = None,
        layout: Any = "strided", device_mesh: DeviceMesh | None = None, placements: Placed = None,
    ) -> DTensor:  # fmt: skip
        spec = _spec(size, device_mesh, placements)
        offsets, sizes = spec.box
        own = tuple([slice(o, o + n) for o, n in zip(offsets, sizes, strict=True)])
        whole = draw(spec.shape, dtype=dtype)
        return _made(make(whole._data[own].copy()), spec, requires_grad)

    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = (
        f"`dtrain.{name}` over a mesh: the values one process would draw from this seed. Each "
        "rank holds the whole for a moment. `layout` is accepted and changes nothing. "
        f"Source: torch.distributed.tensor.{name}."
    )
    return factory


rand, randn = _drawn("rand"), _drawn("randn")
