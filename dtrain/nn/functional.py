"""torch.nn.functional: the functions behind the modules, with torch's signatures and defaults.

Rules: what is an op is defined in `dtrain.ops` and only named here; this file adds the options that
are torch's alone (`inplace`, `training`, the deprecated `size_average` and `reduce`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dtrain.dtypes import dtype as _dtype
from dtrain.ops import (
    activation,
    dropout as _dropouts,
    loss as _losses,
    pointwise_loss as _pointwise,
    pool as _pool,
)
from dtrain.ops.activation import (
    glu as glu,
    logsigmoid as logsigmoid,
    prelu as prelu,
    softplus as softplus,
)
from dtrain.ops.attention import scaled_dot_product_attention as scaled_dot_product_attention
from dtrain.ops.conv import (
    conv1d as conv1d,
    conv2d as conv2d,
    conv_transpose1d as conv_transpose1d,
    conv_transpose2d as conv_transpose2d,
)
from dtrain.ops.elementwise import sigmoid as _sigmoid, tanh as _tanh
from dtrain.ops.embedding import embedding as _embedding, one_hot as one_hot
from dtrain.ops.gelu import gelu as gelu, silu as _silu
from dtrain.ops.image import (
    fold as fold,
    interpolate as interpolate,
    pad as pad,
    unfold as unfold,
)
from dtrain.ops.inplace import update
from dtrain.ops.linalg import linear as linear
from dtrain.ops.norm import (
    batch_norm as batch_norm,
    group_norm as group_norm,
    layer_norm as layer_norm,
    rms_norm as rms_norm,
)
from dtrain.ops.pointwise_loss import (
    cosine_similarity as cosine_similarity,
    gaussian_nll_loss as gaussian_nll_loss,
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


def sigmoid(input: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return _sigmoid(input)


def tanh(input: Any) -> Any:
    """The hyperbolic tangent."""
    return _tanh(input)


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


def threshold(input: Any, threshold: float, value: float, inplace: bool = False) -> Any:
    """x where x > `threshold`, else `value`."""
    return _applied(activation.threshold, input, inplace, threshold, value)


def selu(input: Any, inplace: bool = False) -> Any:
    """`elu` scaled so that activations keep mean 0 and variance 1."""
    return _applied(activation.selu, input, inplace)


def hardswish(input: Any, inplace: bool = False) -> Any:
    """x relu6(x + 3) / 6."""
    return _applied(activation.hardswish, input, inplace)


def hardsigmoid(input: Any, inplace: bool = False) -> Any:
    """relu6(x + 3) / 6."""
    return _applied(activation.hardsigmoid, input, inplace)


def mish(input: Any, inplace: bool = False) -> Any:
    """x tanh(softplus(x))."""
    return _applied(activation.mish, input, inplace)


def softmin(
    input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: _dtype | None = None
) -> Any:
    """`softmax` of -x along `dim`, which must be given."""
    return activation.softmax(-input, _given(dim, "softmin"), dtype=dtype)


# --- pooling -----------------------------------------------------------------------------------


def max_pool1d(
    input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    """The maximum of every window of ([N,] C, L), and with `return_indices` its place."""
    return _pool.max_pool(
        1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
    )


def max_pool2d(
    input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    """The maximum of every window of ([N,] C, H, W), and with `return_indices` its place in the
    flattened image (int64).
    """
    return _pool.max_pool(
        2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
    )


def avg_pool1d(
    input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Any:  # fmt: skip
    """The average of every window of ([N,] C, L)."""
    return _pool.avg_pool(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad)


def avg_pool2d(
    input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Any:  # fmt: skip
    """The average of every window of ([N,] C, H, W); padding counts as zeros or not at all."""
    return _pool.avg_pool(
        2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


def adaptive_avg_pool1d(input: Any, output_size: Any) -> Any:
    """Averages of ([N,] C, L) over `output_size` windows."""
    return _pool.adaptive_avg_pool(1, input, output_size)


def adaptive_avg_pool2d(input: Any, output_size: Any) -> Any:
    """Averages of ([N,] C, H, W) over `output_size` windows (an int or two; None: as the input)."""
    return _pool.adaptive_avg_pool(2, input, output_size)


# --- dropout -----------------------------------------------------------------------------------


def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Each element zero with probability p, else times 1 / (1 - p); nothing unless `training`."""
    return _applied(_dropouts.dropout, input, inplace, p, training)


def dropout1d(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """`dropout` of whole channels of ([N,] C, L)."""
    return _channel_dropout(1, input, p, training, inplace)


def dropout2d(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """`dropout` of whole channels of ([N,] C, H, W)."""
    return _channel_dropout(2, input, p, training, inplace)


def _channel_dropout(dims: int, input: Any, p: float, training: bool, inplace: bool) -> Any:
    if input.ndim == dims + 1:
        return _channel_dropout(dims, input.unsqueeze(0), p, training, inplace).squeeze(0)
    return _applied(_dropouts.feature_dropout, input, inplace, p, training)


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


def binary_cross_entropy(
    input: Any, target: Any, weight: Any = None, size_average: bool | None = None,
    reduce: bool | None = None, reduction: str = "mean",
) -> Any:  # fmt: skip
    """-(target log(input) + (1 - target) log(1 - input)), logarithms at least -100."""
    reduction = _reduction(reduction, size_average, reduce)
    return _pointwise.binary_cross_entropy(input, target, weight, reduction)


def binary_cross_entropy_with_logits(
    input: Any, target: Any, weight: Any = None, size_average: bool | None = None,
    reduce: bool | None = None, reduction: str = "mean", pos_weight: Any = None,
) -> Any:  # fmt: skip
    """`binary_cross_entropy` of sigmoid(input), without overflow."""
    reduction = _reduction(reduction, size_average, reduce)
    return _pointwise.binary_cross_entropy_with_logits(input, target, weight, reduction, pos_weight)


def mse_loss(
    input: Any, target: Any, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean", weight: Any = None,
) -> Any:  # fmt: skip
    """(input - target)^2."""
    return _pointwise.mse_loss(input, target, _reduction(reduction, size_average, reduce), weight)


def l1_loss(
    input: Any, target: Any, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean", weight: Any = None,
) -> Any:  # fmt: skip
    """|input - target|."""
    return _pointwise.l1_loss(input, target, _reduction(reduction, size_average, reduce), weight)


def smooth_l1_loss(
    input: Any, target: Any, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean", beta: float = 1.0,
) -> Any:  # fmt: skip
    """Squared below `beta`, absolute above."""
    reduction = _reduction(reduction, size_average, reduce)
    return _pointwise.smooth_l1_loss(input, target, reduction, beta)


def huber_loss(
    input: Any, target: Any, reduction: str = "mean", delta: float = 1.0, weight: Any = None
) -> Any:
    """Squared up to `delta`, absolute above, times `weight`."""
    return _pointwise.huber_loss(input, target, reduction, delta, weight)


def kl_div(
    input: Any, target: Any, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean", log_target: bool = False,
) -> Any:  # fmt: skip
    """target (log(target) - input) for log-probabilities `input`; see "batchmean" in torch."""
    reduction = _reduction(reduction, size_average, reduce)
    return _pointwise.kl_div(input, target, reduction, log_target)


def margin_ranking_loss(
    input1: Any, input2: Any, target: Any, margin: float = 0, size_average: bool | None = None,
    reduce: bool | None = None, reduction: str = "mean",
) -> Any:  # fmt: skip
    """max(0, -target (input1 - input2) + margin)."""
    reduction = _reduction(reduction, size_average, reduce)
    return _pointwise.margin_ranking_loss(input1, input2, target, margin, reduction)


def normalize(input: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Any:
    """Vectors along `dim` divided by their p-norm (at least `eps`), written to `out` if given."""
    result = _pointwise.normalize(input, p, dim, eps)
    return result if out is None else out.copy_(result)
