"""Products of matrices: PyTorch's values and gradients.

Recorded expressions, then einsum against NumPy's.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

import dtrain as torch
from tests.ops.comparing import check_expression
from tests.ops.expressions import FAMILIES


@pytest.mark.parametrize("text", FAMILIES["linalg"])
def test_values_and_gradients_are_pytorchs(text):
    check_expression(text)


LETTERS = st.lists(
    st.text("abc", min_size=1, max_size=3).filter(lambda t: len(set(t)) == len(t)),
    min_size=1, max_size=3,
)  # fmt: skip


@given(LETTERS, st.randoms(use_true_random=False))
def test_einsum_is_numpys(inputs, random):
    sizes = {"a": 2, "b": 3, "c": 4}
    output = "".join(c for c in "abc" if c in "".join(inputs) and random.random() < 0.5)
    equation = f"{','.join(inputs)}->{output}"
    draw = np.random.RandomState(0)
    arrays = [draw.rand(*(sizes[c] for c in letters)) for letters in inputs]
    found = torch.einsum(equation, *map(torch.tensor, arrays))
    np.testing.assert_allclose(found.numpy(), np.einsum(equation, *arrays))


def test_einsum_says_what_is_wrong():
    x = torch.ones(2, 3)
    for equation, message in {
        "ij,jk": "operands were provided than specified",
        "ijk": "does not match the number of dimensions",
        "i1": "invalid subscript",
        "ij->ijk": "output subscript k is in no input",
        "ij->ii": "appears more than once",
    }.items():
        with pytest.raises(RuntimeError, match=message):
            torch.einsum(equation, x)
    with pytest.raises(RuntimeError, match="subscript j has size 2 for one operand, 3 for"):
        torch.einsum("ij,kj", x, torch.ones(2, 2))


def test_the_diagonal_is_a_view():
    x = torch.zeros(2, 2)
    x.diagonal()[:] = torch.tensor([1.0, 2.0])
    assert x.tolist() == [[1, 0], [0, 2]]
