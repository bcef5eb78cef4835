"""How a tensor is shown: torch's layout, rounding and summaries, and the options that set them.

Rules: floats are printed with `precision` digits; in scientific form when the largest is over
1e8, the smallest non-zero one under 1e-4 or their ratio over 1000; all in columns of one width.
Tensors of more than `threshold` elements show `edgeitems` at the ends of each dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from dtrain import dtypes

PROFILES: dict[str, dict[str, Any]] = {
    "default": {"precision": 4, "threshold": 1000, "edgeitems": 3},
    "short": {"precision": 2, "threshold": 1000, "edgeitems": 2},
    "full": {"precision": 4, "threshold": math.inf, "edgeitems": 3},
}
# What `set_printoptions` sets; `sci_mode` None means: where the numbers ask for it.
options = SimpleNamespace(**PROFILES["default"], linewidth=80, sci_mode=None)


def set_printoptions(
    precision: int | None = None, threshold: float | None = None, edgeitems: int | None = None,
    linewidth: int | None = None, profile: str | None = None, sci_mode: bool | None = None,
) -> None:  # fmt: skip
    """Set how tensors are shown, for the whole process; `profile`: default, short or full.

    Source: torch.set_printoptions.
    """
    given: dict[str, Any] = {}
    if profile is not None:
        if profile not in PROFILES:
            raise ValueError(f"unknown profile {profile!r} (known: {', '.join(PROFILES)})")
        given |= PROFILES[profile]
    said = {"precision": precision, "threshold": threshold, "edgeitems": edgeitems,
            "linewidth": linewidth}  # fmt: skip
    given |= {name: value for name, value in said.items() if value is not None}
    options.__dict__.update(given, sci_mode=sci_mode)


def get_printoptions() -> dict[str, Any]:
    """The options as a dict. Source: torch.get_printoptions."""
    return dict(vars(options))


Format = Callable[[Any], str]


def float_format(values: np.ndarray) -> tuple[Format, int]:
    """How to write one of these floats, and the width of all."""
    digits = options.precision
    known = np.abs(values[np.isfinite(values) & (values != 0)].astype(np.float64))
    whole = bool((known == np.ceil(known)).all())
    scientific = False
    if known.size:
        low, high = known.min(), known.max()
        scientific = high / low > 1000 or high > 1e8 or (not whole and low < 1e-4)
    if options.sci_mode is not None:
        scientific = options.sci_mode

    def write(value: Any) -> str:
        if scientific:
            return f"{value:.{digits}e}"
        if whole:
            return f"{value:.0f}" + ("." if math.isfinite(value) else "")
        return f"{value:.{digits}f}"

    shown = values[np.isfinite(values) & (values != 0)].tolist()
    return write, max([len(write(v)) for v in shown], default=1)


def complex_format(values: np.ndarray) -> tuple[Format, int]:
    """Real and imaginary part, each in the format of all its fellows."""
    (real, _), (imag, _) = float_format(values.real), float_format(values.imag)

    def write(value: Any) -> str:
        sign = "-" if math.copysign(1, value.imag) < 0 else "+"
        return f"{real(value.real)}{sign}{imag(abs(value.imag))}j"

    return write, max([len(write(v)) for v in values.reshape(-1).tolist()], default=1)


def format_of(values: np.ndarray) -> Format:
    """How to write one of these values, padded to the width of all."""
    write: Format = str
    if values.dtype.kind == "c":
        write, width = complex_format(values)
    elif values.dtype.kind == "f":
        write, width = float_format(values.reshape(-1))
    else:
        width = max([len(str(v)) for v in values.reshape(-1).tolist()], default=1)
    return lambda value: write(value).rjust(width)


def edges(array: np.ndarray) -> np.ndarray:
    """The elements that a summary shows."""
    for axis, size in enumerate(array.shape):
        if size > 2 * options.edgeitems:
            ends = [*range(options.edgeitems), *range(size - options.edgeitems, size)]
            array = array.take(ends, axis)
    return array


def body(array: np.ndarray, indent: int, summarize: bool, write: Format) -> str:
    """The nested brackets; `indent` is the column of the first one."""
    if array.ndim == 0:
        return write(array.item())
    cut = summarize and len(array) > 2 * options.edgeitems
    edge = options.edgeitems
    shown = [*array[:edge], *array[len(array) - edge :]] if cut else list(array)
    if array.ndim == 1:
        parts = [write(v.item()) for v in shown]
        if cut:
            parts.insert(edge, " ..." if edge else "...")
        width = len(write(array[0].item())) + 2
        per_line = max(1, (options.linewidth - indent) // width)
        lines = [", ".join(parts[i : i + per_line]) for i in range(0, len(parts), per_line)]
        return "[" + (",\n" + " " * (indent + 1)).join(lines) + "]"
    parts = [body(part, indent + 1, summarize, write) for part in shown]
    if cut:
        parts.insert(edge, "...")
    return "[" + ("," + "\n" * (array.ndim - 1) + " " * (indent + 1)).join(parts) + "]"


def suffixes(tensor: Any) -> list[str]:
    """What follows the numbers: size, dtype and the tensor's place in a graph."""
    found = []
    default = dtypes.get_default_dtype()
    usual: tuple[Any, ...] = (default, default.to_complex(), dtypes.int64, dtypes.bool_)
    if tensor.numel() == 0:
        usual = (default,)
        if tensor.ndim != 1:
            found.append(f"size={tuple(tensor.shape)}")
    elif tensor.numel() > options.threshold and not options.edgeitems:
        found.append(f"size={tuple(tensor.shape)}")  # nothing else tells how much there is
    if tensor.dtype not in usual:
        found.append(f"dtype={tensor.dtype!r}")
    if tensor.grad_fn is not None:
        found.append(f"grad_fn=<{tensor.grad_fn.name()}>")
    elif tensor.requires_grad:
        found.append("requires_grad=True")
    return found


def tensor_repr(tensor: Any) -> str:
    """`tensor([...], dtype=..., requires_grad=True)` as torch writes it, with our dtype names."""
    prefix = "tensor("
    array = tensor._data
    if array.dtype.itemsize == 2 and tensor.dtype.is_floating_point:
        array = array.astype(np.float32)
    text = prefix + "[]"
    if array.size:
        summarize = array.size > options.threshold
        write = format_of(edges(array) if summarize else array)
        text = prefix + body(array, len(prefix), summarize, write)
    column = len(text) - text.rfind("\n") + 1
    for suffix in suffixes(tensor):
        if column + len(suffix) + 2 > options.linewidth:
            text += ",\n" + " " * len(prefix) + suffix
            column = len(prefix) + len(suffix)
        else:
            text += ", " + suffix
            column += len(suffix) + 2
    return text + ")"
