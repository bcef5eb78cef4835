"""Padding, resizing, folding: torch's sentences and the relation of fold to unfold."""

from __future__ import annotations

import numpy as np
import pytest

import dtrain
from dtrain.nn import functional as F

R = dtrain.zeros


def test_fold_is_the_transpose_of_unfold():
    random = np.random.RandomState(0)
    x = random.randn(2, 3, 6, 5)
    options = {"kernel_size": (2, 3), "dilation": (2, 1), "padding": 1, "stride": (1, 2)}
    columns = F.unfold(dtrain.from_numpy(x), **options)
    h = random.randn(*columns.shape)
    back = F.fold(dtrain.from_numpy(h), (6, 5), **options)
    np.testing.assert_allclose((columns.numpy() * h).sum(), (back.numpy() * x).sum())


def test_padding_and_cropping_pass_the_gradient_of_what_stays():
    x = dtrain.ones(3, 4, requires_grad=True)
    F.pad(x, (-1, 2, 1, -1), value=7.0).sum().backward()
    expected = np.ones((3, 4))
    expected[:, 0] = expected[2] = 0
    np.testing.assert_array_equal(x.grad.numpy(), expected)


@pytest.mark.parametrize(
    ("call", "kind", "sentence"),
    [
        (lambda: F.pad(R(2, 2), (1,)), RuntimeError, "Padding length must be divisible by 2"),
        (lambda: F.pad(R(2, 2), (1, 1, 1, 1, 1, 1)), RuntimeError,
         "Padding length should be less than or equal to two times the input dimension but got "
         "padding length 6 and input of dimension 2"),
        (lambda: F.pad(R(2, 2), (1, 1), mode="foo"), NotImplementedError,
         "Unrecognised padding mode foo"),
        (lambda: F.pad(R(2, 2), (1, 1, 1, 1), mode="reflect"), NotImplementedError,
         "Padding size 4 is not supported for 2D input tensor."),
        (lambda: F.pad(R(2, 2), (2, 0), mode="reflect"), RuntimeError,
         "Padding size should be less than the corresponding input dimension"),
        (lambda: F.pad(R(2, 2), (3, 0), mode="circular"), RuntimeError,
         "Padding value causes wrapping around more than once."),
        (lambda: F.pad(R(2, 2), (-3, 0)), RuntimeError, "resulted in a negative output size"),
        (lambda: F.interpolate(R(1, 1, 2, 2)), ValueError,
         "either size or scale_factor should be defined"),
        (lambda: F.interpolate(R(1, 1, 2, 2), 2, 2), ValueError,
         "only one of size or scale_factor should be defined"),
        (lambda: F.interpolate(R(1, 1, 2, 2), 2, mode="bicubic"), NotImplementedError,
         "mode 'bicubic' of a 4D input"),
        (lambda: F.interpolate(R(1, 1, 2, 2), 2, align_corners=True), ValueError,
         "align_corners option can only be set with the interpolating modes"),
        (lambda: F.unfold(R(1, 1, 2, 2), 3), RuntimeError, "must be at least one"),
        (lambda: F.fold(R(1, 5, 1), (2, 2), 2), RuntimeError,
         "Expected size of input's dimension 1 to be divisible by the product of kernel_size"),
        (lambda: F.fold(R(1, 4, 3), (2, 2), 2), RuntimeError,
         "but got input.size(2)=3."),
    ],
)  # fmt: skip
def test_refusals(call, kind, sentence):
    with pytest.raises(kind) as refusal:
        call()
    assert sentence in str(refusal.value)
