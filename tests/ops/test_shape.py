"""Views, parts, joins and copies: PyTorch's values and gradients.

Recorded expressions, then who shares memory with whom.
"""

from __future__ import annotations

import numpy as np
import pytest

import dtrain as torch
from tests.ops.comparing import check_expression
from tests.ops.expressions import FAMILIES


@pytest.mark.parametrize("text", FAMILIES["shape"])
def test_values_and_gradients_are_pytorchs(text):
    check_expression(text)


def test_what_is_a_view():
    x = torch.zeros(2, 3, 4)
    views = [
        x.view(6, 4), x.reshape(-1), x.flatten(), x.unsqueeze(0), x[:1].squeeze(0),
        x.permute(2, 0, 1),
        x.transpose(0, 1), x.expand(2, 3, 4), x.narrow(0, 0, 1), x.split(1)[0], x.unbind()[1],
        x.chunk(2)[1], x.movedim(0, 1), x.select(1, 0), x.diagonal(), x.contiguous(), x.mT,
    ]  # fmt: skip
    for view in views:
        assert view is x or view._base is x
        assert np.shares_memory(view.numpy(), x.numpy())
    copies = [
        x.clone(), x.flip(0), x.roll(1), x.repeat(1, 1, 1), x.transpose(0, 1).reshape(-1),
        torch.cat([x]), torch.stack([x]), x.tril(), x.transpose(0, 1).contiguous(),
    ]  # fmt: skip
    for copy in copies:
        assert not np.shares_memory(copy.numpy(), x.numpy())


def test_parts_that_nobody_used_get_zeros():
    x = torch.arange(6.0, requires_grad=True)
    a, _, c = x.split(2)
    (a.sum() + 2 * c.sum()).backward()
    assert x.grad.tolist() == [1, 1, 0, 0, 2, 2]
    y = torch.ones(3, requires_grad=True)
    y.unbind()[1].backward()
    assert y.grad.tolist() == [0, 1, 0]


def test_shapes_relaid_in_place():
    x = torch.arange(6.0).reshape(2, 3)
    assert x.t_() is x
    assert x.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert x.unsqueeze_(0).squeeze_(0).transpose_(0, 1).shape == (2, 3)
