"""Order and counts: PyTorch's values, indices and gradients.

Recorded expressions, then stability.
"""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

import dtrain as torch
from tests.ops.comparing import check_expression
from tests.ops.expressions import FAMILIES


@pytest.mark.parametrize("text", FAMILIES["sorting"])
def test_values_and_gradients_are_pytorchs(text):
    check_expression(text)


@given(st.lists(st.integers(0, 3), max_size=12), st.booleans())
def test_sorting_is_stable_in_both_directions(values, descending):
    found = torch.tensor(values, dtype=torch.int64).sort(descending=descending)
    order = sorted(range(len(values)), key=lambda i: -values[i] if descending else values[i])
    assert found.indices.tolist() == order
    assert found.values.tolist() == [values[i] for i in order]


def test_gradients_flow_to_the_elements_that_were_chosen():
    x = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
    (x.topk(2).values * torch.tensor([10.0, 20.0])).sum().backward()
    assert x.grad.tolist() == [10, 0, 20]
