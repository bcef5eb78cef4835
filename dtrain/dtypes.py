"""The dtype objects, what they promote to, and their bridge to NumPy's.

Owns: one singleton per dtype (identity is equality), the default dtype, torch's promotion rules.
Rule 1: `DTYPE_OF[array.dtype]` and `some_dtype.numpy` are the two conversions; both are lookups.
Rule 2: bfloat16 comes from ml_dtypes, imported at its first use: the import takes 6-15 ms.
Rule 3: there is no complex32, so the complex form of float16 is complex64 (torch: complex32).
"""

from __future__ import annotations

import functools
from enum import IntEnum
from types import ModuleType
from typing import Any

import numpy as np


class dtype:
    """A data type. The instances are module attributes (`float32`, `int64`, ...); no others exist.

    Attributes: `name`; `numpy`, the np.dtype of its arrays; `is_floating_point`, `is_complex`,
    `is_signed`; `itemsize` in bytes; `scalar_type`, torch's name in error sentences ("Long").
    """

    __slots__ = (
        "is_complex",
        "is_floating_point",
        "is_signed",
        "itemsize",
        "name",
        "numpy",
        "scalar_type",
    )

    name: str
    numpy: np.dtype[Any]
    is_floating_point: bool
    is_complex: bool
    is_signed: bool
    itemsize: int
    scalar_type: str

    def __new__(cls, *args: Any, **kwargs: Any) -> dtype:
        raise TypeError("cannot create 'dtrain.dtype' instances")

    def __getattr__(self, attribute: str) -> Any:
        # Reached only while a slot is empty: bfloat16's `numpy`, before ml_dtypes is imported.
        if attribute != "numpy":
            raise AttributeError(f"'dtrain.dtype' object has no attribute '{attribute}'")
        self.numpy = np.dtype(_ml_dtypes().bfloat16)
        return self.numpy

    def __repr__(self) -> str:
        return f"dtrain.{self.name}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _by_name, (self.name,)

    def to_real(self) -> dtype:
        """The dtype of the real part: complex64 -> float32; any other dtype is its own."""
        return {complex64: float32, complex128: float64}.get(self, self)

    def to_complex(self) -> dtype:
        """The complex dtype whose parts are this floating dtype (float16 and bfloat16: complex64).

        RuntimeError for integers and bool, as in torch.
        """
        if not (self.is_floating_point or self.is_complex):
            raise RuntimeError(f"Unknown Complex ScalarType for {self.scalar_type}")
        return complex128 if self in (float64, complex128) else complex64


@functools.cache
def _ml_dtypes() -> ModuleType:
    import ml_dtypes

    return ml_dtypes


class _DtypeOf(dict[np.dtype[Any], dtype]):
    """{np.dtype: dtype}; a miss is bfloat16's first appearance or an array we cannot hold."""

    def __missing__(self, key: np.dtype[Any]) -> dtype:
        if not isinstance(key, np.dtype):
            raise TypeError(f"DTYPE_OF is indexed by a numpy.dtype, got {key!r}; use np.dtype(...)")
        if key.name == "bfloat16":
            self[key] = bfloat16
            return bfloat16
        if key.newbyteorder("=") in self:
            raise TypeError(
                "given numpy array has byte order different from the native byte order. Conversion "
                "between byte orders is currently not supported. "
                f"Got {key!r}; use array.astype(array.dtype.newbyteorder('='))."
            )
        raise TypeError(
            f"can't convert np.ndarray of type numpy.{key.name}. The only supported types are: "
            + ", ".join(_CANONICAL)
            + "."
        )


DTYPE_OF: dict[np.dtype[Any], dtype] = _DtypeOf()
BY_NAME: dict[str, dtype] = {}  # every public name, aliases too: {"float32": ..., "float": ...}


def _define(scalar_type: str, name: str, *aliases: str) -> dtype:
    self = object.__new__(dtype)
    self.name, self.scalar_type = name, scalar_type
    if name == "bfloat16":
        kind, self.itemsize = "f", 2
    else:
        self.numpy = np.dtype(name)
        kind, self.itemsize = self.numpy.kind, self.numpy.itemsize
        DTYPE_OF[self.numpy] = self
    self.is_floating_point = kind == "f"
    self.is_complex = kind == "c"
    self.is_signed = kind in "fci"
    BY_NAME.update(dict.fromkeys((name, *aliases), self))
    return self


float32 = float_ = _define("Float", "float32", "float")
float64 = double = _define("Double", "float64", "double")
float16 = half = _define("Half", "float16", "half")
bfloat16 = _define("BFloat16", "bfloat16")
int8 = _define("Char", "int8")
int16 = short = _define("Short", "int16", "short")
int32 = int_ = _define("Int", "int32", "int")
int64 = long = _define("Long", "int64", "long")
uint8 = _define("Byte", "uint8")
uint16 = _define("UInt16", "uint16")
uint32 = _define("UInt32", "uint32")
uint64 = _define("UInt64", "uint64")
bool_ = _define("Bool", "bool")
complex64 = cfloat = _define("ComplexFloat", "complex64", "cfloat")
complex128 = cdouble = _define("ComplexDouble", "complex128", "cdouble")

_CANONICAL = tuple(name for name, dt in BY_NAME.items() if name == dt.name)
_WIDE_UNSIGNED = frozenset((uint16, uint32, uint64))


def _by_name(name: str) -> dtype:
    return BY_NAME[name]


def from_numpy(numpy_dtype: np.dtype[Any]) -> dtype:
    """The dtype of arrays of `numpy_dtype`. TypeError, in torch's words, when there is none."""
    return DTYPE_OF[numpy_dtype]


# --- the default dtype ---------------------------------------------------------------------------

_default_dtype = float32


def get_default_dtype() -> dtype:
    """The floating dtype of Python floats and of factories called without a dtype: float32."""
    return _default_dtype


def set_default_dtype(d: dtype) -> None:
    """Make `d` the default of the whole process (all threads), as in torch.

    TypeError unless `d` is a floating-point dtype.
    """
    global _default_dtype
    if not isinstance(d, dtype):
        raise TypeError(
            "invalid dtype object: only floating-point types are supported as the default type, "
            f"got {d!r}"
        )
    if not d.is_floating_point:
        raise TypeError(f"only floating-point types are supported as the default type, got {d!r}")
    _default_dtype = d


# --- promotion -----------------------------------------------------------------------------------


class Category(IntEnum):
    """Who decides a result's dtype, weakest first: a lower category only lifts the kind."""

    SCALAR = 0  # a Python number
    ZERO_DIM = 1  # a tensor of shape []
    DIMENSIONED = 2


@functools.cache
def promote_types(type1: dtype, type2: dtype) -> dtype:
    """The smallest dtype that holds both kinds and sizes (torch.promote_types).

    RuntimeError for uint16, uint32 and uint64 with another integer, bool or complex, as in torch.
    """
    for position, given in enumerate((type1, type2), 1):
        if not isinstance(given, dtype):
            raise TypeError(
                f"promote_types(): argument 'type{position}' (position {position}) must be "
                f"dtrain.dtype, not {type(given).__name__}"
            )
    if type1 is type2:
        return type1
    if type1 in _WIDE_UNSIGNED or type2 in _WIDE_UNSIGNED:
        return _promote_wide_unsigned(type1, type2)
    if type1.is_complex or type2.is_complex:
        return promote_types(type1.to_real(), type2.to_real()).to_complex()
    if type1.is_floating_point or type2.is_floating_point:
        return _promote_floating(type1, type2)
    return _promote_integers(type1, type2)


def _promote_wide_unsigned(a: dtype, b: dtype) -> dtype:
    for candidate in (a, b):
        if candidate.is_floating_point:
            return candidate
    raise RuntimeError(
        "Promotion for uint16, uint32, uint64 types is not supported, attempted to promote "
        f"{a.scalar_type} and {b.scalar_type}. Convert one of them first, for example .to(int64)."
    )


def _promote_floating(a: dtype, b: dtype) -> dtype:
    if not b.is_floating_point:
        return a
    if not a.is_floating_point:
        return b
    if a.itemsize == b.itemsize:  # float16 and bfloat16: neither holds the other
        return float32
    return a if a.itemsize > b.itemsize else b


def _promote_integers(a: dtype, b: dtype) -> dtype:
    if a is bool_ or b is bool_:
        return b if a is bool_ else a
    if {a, b} == {uint8, int8}:
        return int16
    if a.itemsize == b.itemsize:
        return a
    return a if a.itemsize > b.itemsize else b


def scalar_dtype(value: bool | int | float | complex | np.generic) -> dtype:
    """The dtype a number brings into promotion: bool, int64, the default, its complex form.

    NumPy scalars count as Python numbers whatever their size, as in torch. TypeError otherwise.
    """
    if isinstance(value, (float, np.floating)):
        return _default_dtype
    if isinstance(value, (bool, np.bool_)):
        return bool_
    if isinstance(value, (int, np.integer)):
        return int64
    if isinstance(value, (complex, np.complexfloating)):
        return _default_dtype.to_complex()
    raise TypeError(f"expected a number, got {type(value).__name__}")


@functools.cache
def result_type(*operands: tuple[dtype, Category]) -> dtype:
    """The dtype of an operation over (dtype, category) operands; at least one.

    Each category promotes among its own; a lower one matters only when it is of a higher kind
    (bool < integer < floating < complex), so float32[3] + float64[] is float32 and
    int64[3] + 1.5 is the default dtype. A Python number enters as (scalar_dtype(x), SCALAR).
    """
    best: list[dtype | None] = [None, None, None]
    for operand, category in operands:
        known = best[category]
        best[category] = operand if known is None else promote_types(known, operand)
    scalar, zero_dim, dimensioned = best
    result = _combine(dimensioned, _combine(zero_dim, scalar))
    if result is None:
        raise ValueError("result_type needs at least one operand, got none")
    return result


def _combine(higher: dtype | None, lower: dtype | None) -> dtype | None:
    if higher is None or lower is None:
        return lower if higher is None else higher
    if higher.is_complex:
        return higher
    if higher.is_floating_point:
        return higher.to_complex() if lower.is_complex else higher
    if lower.is_floating_point or lower.is_complex:
        return lower
    return promote_types(higher, lower) if higher is bool_ else higher


def can_cast(from_: dtype, to: dtype) -> bool:
    """True when a result of `from_` may be stored in `to`: the kind never goes down."""
    if from_.is_complex and not to.is_complex:
        return False
    if from_.is_floating_point and not (to.is_floating_point or to.is_complex):
        return False
    return from_ is bool_ or to is not bool_


# --- limits --------------------------------------------------------------------------------------


class finfo:
    """Limits of a floating dtype (of the parts, for a complex one); the default dtype without.

    Attributes: bits, eps, max, min, tiny, smallest_normal, resolution (floats), dtype (a name).
    """

    def __init__(self, type: dtype | None = None) -> None:
        given = _default_dtype if type is None else _require_dtype("finfo", type)
        if not (given.is_floating_point or given.is_complex):
            raise TypeError(
                "torch.finfo() requires a floating point input type. Use torch.iinfo to handle "
                f"'{given!r}'"
            )
        real = given.to_real()
        limits = (_ml_dtypes() if real is bfloat16 else np).finfo(real.numpy)
        self.dtype = real.name
        self.bits = real.itemsize * 8
        self.eps, self.max, self.min = float(limits.eps), float(limits.max), float(limits.min)
        self.tiny = self.smallest_normal = float(limits.tiny)
        self.resolution = 10.0**-limits.precision

    def __repr__(self) -> str:
        return (
            f"finfo(resolution={self.resolution:g}, min={self.min:g}, max={self.max:g}, "
            f"eps={self.eps:g}, smallest_normal={self.smallest_normal:g}, tiny={self.tiny:g}, "
            f"dtype={self.dtype})"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, finfo) and self.dtype == other.dtype

    def __hash__(self) -> int:
        return hash(self.dtype)


class iinfo:
    """Limits of an integer dtype. Attributes: bits, max, min (ints), dtype (a name)."""

    def __init__(self, type: dtype) -> None:
        given = _require_dtype("iinfo", type)
        if given.is_floating_point or given.is_complex:
            raise TypeError(
                "torch.iinfo() requires an integer input type. Use torch.finfo to handle "
                f"'{given!r}'"
            )
        if given is bool_:
            raise TypeError("dtrain.bool is not supported by torch.iinfo")
        limits = np.iinfo(given.numpy)
        self.dtype = given.name
        self.bits, self.max, self.min = limits.bits, int(limits.max), int(limits.min)

    def __repr__(self) -> str:
        return f"iinfo(min={self.min:g}, max={self.max:g}, dtype={self.dtype})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, iinfo) and self.dtype == other.dtype

    def __hash__(self) -> int:
        return hash(self.dtype)


def _require_dtype(where: str, given: Any) -> dtype:
    if not isinstance(given, dtype):
        raise TypeError(
            f"{where}(): argument 'type' (position 1) must be dtrain.dtype, "
            f"not {type(given).__name__}"
        )
    return given
