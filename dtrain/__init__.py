"""A distributed training runtime that speaks the API of PyTorch, on NumPy and ZeroMQ.

`import dtrain as torch` gives torch's names. Sub-packages (`nn`, `optim`, `distributed`, ...)
load at their first use, so that importing dtrain stays cheap.
"""

from __future__ import annotations

import importlib
import warnings
from math import e as e, inf as inf, nan as nan, pi as pi
from typing import Any

from dtrain import (
    autograd as autograd,
    cuda as cuda,
    dtypes as dtypes,
    methods as methods,
    random as random,
)
from dtrain.autograd.grad_mode import (
    enable_grad as enable_grad,
    inference_mode as inference_mode,
    is_grad_enabled as is_grad_enabled,
    is_inference_mode_enabled as is_inference_mode_enabled,
    no_grad as no_grad,
    set_grad_enabled as set_grad_enabled,
)
from dtrain.device import (
    device as device,
    get_default_device as get_default_device,
    set_default_device as set_default_device,
)
from dtrain.dtypes import (
    bfloat16 as bfloat16,
    can_cast as can_cast,
    cdouble as cdouble,
    cfloat as cfloat,
    complex64 as complex64,
    complex128 as complex128,
    double as double,
    dtype as dtype,
    finfo as finfo,
    float16 as float16,
    float32 as float32,
    float64 as float64,
    get_default_dtype as get_default_dtype,
    half as half,
    iinfo as iinfo,
    int8 as int8,
    int16 as int16,
    int32 as int32,
    int64 as int64,
    long as long,
    promote_types as promote_types,
    set_default_dtype as set_default_dtype,
    short as short,
    uint8 as uint8,
    uint16 as uint16,
    uint32 as uint32,
    uint64 as uint64,
)
from dtrain.generator import (
    Generator as Generator,
)
from dtrain.heap import keep_freed_memory as _keep_freed_memory, use_huge_pages as _huge_pages
from dtrain.interop import (
    get_rng_state as get_rng_state,
    set_rng_state as set_rng_state,
)
from dtrain.legacy import (
    BFloat16Tensor as BFloat16Tensor,
    BoolTensor as BoolTensor,
    ByteTensor as ByteTensor,
    CharTensor as CharTensor,
    DoubleTensor as DoubleTensor,
    FloatTensor as FloatTensor,
    HalfTensor as HalfTensor,
    IntTensor as IntTensor,
    LongTensor as LongTensor,
    ShortTensor as ShortTensor,
)
from dtrain.missing import missing_name
from dtrain.ops.activation import (
    log_softmax as log_softmax,
    relu as relu,
    softmax as softmax,
)
from dtrain.ops.arithmetic import (
    add as add,
    addcdiv as addcdiv,
    addcmul as addcmul,
    atan2 as atan2,
    clamp as clamp,
    clamp_max as clamp_max,
    clamp_min as clamp_min,
    div as div,
    floor_divide as floor_divide,
    fmod as fmod,
    hypot as hypot,
    lerp as lerp,
    logaddexp as logaddexp,
    maximum as maximum,
    minimum as minimum,
    mul as mul,
    pow as pow,
    remainder as remainder,
    rsub as rsub,
    sub as sub,
    xlogy as xlogy,
)
from dtrain.ops.compare import (
    allclose as allclose,
    bitwise_and as bitwise_and,
    bitwise_left_shift as bitwise_left_shift,
    bitwise_not as bitwise_not,
    bitwise_or as bitwise_or,
    bitwise_right_shift as bitwise_right_shift,
    bitwise_xor as bitwise_xor,
    eq as eq,
    equal as equal,
    ge as ge,
    gt as gt,
    isclose as isclose,
    isfinite as isfinite,
    isinf as isinf,
    isnan as isnan,
    isneginf as isneginf,
    isposinf as isposinf,
    le as le,
    logical_and as logical_and,
    logical_not as logical_not,
    logical_or as logical_or,
    logical_xor as logical_xor,
    lt as lt,
    ne as ne,
    signbit as signbit,
    where as where,
)
from dtrain.ops.create import (
    arange as arange,
    as_tensor as as_tensor,
    empty as empty,
    empty_like as empty_like,
    eye as eye,
    from_numpy as from_numpy,
    full as full,
    full_like as full_like,
    is_tensor as is_tensor,
    linspace as linspace,
    logspace as logspace,
    meshgrid as meshgrid,
    ones as ones,
    ones_like as ones_like,
    scalar_tensor as scalar_tensor,
    tensor as tensor,
    zeros as zeros,
    zeros_like as zeros_like,
)
from dtrain.ops.einsum import (
    einsum as einsum,
)
from dtrain.ops.elementwise import (
    abs as abs,
    acos as acos,
    acosh as acosh,
    asin as asin,
    asinh as asinh,
    atan as atan,
    atanh as atanh,
    ceil as ceil,
    cos as cos,
    cosh as cosh,
    deg2rad as deg2rad,
    exp as exp,
    exp2 as exp2,
    expm1 as expm1,
    floor as floor,
    frac as frac,
    log as log,
    log1p as log1p,
    log2 as log2,
    log10 as log10,
    logit as logit,
    nan_to_num as nan_to_num,
    neg as neg,
    positive as positive,
    rad2deg as rad2deg,
    reciprocal as reciprocal,
    round as round,
    rsqrt as rsqrt,
    sigmoid as sigmoid,
    sign as sign,
    sin as sin,
    sinh as sinh,
    sqrt as sqrt,
    square as square,
    tan as tan,
    tanh as tanh,
    trunc as trunc,
)
from dtrain.ops.gather import (
    argwhere as argwhere,
    gather as gather,
    index_add as index_add,
    index_copy as index_copy,
    index_fill as index_fill,
    index_select as index_select,
    masked_fill as masked_fill,
    masked_select as masked_select,
    nonzero as nonzero,
    scatter as scatter,
    scatter_add as scatter_add,
    take as take,
    take_along_dim as take_along_dim,
)
from dtrain.ops.join import (
    atleast_1d as atleast_1d,
    atleast_2d as atleast_2d,
    atleast_3d as atleast_3d,
    cat as cat,
    chunk as chunk,
    column_stack as column_stack,
    dstack as dstack,
    hstack as hstack,
    narrow as narrow,
    select as select,
    split as split,
    stack as stack,
    tensor_split as tensor_split,
    unbind as unbind,
    vstack as vstack,
)
from dtrain.ops.linalg import (
    addmm as addmm,
    addmv as addmv,
    addr as addr,
    baddbmm as baddbmm,
    bmm as bmm,
    diag as diag,
    diag_embed as diag_embed,
    diagonal as diagonal,
    dot as dot,
    inner as inner,
    matmul as matmul,
    mm as mm,
    mv as mv,
    outer as outer,
    tensordot as tensordot,
    trace as trace,
)
from dtrain.ops.order import (
    clone as clone,
    flip as flip,
    fliplr as fliplr,
    flipud as flipud,
    repeat_interleave as repeat_interleave,
    roll as roll,
    tile as tile,
    tril as tril,
    tril_indices as tril_indices,
    triu as triu,
    triu_indices as triu_indices,
)
from dtrain.ops.random import (
    bernoulli as bernoulli,
    multinomial as multinomial,
    normal as normal,
    rand as rand,
    rand_like as rand_like,
    randint as randint,
    randn as randn,
    randn_like as randn_like,
    randperm as randperm,
)
from dtrain.ops.reduce import (
    all as all,
    amax as amax,
    amin as amin,
    aminmax as aminmax,
    any as any,
    argmax as argmax,
    argmin as argmin,
    count_nonzero as count_nonzero,
    logsumexp as logsumexp,
    max as max,
    mean as mean,
    min as min,
    nansum as nansum,
    norm as norm,
    prod as prod,
    std as std,
    std_mean as std_mean,
    sum as sum,
    var as var,
    var_mean as var_mean,
)
from dtrain.ops.scan import (
    cummax as cummax,
    cummin as cummin,
    cumprod as cumprod,
    cumsum as cumsum,
    diff as diff,
)
from dtrain.ops.shape import (
    broadcast_shapes as broadcast_shapes,
    broadcast_tensors as broadcast_tensors,
    broadcast_to as broadcast_to,
    flatten as flatten,
    movedim as movedim,
    numel as numel,
    permute as permute,
    ravel as ravel,
    reshape as reshape,
    squeeze as squeeze,
    t as t,
    transpose as transpose,
    unflatten as unflatten,
    unsqueeze as unsqueeze,
)
from dtrain.ops.sorting import (
    argsort as argsort,
    bincount as bincount,
    bucketize as bucketize,
    isin as isin,
    kthvalue as kthvalue,
    median as median,
    searchsorted as searchsorted,
    sort as sort,
    topk as topk,
    unique as unique,
    unique_consecutive as unique_consecutive,
)
from dtrain.ops.special import (
    erf as erf,
)
from dtrain.printing import (
    get_printoptions as get_printoptions,
    set_printoptions as set_printoptions,
)
from dtrain.random import (
    initial_seed as initial_seed,
    manual_seed as manual_seed,
    seed as seed,
)
from dtrain.tensor import (
    Size as Size,
    Tensor as Tensor,
)
from dtrain.threads import (
    get_num_threads as get_num_threads,
    set_num_threads as set_num_threads,
)
from dtrain.version import (
    __version__ as __version__,
)

# Other names torch has for the same things.
absolute = abs
arccos = acos
arcsin = asin
arctan = atan
arctan2 = atan2
asarray = as_tensor
bool = dtypes.bool_
clip = clamp
concat = cat
concatenate = cat
divide = div
fix = trunc
float = dtypes.float_
greater = gt
greater_equal = ge
int = dtypes.int_
less = lt
less_equal = le
moveaxis = movedim
multiply = mul
negative = neg
not_equal = ne
row_stack = vstack
subtract = sub
swapaxes = transpose
swapdims = transpose
true_divide = div

# NumPy warns of overflow, 0/0 and log(0); here, as in torch, inf and nan are values.
warnings.filterwarnings(
    "ignore", category=RuntimeWarning, module=r"dtrain\.(autograd|ops|nn|optim)\b"
)

if _keep_freed_memory():
    _huge_pages()

_LAZY = frozenset(  # sub-packages
    (
        "distributed",
        "elastic",
        "futures",
        "multiprocessing",
        "nn",
        "optim",
        "profiler",
        "serialization",
        "testing",
        "utils",
    )
)
_LAZY_NAMES = {"save": "serialization", "load": "serialization"}
_LAZY_NAMES["notebook_launcher"] = "multiprocessing.notebook"


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"dtrain.{name}")
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(f"dtrain.{_LAZY_NAMES[name]}"), name)
    raise missing_name("dtrain", name, __dir__)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_NAMES})
