"""Convolutions against a plain loop over windows, in strips, and torch's sentences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import dtrain
from dtrain.nn import functional as F
from dtrain.ops import windows


def by_loop(x, weight, stride, padding, dilation, groups):
    """The definition: every output pixel is the sum over its window."""
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    count, _, height, width = padded.shape
    outputs, inner, kh, kw = weight.shape
    rows = (height - dilation * (kh - 1) - 1) // stride + 1
    columns = (width - dilation * (kw - 1) - 1) // stride + 1
    y = np.empty((count, outputs, rows, columns))
    for o in range(outputs):
        first = o // (outputs // groups) * inner
        part = padded[:, first : first + inner]
        for r in range(rows):
            for c in range(columns):
                top, left = r * stride, c * stride
                window = part[:, :, top : top + dilation * kh : dilation,
                              left : left + dilation * kw : dilation]  # fmt: skip
                y[:, o, r, c] = (window[:, :, :kh, :kw] * weight[o]).sum((1, 2, 3))
    return y


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(5, 8), st.integers(5, 8)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    options=st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2, 4]),
    tile=st.sampled_from([1, 100, 2000, 4000, 1 << 20]),
)
def test_conv2d_is_its_definition_in_strips_of_any_size(sizes, kernel, options, groups, tile):
    """Also where two of the three images are taken together, and the last one alone."""
    stride, padding, dilation = options
    random = np.random.RandomState(0)
    x, weight = random.randn(3, 4, *sizes), random.randn(8, 4 // groups, *kernel)
    leaves = [dtrain.tensor(a, requires_grad=True) for a in (x, weight)]
    before, windows.TILE = windows.TILE, tile
    try:
        y = F.conv2d(*leaves, None, stride, padding, dilation, groups)
        g = random.randn(*y.shape)
        y.backward(dtrain.from_numpy(g))
    finally:
        windows.TILE = before
    np.testing.assert_allclose(
        y.detach().numpy(), by_loop(x, weight, stride, padding, dilation, groups), atol=1e-12
    )
    # conv is linear in each array: <g, conv(x, w)> = <grad_x, x> = <grad_w, w>
    product = (g * y.detach().numpy()).sum()
    for leaf in leaves:
        np.testing.assert_allclose((leaf.grad.numpy() * leaf.detach().numpy()).sum(), product)


def test_transposed_convolution_is_the_transpose():
    random = np.random.RandomState(0)
    x, weight = random.randn(2, 3, 7, 6), random.randn(4, 3, 3, 2)
    y = F.conv2d(dtrain.from_numpy(x), dtrain.from_numpy(weight), stride=2, padding=1)
    h = random.randn(*y.shape)
    back = F.conv_transpose2d(
        dtrain.from_numpy(h), dtrain.from_numpy(weight), stride=2, padding=1, output_padding=(0, 1)
    )
    # 7 rows and 6 columns give 4 x 4 windows; the last column of x is met by none but padding
    assert back.shape[2:] == (7, 7)
    np.testing.assert_allclose((y.numpy() * h).sum(), (back.numpy()[..., :6] * x).sum())


@pytest.mark.parametrize("stride", [1, 2])
def test_no_images_give_no_images(stride):
    x, weight = (dtrain.zeros(n, 3, 3, 3, requires_grad=True) for n in (0, 2))
    y = F.conv2d(x, weight, stride=stride)
    assert y.shape == (0, 2, 1, 1)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_gradient_wanted_alone_is_the_same(stride, groups):
    random = np.random.RandomState(0)
    arrays = random.randn(2, 4, 7, 6), random.randn(6, 4 // groups, 3, 2)
    found = []
    for wanted in ((True, True), (True, False), (False, True)):
        leaves = [dtrain.tensor(a, requires_grad=w) for a, w in zip(arrays, wanted, strict=True)]
        y = F.conv2d(*leaves, None, stride, 1, groups=groups)
        y.backward(dtrain.from_numpy(np.arange(float(y.numel())).reshape(y.shape)))
        found.append([leaf.grad for leaf in leaves])
    both, first, second = found
    np.testing.assert_allclose(both[0].numpy(), first[0].numpy(), rtol=1e-12)
    np.testing.assert_allclose(both[1].numpy(), second[1].numpy(), rtol=1e-12)
    assert first[1] is second[0] is None


R = dtrain.zeros


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: F.conv2d(R(1, 1, 8, 8), R(4, 3, 3, 3)),
         "Given groups=1, weight of size [4, 3, 3, 3], expected input[1, 1, 8, 8] to have 3 "
         "channels, but got 1 channels instead"),
        (lambda: F.conv2d(R(8, 8), R(4, 3, 3, 3)),
         "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: [8, 8]"),
        (lambda: F.conv1d(R(1, 3, 8, 8), R(4, 3, 3)),
         "Expected 2D (unbatched) or 3D (batched) input to conv1d, but got input of size: "
         "[1, 3, 8, 8]"),
        (lambda: F.conv2d(R(1, 3, 2, 2), R(4, 3, 3, 3)),
         "Calculated padded input size per channel: (2 x 2). Kernel size: (3 x 3). Kernel size "
         "can't be greater than actual input size"),
        (lambda: F.conv2d(R(1, 3, 8, 8), R(4, 3, 3, 3), padding="same", stride=2),
         "padding='same' is not supported for strided convolutions"),
        (lambda: F.conv2d(R(1, 3, 8, 8), R(4, 3, 3, 3), padding="foo"),
         "Invalid padding string: 'foo'"),
        (lambda: F.conv2d(R(1, 3, 8, 8), R(4, 3, 3, 3), bias=R(3)),
         "Given weight of size [4, 3, 3, 3], expected bias to be 1-dimensional with 4 elements, "
         "but got bias of size [3] instead"),
        (lambda: F.conv2d(R(1, 4, 8, 8), R(5, 2, 3, 3), groups=2),
         "Given groups=2, expected weight to be divisible by 2 at dimension 0, but got weight of "
         "size [[5, 2, 3, 3]] instead"),
        (lambda: F.conv2d(R(1, 3, 8, 8), R(4, 3, 3, 3), stride=0),
         "non-positive stride is not supported"),
        (lambda: F.conv2d(R(1, 3, 8, 8), R(4, 3, 3, 3), padding=-1),
         "negative padding is not supported"),
        (lambda: F.conv2d(R(1, 3, 8, 8), R(4, 3, 3, 3), stride=(1, 1, 1)),
         "expected stride to be a single integer value or a list of 2 values to match the "
         "convolution dimensions, but got stride=[1, 1, 1]"),
        (lambda: F.conv2d(R(1, 3, 8, 8).double(), R(4, 3, 3, 3)),
         "expected scalar type Double but found Float"),
        (lambda: F.conv_transpose2d(R(1, 3, 4, 4), R(4, 3, 3, 3)),
         "Given transposed=1, weight of size [4, 3, 3, 3], expected input[1, 3, 4, 4] to have 4 "
         "channels, but got 3 channels instead"),
        (lambda: F.conv_transpose2d(R(1, 3, 4, 4), R(3, 2, 3, 3), output_padding=1),
         "output padding must be smaller than either stride or dilation"),
    ],
)  # fmt: skip
def test_refusals(call, sentence):
    with pytest.raises(RuntimeError) as refusal:
        call()
    assert sentence in str(refusal.value)
