"""Scaled dot-product attention as one op.

Rules: scores are computed for one batch element and one strip of queries at a time, so that they
stay in cache; with a causal mask a strip meets only the keys it may see. Scores stand in columns,
keys below each other: what softmax does to a query's scores is then done to a row of queries at
once. Nothing of size queries x keys is kept: backward computes the scores again, from a number kept
for each query.
Sources: Vaswani et al., "Attention Is All You Need", 2017; Dao et al., "FlashAttention", 2022.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.dispatch import Whole, broadcast_error, elsewhere
from dtrain.autograd.node import make
from dtrain.autograd.op import define
from dtrain.autograd.value import Value, has_part
from dtrain.ops.activation import softmax
from dtrain.ops.compare import where
from dtrain.ops.dropout import noise_for
from dtrain.ops.linalg import matmul
from dtrain.ops.shape import expand, reshape, transpose, unsqueeze

STRIP = 64  # queries at a time


@functools.cache
def _future(rows: int, dtype: np.dtype[Any]) -> np.ndarray:
    """-inf below the diagonal, where a key (row) comes after the query (column); 0 elsewhere."""
    return np.tril(np.full((rows, rows), -np.inf, dtype), -1)


def _strips(queries: int, keys: int, causal: bool) -> list[tuple[slice, int]]:
    """Strips of queries, each with the number of keys that any of them may see: ever more."""
    starts = range(0, queries, STRIP)
    strips = [slice(start, min(start + STRIP, queries)) for start in starts]
    return [(rows, min(rows.stop, keys) if causal else keys) for rows in strips]


def _turned(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 1)


def _scores(n: Any, b: int, scaled: np.ndarray, rows: slice, seen: int) -> np.ndarray:
    """The masked scores (H, seen, rows) of one strip, a query's in a column.

    `n` has the op's inputs and attributes, `scaled` is `n.q[b] * n.scale`.
    """
    scores = np.matmul(n.k[b, :, :seen], _turned(scaled[:, rows]))
    if n.mask is not None:
        scores += _turned(n.mask[b, :, rows, :seen])
    if n.causal:
        diagonal = scores[:, rows.start :]
        diagonal += _future(scores.shape[2], scores.dtype)[: diagonal.shape[1]]
    return scores


def _forward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None, *,
    causal: bool, scale: float, noise: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    n = SimpleNamespace(q=q, k=k, mask=mask, causal=causal, scale=scale)
    out = np.empty_like(q, shape=(*q.shape[:3], v.shape[3]))
    normaliser = np.empty((*q.shape[:2], 1, q.shape[2]), q.dtype)
    for b in range(len(q)):
        scaled = q[b] * scale
        for rows, seen in _strips(q.shape[2], k.shape[2], causal):
            w = _scores(n, b, scaled, rows, seen)
            total, normaliser[b, :, :, rows] = _exponentials(w, guarded=mask is not None)
            if noise is not None:
                w *= _turned(noise[b, :, rows, :seen])
            part = np.matmul(_turned(w), v[b, :, :seen], out=out[b, :, rows])
            part /= _turned(total)
    return out, normaliser


def _exponentials(w: np.ndarray, guarded: bool) -> tuple[np.ndarray, np.ndarray]:
    """exp(w - max) in place; returns its sums by column, and the logarithms of those of exp(w).

    Both are infinite for columns where all is masked, so that whatever is divided by them is 0.
    """
    top = np.maximum.reduce(w, axis=1, keepdims=True)
    if guarded:
        top[top == -np.inf] = 0
    w -= top
    np.exp(w, out=w)
    total = np.add.reduce(w, axis=1, keepdims=True)
    if guarded:
        total[total == 0] = np.inf
    top += np.log(total)
    return total, top


def _vjp(n: Any, g: np.ndarray) -> Any:
    # with P the weights: dV = P^T g, dS = P (g V^T - rowsum(g out)), dQ = dS K, dK = dS^T Q
    q, k, v = n.q, n.k, n.v
    dq, dk, dv = (np.empty_like(a) for a in (q, k, v))
    dmask = np.zeros(n.shapes[3], g.dtype) if n.needs[3] else None
    along = np.vecdot(g, n.y)[:, :, None]
    for b in range(len(q)):
        scaled = q[b] * n.scale
        written = 0  # of the keys: the first strip, which sees most, writes, the others add
        for rows, seen in reversed(_strips(q.shape[2], k.shape[2], n.causal)):
            w = _scores(n, b, scaled, rows, seen)
            w -= n.normaliser[b, :, :, rows]
            np.exp(w, out=w)
            gs = g[b, :, rows]
            ds = np.matmul(v[b, :, :seen], _turned(gs))
            if n.noise is None:
                kept = w
            else:
                noise = _turned(n.noise[b, :, rows, :seen])
                kept = w * noise
                ds *= noise
            ds -= along[b, :, :, rows]
            ds *= w
            if dmask is not None:
                dmask[b, :, rows, :seen] = _turned(ds)
            np.matmul(_turned(ds), k[b, :, :seen], out=dq[b, :, rows])
            if written:
                dk[b, :, :seen] += np.matmul(ds, scaled[:, rows])
                dv[b, :, :seen] += np.matmul(kept, gs)
            else:
                np.matmul(ds, scaled[:, rows], out=dk[b, :, :seen])
                np.matmul(kept, gs, out=dv[b, :, :seen])
                written = seen
        dk[b, :, written:], dv[b, :, written:] = 0, 0
        dq[b] *= n.scale
    return dq, dk, dv, dmask


def _composite(
    q: Any, k: Any, v: Any, mask: Any, *, causal: bool, scale: float, noise: np.ndarray | None
) -> Any:
    scores = matmul(q * scale, transpose(k, -1, -2))
    if mask is not None:
        scores = scores + mask
    if causal:
        array = scores._data if isinstance(scores, Value) else scores
        rows, columns = array.shape[-2:]
        scores = scores + np.triu(np.full((rows, columns), -np.inf, array.dtype), 1)
    if mask is None:
        weights = softmax(scores, -1)
    else:  # rows where all is masked are 0, not 0 / 0
        array = scores._data if isinstance(scores, Value) else scores
        alive = (array > -np.inf).any(-1, keepdims=True)
        weights = softmax(where(alive, scores, 0.0), -1) * alive
    return matmul(weights if noise is None else weights * noise, v)


def _sample() -> list[Any]:
    r = np.random.RandomState(0)
    q, k, v = r.randn(1, 2, 3, 2), r.randn(1, 2, 3, 2), r.randn(1, 2, 3, 4)
    plain = {"causal": False, "scale": 0.7, "noise": None}
    mask = np.where(r.rand(1, 2, 3, 3) > 0.7, -np.inf, r.randn(1, 2, 3, 3))
    mask[..., 0] = 0
    noise = 2.0 * (r.rand(1, 2, 3, 3) > 0.5)
    return [
        ((q, k, v, None), {**plain, "causal": True}),
        ((q, k, v, mask), plain),
        ((q, k, v, None), {**plain, "noise": noise}),
    ]


_attention = define(
    "scaled_dot_product_attention", _forward, vjp=_vjp, saves="y", aux="normaliser",
    composite=_composite, sample=_sample,
)  # fmt: skip


# --- the public function -----------------------------------------------------------------------


def _name(tensor: Any) -> str:
    return {"Float": "float", "Double": "double"}.get(
        tensor.dtype.scalar_type, tensor.dtype.scalar_type.lower()
    )


def _check(query: Any, key: Any, value: Any, mask: Any) -> None:
    if min(query.ndim, key.ndim, value.ndim) < 2:
        raise RuntimeError(
            "Expected query, key, and value to all be  at least 2 dimensional, but got query.dim: "
            f"{query.ndim} key.dim: {key.ndim} and value.dim: {value.ndim} instead."
        )
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(
            "Expected query, key, and value to have the same dtype, but got query.dtype: "
            f"{_name(query)} key.dtype: {_name(key)} and value.dtype: {_name(value)} instead."
        )
    if mask is not None and mask.dtype not in (dtypes.bool_, dtypes.float32, query.dtype):
        raise RuntimeError(
            "Expected attn_mask dtype to be bool or float or to match query dtype, but got "
            f"attn_mask.dtype: {_name(mask)} and  query.dtype: {_name(query)} instead."
        )
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            "scaled_dot_product_attention: the sizes of query, key and value do not fit: "
            f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}; expected (..., L, E), "
            "(..., S, E) and (..., S, Ev)"
        )


def _shared_heads(query: Any, key: Any, value: Any) -> tuple[Any, Any]:
    """Keys and values repeated so that every query head has its own (grouped-query attention)."""
    heads = query.shape[-3]
    if heads % key.shape[-3] or heads % value.shape[-3]:
        raise RuntimeError(
            "Number of heads in key and value must divide the number of heads in query"
        )
    return _repeated(key, heads // key.shape[-3]), _repeated(value, heads // value.shape[-3])


def _repeated(x: Any, times: int) -> Any:
    if times == 1:
        return x
    shape = tuple(x.shape)
    wide = expand(unsqueeze(x, -3), (*shape[:-2], times, *shape[-2:]))
    return reshape(wide, (*shape[:-3], shape[-3] * times, *shape[-2:]))


def _additive(mask: Any, dtype: np.dtype[Any]) -> Any:
    """A bool mask (True: take part) as 0 and -inf."""
    if mask._data.dtype != np.bool_:
        return mask
    return make(np.where(mask._data, dtype.type(0), dtype.type(-np.inf)))


def _as_batch(x: Any, lead: tuple[int, ...]) -> Any:
    """(*lead, rows, columns) as four dimensions, broadcast over `lead`."""
    if x.shape[:-2] != lead:
        x = expand(x, (*lead, *x.shape[-2:]))
    if len(lead) == 2:
        return x
    heads = lead[-1] if lead else 1
    return reshape(x, (-1 if lead else 1, heads, *x.shape[-2:]))


def scaled_dot_product_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """softmax(query @ key.T * scale + mask) @ value, of shapes (*, L, E), (*, S, E), (*, S, Ev).

    `attn_mask` (broadcast to (*, L, S)) is added, or where it is bool says what takes part; rows
    where nothing does give 0. `is_causal` hides later keys. `dropout_p` always applies: pass 0 when
    evaluating. `scale` is 1/sqrt(E) unless given.
    Source: torch.nn.functional.scaled_dot_product_attention.
    """
    _check(query, key, value, attn_mask)
    if has_part(query, key, value, attn_mask):
        attrs = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        inputs = (query, key, value, attn_mask)
        return elsewhere(_WHOLE, inputs, {**attrs, "enable_gqa": enable_gqa})
    if enable_gqa:
        key, value = _shared_heads(query, key, value)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    lead = _broadcast_lead(query, key, value)
    shape = (*lead, query.shape[-2], key.shape[-2])
    noise = noise_for(shape, query._data.dtype, dropout_p) if dropout_p else None
    mask = None
    if attn_mask is not None:
        mask = expand(_additive(attn_mask, query._data.dtype), shape)
    q, k, v = (_as_batch(x, lead) for x in (query, key, value))
    arguments = {
        "causal": is_causal, "scale": float(scale),
        "noise": None if noise is None else noise.reshape(*q.shape[:2], *shape[-2:]),
    }  # fmt: skip
    mask = None if mask is None else _as_batch(mask, lead)
    out = _attention(q, k, v, mask, **arguments)
    return out if len(lead) == 2 else reshape(out, (*lead, *out.shape[-2:]))


_WHOLE = Whole("scaled_dot_product_attention", scaled_dot_product_attention)


def _broadcast_lead(*tensors: Any) -> tuple[int, ...]:
    """The leading dimensions that all broadcast to; torch's sentence when they do not."""
    lead = np.broadcast_to(0.0, (*tensors[0].shape[:-2], 1, 1))
    for other in tensors[1:]:
        beside = np.broadcast_to(0.0, (*other.shape[:-2], 1, 1))
        try:
            lead = np.broadcast_to(0.0, np.broadcast_shapes(lead.shape, beside.shape))
        except ValueError as error:
            raise broadcast_error(lead, beside, error) from None
    return lead.shape[:-2]
