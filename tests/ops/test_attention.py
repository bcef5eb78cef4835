"""Attention: masks, memory layout, strips, and torch's sentences; the rest is recorded."""

from __future__ import annotations

import numpy as np
import pytest

import dtrain
from dtrain.nn import functional as F
from dtrain.ops.attention import STRIP


def plain(q, k, v, mask=None):
    scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])
    scores = scores if mask is None else np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def qkv(*shape, dtype=np.float64):
    random = np.random.RandomState(0)
    return [random.randn(*shape).astype(dtype) for _ in range(3)]


@pytest.mark.parametrize("length", [1, STRIP - 1, STRIP, STRIP + 1, 3 * STRIP + 5])
def test_causal_strips(length):
    arrays = qkv(2, 3, length, 4)
    y = F.scaled_dot_product_attention(*map(dtrain.from_numpy, arrays), is_causal=True)
    mask = np.tril(np.ones((length, length), bool))
    np.testing.assert_allclose(y.numpy(), plain(*arrays, mask), atol=1e-13)


def test_causal_and_masked_at_once_is_both():
    arrays = qkv(2, 2, 9, 4)
    mask = np.random.RandomState(1).rand(9, 9) > 0.4
    np.fill_diagonal(mask, True)
    tensors = list(map(dtrain.from_numpy, arrays))
    y = F.scaled_dot_product_attention(*tensors, dtrain.from_numpy(mask), is_causal=True)
    both = mask & np.tril(np.ones((9, 9), bool))
    np.testing.assert_allclose(y.numpy(), plain(*arrays, both), atol=1e-13)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_row_where_all_is_masked_gives_zero_and_no_nan(create_graph):
    tensors = [dtrain.tensor(a, requires_grad=True) for a in qkv(1, 1, 2, 4)]
    mask = dtrain.tensor([[True, False], [False, False]])
    y = F.scaled_dot_product_attention(*tensors, mask)
    assert y[0, 0, 1].tolist() == [0.0] * 4
    y.sum().backward(create_graph=create_graph)
    for tensor in tensors:
        assert np.isfinite(tensor.grad.detach().numpy()).all()
        tensor.grad = None


def test_the_result_lies_in_memory_as_the_query_does():
    # then (B, H, T, D) heads become (B, T, H * D) rows again without a copy
    x = dtrain.randn(2, 5, 3, 4)
    y = F.scaled_dot_product_attention(*(x.transpose(1, 2),) * 3)
    assert y.shape == (2, 3, 5, 4)
    assert y.transpose(1, 2).is_contiguous()
    z = x.transpose(1, 2).contiguous()
    assert F.scaled_dot_product_attention(z, z, z).is_contiguous()


def test_scores_stay_float32():
    q, k, v = map(dtrain.from_numpy, qkv(1, 2, 6, 4, dtype=np.float32))
    assert F.scaled_dot_product_attention(q, k, v, scale=np.float64(0.5)).dtype is dtrain.float32


R = dtrain.zeros


@pytest.mark.parametrize(
    ("tensors", "options", "sentence"),
    [
        ((R(8), R(2, 5, 8), R(2, 5, 8)), {},
         "Expected query, key, and value to all be  at least 2 dimensional, but got query.dim: 1 "
         "key.dim: 3 and value.dim: 3 instead."),
        ((R(4, 8), R(4, 8), R(4, 8).double()), {},
         "Expected query, key, and value to have the same dtype, but got query.dtype: float "
         "key.dtype: float and value.dtype: double instead."),
        ((R(4, 8), R(4, 8), R(4, 8)), {"attn_mask": R(4, 4).long()},
         "Expected attn_mask dtype to be bool or float or to match query dtype"),
        ((R(4, 8), R(4, 7), R(4, 8)), {}, "the sizes of query, key and value do not fit"),
        ((R(2, 4, 5, 8), R(2, 3, 5, 8), R(2, 3, 5, 8)), {"enable_gqa": True},
         "Number of heads in key and value must divide the number of heads in query"),
        ((R(2, 4, 5, 8), R(2, 3, 5, 8), R(2, 3, 5, 8)), {},
         "The size of tensor a (4) must match the size of tensor b (3) at non-singleton dimension "
         "1"),
    ],
)  # fmt: skip
def test_refusals(tensors, options, sentence):
    with pytest.raises(RuntimeError) as refusal:
        F.scaled_dot_product_attention(*tensors, **options)
    assert sentence in str(refusal.value)


def test_nothing_as_large_as_the_scores_is_kept():
    length = 4 * STRIP
    x = dtrain.randn(1, 2, length, 4, requires_grad=True)
    node = F.scaled_dot_product_attention(x, x, x, is_causal=True).grad_fn
    kept = [a for a in (*node.aux, *node.__dict__.values()) if isinstance(a, np.ndarray)]
    assert kept
    assert max(a.size for a in kept) < length * length
