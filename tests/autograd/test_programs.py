"""Views, changes in place, hooks and graphs: whole programs end as they do in PyTorch.

float32 results agree to 1e-4: second derivatives of layer_norm lose some digits on both sides.
"""

from __future__ import annotations

import numpy as np
import pytest

import dtrain as torch
import dtrain.nn.functional
from tests.autograd.programs import PROGRAMS, run
from tests.recorded import load_json


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_outcome_is_pytorchs(name):
    expected, found = load_json("programs")[name], run(torch, PROGRAMS[name])
    assert len(found) == len(expected)
    for value, recorded in zip(found, expected, strict=True):
        if isinstance(recorded, dict):
            assert value.dtype.name == recorded["dtype"]
            np.testing.assert_allclose(value, recorded["values"], 1e-4, 1e-6)
        else:
            assert value == recorded
