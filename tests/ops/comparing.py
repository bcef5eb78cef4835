"""Comparison of expressions and error sentences with what PyTorch recorded.

float32 results agree to 1e-5, float16 to 2e-3: the operations are the same, the order of additions
is not. Integers, bools, shapes and dtypes agree exactly.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

import dtrain as torch
import dtrain.nn.functional
from tests.ops.expressions import evaluate
from tests.ops.sentences import ERRORS, namespace
from tests.recorded import load, load_json

TOLERANCE = {np.dtype(np.float16): (2e-3, 1e-3), np.dtype(np.float64): (1e-9, 1e-12)}
UNINITIALISED = ("empty",)


@functools.cache
def _recorded():
    """{expression: {result or gradient: array}}."""
    found = {}
    for key, array in load("expressions").items():
        text, _, part = key.rpartition("#")
        found.setdefault(text, {})[part] = array
    return found


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
def check_expression(text):
    """`text` gives PyTorch's results and gradients, of its dtypes and shapes."""
    expected, found = _recorded()[text], evaluate(torch, text)
    assert found.keys() == expected.keys()
    for part, array in expected.items():
        assert (found[part].dtype, found[part].shape) == (array.dtype, array.shape), part
        if any(word in text for word in UNINITIALISED):
            continue
        rtol, atol = TOLERANCE.get(array.dtype, (1e-5, 1e-6))
        exact = array.dtype.kind in "biu"
        np.testing.assert_allclose(
            found[part], array, 0 if exact else rtol, 0 if exact else atol, err_msg=part
        )


def check_error(text):
    """`text` raises what PyTorch raises; the named sentence is in both messages."""
    kind, message = load_json("error_sentences")[text]
    sentence = ERRORS[text]
    assert sentence in message, "the table must quote PyTorch"
    with pytest.raises(Exception) as caught:  # noqa: PT011 - type and text are compared below
        exec(text, namespace(torch))
    assert type(caught.value).__name__ == kind
    assert sentence in str(caught.value)
