"""torch.nn.functional: the functions behind the modules, with torch's signatures and defaults.

Rules: what is an op is defined in `dtrain.ops` and only named here; this file adds the options that
are torch's alone (`inplace`, `training`, the deprecated `size_average` and `reduce`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dtrain.dtypes import dtype as _dtype
from dtrain.ops import activation, dropout as _dropouts, loss as _losses
from dtrain.ops.activation import (
    glu as glu,
    logsigmoid as logsigmoid,
    prelu as prelu,
    softplus as softplus,
)
from dtrain.ops.attention import scaled_dot_product_attention as scaled_dot_product_attention
from dtrain.ops.elementwise import sigmoid as sigmoid, tanh as tanh
from dtrain.ops.gelu import gelu as gelu, silu as _silu
from dtrain.ops.index import embedding as _embedding, one_hot as one_hot
from dtrain.ops.inplace import update
from dtrain.ops.linalg import linear as linear
from dtrain.ops.norm import (
    batch_norm as batch_norm,
    group_norm as group_norm,
    layer_norm as layer_norm,
    rms_norm as rms_norm,
)


def _applied(
    function: Callable[..., Any], input: Any, inplace: bool, *args: Any, **kwargs: Any
) -> Any:
    """`function(input, ...)`, written into `input` when `inplace`."""
    if inplace:
        return update(input, function, *args, **kwargs)
    return function(input, *args, **kwargs)


# --- activations -------------------------------------------------------------------------------


def relu(input: Any, inplace: bool = False) -> Any:
    """max(x, 0)."""
    return _applied(activation.relu, input, inplace)


def relu6(input: Any, inplace: bool = False) -> Any:
    """x limited to [0, 6]."""
    return _applied(activation.hardtanh, input, inplace, 0.0, 6.0)


def leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    """x for x > 0, else `negative_slope` x."""
    return _applied(activation.leaky_relu, input, inplace, negative_slope)


def elu(input: Any, alpha: float = 1.0, inplace: bool = False) -> Any:
    """x for x > 0, else `alpha` (exp(x) - 1)."""
    return _applied(activation.elu, input, inplace, alpha)


def hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    """x limited to [min_val, max_val]; ValueError when they are in the wrong order."""
    return _applied(activation.hardtanh, input, inplace, min_val, max_val)


def silu(input: Any, inplace: bool = False) -> Any:
    """x sigmoid(x)."""
    return _applied(_silu, input, inplace)


def softmax(
    input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: _dtype | None = None
) -> Any:
    """exp(x) / sum(exp(x)) along `dim`, which must be given."""
    return activation.softmax(input, _given(dim, "softmax"), dtype=dtype)


def log_softmax(
    input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: _dtype | None = None
) -> Any:
    """log(softmax(x)) along `dim`, which must be given."""
    return activation.log_softmax(input, _given(dim, "log_softmax"), dtype=dtype)


def _given(dim: int | None, name: str) -> int:
    if dim is None:
        raise ValueError(
            f"Implicit dimension choice for {name} has been deprecated. Change the call to include "
            "dim=X as an argument."
        )
    return dim


# --- dropout -----------------------------------------------------------------------------------


def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Each element zero with probability p, else times 1 / (1 - p); nothing unless `training`."""
    return _applied(_dropouts.dropout, input, inplace, p, training)


# --- sparse ------------------------------------------------------------------------------------


def embedding(
    input: Any, weight: Any, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Any:  # fmt: skip
    """Rows of `weight` (rows, dim) picked by the integers in `input`: shape (*input, dim).

    `sparse` is accepted and ignored: gradients are dense. NotImplementedError for `max_norm` and
    `scale_grad_by_freq`.
    """
    if max_norm is not None or scale_grad_by_freq:
        raise NotImplementedError("embedding: max_norm and scale_grad_by_freq are not supported")
    return _embedding(input, weight, padding_idx)


# --- losses ------------------------------------------------------------------------------------


def _reduction(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    """What the deprecated flags say, when they are given."""
    if size_average is None and reduce is None:
        return reduction
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


def cross_entropy(
    input: Any, target: Any, weight: Any = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    """-log softmax(input)[target]: scores (C), (N, C) or (N, C, *), class indices (or, in the
    shape of `input`, class probabilities).
    """
    reduction = _reduction(reduction, size_average, reduce)
    return _losses.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)


def nll_loss(
    input: Any, target: Any, weight: Any = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
) -> Any:  # fmt: skip
    """-input[target]: log-probabilities (C), (N, C) or (N, C, *), class indices."""
    reduction = _reduction(reduction, size_average, reduce)
    return _losses.nll_loss(input, target, weight, ignore_index, reduction)
