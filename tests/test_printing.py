"""The text of tensors is PyTorch's, character by character."""

from __future__ import annotations

import pytest

import dtrain as torch
from tests.printing_cases import TEXTS, shown
from tests.recorded import load_json


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_is_pytorchs(text):
    assert shown(torch, text) == load_json("tensor_texts")[text]


def test_options_are_shown_and_checked():
    torch.set_printoptions(precision=2, profile="short")
    try:
        assert torch.get_printoptions()["edgeitems"] == 2
        assert torch.get_printoptions()["precision"] == 2
    finally:
        torch.set_printoptions(profile="default")
    with pytest.raises(ValueError, match=r"unknown profile 'long' \(known: default, short, full\)"):
        torch.set_printoptions(profile="long")


def test_where_a_tensor_comes_from_is_shown():
    x = torch.ones(2, requires_grad=True)
    assert repr(x[0]) == "tensor(1., grad_fn=<SliceBackward0>)"
    assert repr(x.exp().grad_fn).startswith("<ExpBackward0 object at 0x")
    a, _ = x.split(1)
    assert repr(a) == "tensor([1.], grad_fn=<SplitBackward0>)"
