"""What a worker that did not opt in does with what it is sent: a canary pickle, names, nonsense.

The canary would write a name into a list; an audit hook would see any unpickling of a class.
"""

from __future__ import annotations

import pickle
import sys

import msgpack
import pytest

import dtrain as torch
from dtrain.autograd.op import OPS
from dtrain.distributed.rpc import RRef
from dtrain.distributed.rpc.names import export, name_of, resolve
from dtrain.distributed.rpc.payload import CODE, FUNCTION, METHOD, RECORD, pack, unpack

sung: list[str] = []
unpickled: list[object] = []


def sing(name):
    sung.append(name)


class Canary:
    def __reduce__(self):
        return sing, ("tweet",)


def _hook(event, arguments):
    if event == "pickle.find_class":
        unpickled.append(arguments)


sys.addaudithook(_hook)


def ext(code, value):
    return msgpack.packb(msgpack.ExtType(code, msgpack.packb(value)))


def nothing(name):
    raise AssertionError(name)


def test_a_canary_pickle_is_not_opened():
    body = ext(CODE, pickle.dumps(Canary()))
    before = len(unpickled)
    with pytest.raises(TypeError, match="did not say accept_code=True"):
        unpack(body, [], nothing, code=False)
    assert (sung, unpickled[before:]) == ([], [])
    unpack(body, [], nothing, code=True)  # the canary can sing, and the hook can hear
    assert sung == ["tweet"]
    assert len(unpickled) > before
    sung.clear()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("subprocess", "Popen"),
        ("numpy", "save"),
        ("dtrain.serialization", "load"),
        ("dtrain.testing.rank", "run"),
        (__name__, "sys.exit"),
        (__name__, "pickle.loads"),
        (__name__, "export"),
        (__name__, "sing.__globals__"),
        (__name__, "Canary.__reduce__.__globals__"),
        (__name__, "no_such_function"),
        (__name__, "test_names.<locals>.inner"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(module, name):
    with pytest.raises(TypeError):
        unpack(ext(FUNCTION, [module, name]), [], nothing, code=False)


def test_names():
    assert resolve(*name_of(sing)) is sing
    assert resolve(*name_of(Canary)) is Canary
    with pytest.raises(TypeError, match="may not be called"):
        name_of(pickle.loads)
    assert export(pickle.loads) is pickle.loads
    assert resolve(*name_of(pickle.loads)) is pickle.loads


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        ext(99, 1),
        ext(FUNCTION, "os"),
        ext(METHOD, ["text", "__class__"]),
        ext(RECORD, ["text", {}]),
        ext(32, [0, "float32", [1]]),
        ext(33, [-1, "no dtype", [1 << 60]]),
    ],
)
def test_nonsense_is_an_error(body):
    with pytest.raises((TypeError, ValueError, IndexError)):
        unpack(body, [], nothing, code=False)


def test_nothing_is_pickled_for_those_who_do_not_accept_it():
    with pytest.raises(TypeError, match="accept_code=True"):
        pack([Canary()], "call", code=False, reference=RRef)


def test_all_tensor_functions_may_be_called_by_name():
    functions = [f for f in vars(torch).values() if getattr(f, "op", None) in OPS.values()]
    assert len(functions) > 50
    for function in functions:
        assert resolve(*name_of(function)) is function
    assert name_of(torch.neg) == ["dtrain.ops.elementwise", "neg"]
