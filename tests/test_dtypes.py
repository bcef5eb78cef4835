"""dtypes: promotion, casting and limits as recorded from PyTorch; NumPy and pickle round trips."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest

from dtrain import dtypes
from dtrain.dtypes import BY_NAME, DTYPE_OF, Category
from tests.recorded import load_json

NAMES = [name for name, dt in BY_NAME.items() if dt.name == name]
ALIASES = {
    **{"float": "float32", "double": "float64", "half": "float16", "short": "int16"},
    **{"int": "int32", "long": "int64", "cfloat": "complex64", "cdouble": "complex128"},
}


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    dtypes.set_default_dtype(dtypes.float32)


def ours(result: str | None) -> str | None:
    """What we promise where PyTorch says `result`: there is no complex32 here."""
    return "complex64" if result == "complex32" else result


def parsed(operand: str) -> tuple[dtypes.dtype, Category]:
    """int64[1] is a tensor with a dimension, int64[0] one without; float is a Python number."""
    name, bracket, ndim = operand.partition("[")
    if not bracket:
        value = {"bool": True, "int": 3, "float": 1.5, "complex": 1j}[name]
        return dtypes.scalar_dtype(value), Category.SCALAR
    return BY_NAME[name], Category.ZERO_DIM if ndim == "0]" else Category.DIMENSIONED


def assert_result(function, arguments, want: str | None) -> None:
    """`want` is the name of a dtype, or None where PyTorch refuses."""
    if want is None:
        with pytest.raises(RuntimeError, match="Promotion for uint16, uint32, uint64 types is not"):
            function(*arguments)
    else:
        assert function(*arguments).name == want, arguments


def test_names_and_aliases():
    assert len(NAMES) == 15
    assert {alias: BY_NAME[alias].name for alias in ALIASES} == ALIASES
    assert len(BY_NAME) == 15 + len(ALIASES)
    assert dtypes.long is dtypes.int64
    assert dtypes.float_ is dtypes.float32
    assert dtypes.bool_ is BY_NAME["bool"]


@pytest.mark.parametrize("name", NAMES)
def test_attributes(name):
    dt = BY_NAME[name]
    for field, value in load_json("dtypes")["attributes"][name].items():
        assert getattr(dt, field) == value
    assert repr(dt) == f"dtrain.{name}"
    assert dt.numpy.name == name
    assert dt.numpy.itemsize == dt.itemsize


@pytest.mark.parametrize("name", NAMES)
def test_numpy_and_copies_lead_back_to_the_singleton(name):
    dt = BY_NAME[name]
    assert DTYPE_OF[np.empty(0, dt.numpy).dtype] is dt
    assert dtypes.from_numpy(dt.numpy) is dt
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(dt, protocol)) is dt
    assert copy.copy(dt) is copy.deepcopy(dt) is dt


def test_platform_integers_are_fixed_width_ones():
    for code in "bhilqBHILQ":
        numpy_dtype = np.dtype(code)
        assert DTYPE_OF[numpy_dtype].name == numpy_dtype.name


def test_parts_of_complex_dtypes():
    assert dtypes.complex64.to_real() is dtypes.float32
    assert dtypes.complex128.to_real() is dtypes.float64
    assert dtypes.int8.to_real() is dtypes.int8
    assert dtypes.float64.to_complex() is dtypes.complex128.to_complex() is dtypes.complex128
    assert dtypes.bfloat16.to_complex() is dtypes.float16.to_complex() is dtypes.complex64
    with pytest.raises(RuntimeError, match="Unknown Complex ScalarType for Char"):
        dtypes.int8.to_complex()


def test_bfloat16_is_loaded_when_it_is_used():
    code = (
        "import sys; from dtrain import dtypes; assert 'ml_dtypes' not in sys.modules;"
        "assert dtypes.bfloat16.itemsize == 2 and 'ml_dtypes' not in sys.modules;"
        "import ml_dtypes, numpy;"
        "assert dtypes.from_numpy(numpy.dtype(ml_dtypes.bfloat16)) is dtypes.bfloat16"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert run.returncode == 0, run.stderr


def test_promotion_is_that_of_pytorch():
    for pair, want in load_json("dtypes")["promote_types"].items():
        a, b = (BY_NAME[name] for name in pair.split())
        assert_result(dtypes.promote_types, (a, b), want)


def test_casting_is_that_of_pytorch():
    for pair, want in load_json("dtypes")["can_cast"].items():
        assert dtypes.can_cast(*(BY_NAME[name] for name in pair.split())) == want, pair


@pytest.mark.parametrize("table", ["result_type", "result_type_scalar"])
def test_result_types_are_those_of_pytorch(table):
    for operands, want in load_json("dtypes")[table].items():
        pair = [parsed(operand) for operand in operands.split()]
        assert_result(dtypes.result_type, pair, ours(want))
        assert_result(dtypes.result_type, pair[::-1], ours(want))


def test_the_recording_covers_every_pair():
    assert len(load_json("dtypes")["promote_types"]) == 15 * 15
    assert len(load_json("dtypes")["result_type"]) == 15 * 15 * 4
    assert len(load_json("dtypes")["result_type_scalar"]) == 15 * 2 * 4


def test_result_type_of_more_operands_and_of_none():
    long, single = (dtypes.int64, Category.DIMENSIONED), (dtypes.float32, Category.ZERO_DIM)
    number = (dtypes.float64, Category.SCALAR)
    assert dtypes.result_type(long) is dtypes.int64
    assert dtypes.result_type(long, single, number) is dtypes.float32
    with pytest.raises(ValueError, match="at least one operand"):
        dtypes.result_type()


@pytest.mark.parametrize("default", ["float64", "float16", "bfloat16"])
def test_python_floats_take_the_default_dtype(default):
    dtypes.set_default_dtype(BY_NAME[default])
    assert dtypes.get_default_dtype() is BY_NAME[default]
    assert dtypes.scalar_dtype(1.5) is dtypes.scalar_dtype(np.float32(1)) is BY_NAME[default]
    assert dtypes.scalar_dtype(1j) is BY_NAME[default].to_complex()
    integers = dtypes.int64, Category.DIMENSIONED
    number = dtypes.scalar_dtype(1.5), Category.SCALAR
    assert dtypes.result_type(integers, number) is BY_NAME[default]
    assert dtypes.finfo().dtype == default


def test_scalars_of_numpy_count_as_python_numbers():
    assert dtypes.scalar_dtype(np.int8(1)) is dtypes.int64
    assert dtypes.scalar_dtype(np.bool_(True)) is dtypes.bool_
    assert dtypes.scalar_dtype(np.complex128(1)) is dtypes.complex64
    with pytest.raises(TypeError, match="expected a number, got str"):
        dtypes.scalar_dtype("1")


@pytest.mark.parametrize("name", load_json("dtypes")["limits"])
def test_limits_are_those_of_pytorch(name):
    recorded = load_json("dtypes")["limits"][name]
    dt = BY_NAME[name]
    info = (dtypes.finfo if dt.is_floating_point or dt.is_complex else dtypes.iinfo)(dt)
    assert repr(info) == recorded.pop("repr")
    assert {field: getattr(info, field) for field in recorded} == recorded
    assert info == type(info)(dt)
    assert len({info, type(info)(dt)}) == 1


def test_limits_of_different_dtypes_differ():
    assert dtypes.finfo(dtypes.float16) != dtypes.finfo(dtypes.bfloat16)
    assert dtypes.iinfo(dtypes.int8) != dtypes.iinfo(dtypes.uint8)
    assert dtypes.finfo(dtypes.float32) != dtypes.iinfo(dtypes.int32)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: dtypes.dtype("float32"), TypeError, "cannot create 'dtrain.dtype' instances"),
        (lambda: dtypes.finfo(dtypes.int8), TypeError, "requires a floating point input type"),
        (lambda: dtypes.iinfo(dtypes.float32), TypeError, "requires an integer input type"),
        (lambda: dtypes.iinfo(dtypes.bool_), TypeError, "bool is not supported by torch.iinfo"),
        (lambda: dtypes.finfo(3), TypeError, "must be dtrain.dtype, not int"),
        (lambda: dtypes.set_default_dtype(dtypes.int8), TypeError, "only floating-point types"),
        (lambda: dtypes.set_default_dtype("f"), TypeError, "invalid dtype object: only floating"),
        (lambda: dtypes.promote_types(dtypes.int8, 3), TypeError, "argument 'type2' (position 2)"),
        (lambda: dtypes.from_numpy(np.dtype("U3")), TypeError, "can't convert np.ndarray of type"),
        (lambda: dtypes.from_numpy(np.dtype("O")), TypeError, "can't convert np.ndarray of type"),
        (lambda: dtypes.from_numpy(np.dtype("M8[s]")), TypeError, "can't convert np.ndarray of"),
        (lambda: dtypes.from_numpy(np.dtype("i4,f4")), TypeError, "can't convert np.ndarray of"),
        (lambda: dtypes.from_numpy(np.dtype("f4").newbyteorder()), TypeError, "byte order differ"),
        (lambda: dtypes.from_numpy(np.float32), TypeError, "indexed by a numpy.dtype"),
        (lambda: dtypes.float32.colour, AttributeError, "has no attribute 'colour'"),
    ],
)
def test_refusals_say_why(call, error, sentence):
    with pytest.raises(error) as raised:
        call()
    assert sentence in str(raised.value)
