"""The device object: what it accepts, how it compares, what it refuses and in which words."""

from __future__ import annotations

import copy
import pickle

import pytest

from dtrain.device import CPU, device


@pytest.mark.parametrize(
    ("made", "index", "shown", "text"),
    [
        (device("cpu"), None, "device(type='cpu')", "cpu"),
        (device("cpu:0"), 0, "device(type='cpu', index=0)", "cpu:0"),
        (device("cpu", 3), 3, "device(type='cpu', index=3)", "cpu:3"),
        (device(type="cpu", index=12), 12, "device(type='cpu', index=12)", "cpu:12"),
        (device(device("cpu:1")), 1, "device(type='cpu', index=1)", "cpu:1"),
    ],
)
def test_forms(made, index, shown, text):
    assert (made.type, made.index) == ("cpu", index)
    assert (repr(made), str(made)) == (shown, text)
    assert device(text) == made
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made


def test_equality_and_hash():
    assert device("cpu") == CPU
    assert device("cpu") != device("cpu:0")
    assert device("cpu:0") == device("cpu", 0)
    assert device("cpu") != "cpu"
    assert len({device("cpu"), CPU, device("cpu:0")}) == 2


def test_as_a_context_it_changes_nothing():
    with device("cpu") as inside:
        assert inside == CPU


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (
            ("cuda",),
            RuntimeError,
            "Expected one of cpu, meta device type at start of device string: cuda",
        ),
        (("cuda:1",), RuntimeError, "at start of device string: cuda:1"),
        (("xpu",), RuntimeError, "at start of device string: xpu"),
        ((0,), RuntimeError, "Cannot access accelerator device when none is available."),
        (("",), RuntimeError, "Device string must not be empty"),
        (("cpu:x",), RuntimeError, "Invalid device string: 'cpu:x'"),
        (("cpu:-1",), RuntimeError, "Invalid device string: 'cpu:-1'"),
        (("cpu:00",), RuntimeError, "Invalid device string: 'cpu:00'"),
        (("cpu", -1), RuntimeError, "Device index must not be negative"),
        (("cpu:0", 0), RuntimeError, "type (string) must not include an index because index was"),
        ((1.5,), TypeError, "received an invalid combination of arguments - got (float)"),
        ((None,), TypeError, "received an invalid combination of arguments - got (NoneType)"),
        ((True,), TypeError, "received an invalid combination of arguments - got (bool)"),
        ((device("cpu"), 1), TypeError, "received an invalid combination of arguments"),
    ],
)
def test_refusals_say_why_and_what_to_do(arguments, error, sentence):
    with pytest.raises(error) as raised:
        device(*arguments)
    assert sentence in str(raised.value)
    assert "use" in str(raised.value).lower()
