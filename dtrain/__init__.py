"""A distributed training runtime that speaks the API of PyTorch, on NumPy and ZeroMQ.

`import dtrain as torch` gives torch's names. Sub-packages (`nn`, `optim`, `distributed`, ...)
load at their first use, so that importing dtrain stays cheap.
"""

from __future__ import annotations

import importlib
import warnings
from math import e as e
from math import inf as inf
from math import nan as nan
from math import pi as pi
from typing import Any

from dtrain import autograd as autograd
from dtrain import cuda as cuda
from dtrain import dtypes as dtypes
from dtrain import random as random
from dtrain.autograd.grad_mode import (
    enable_grad as enable_grad,
)
from dtrain.autograd.grad_mode import (
    inference_mode as inference_mode,
)
from dtrain.autograd.grad_mode import (
    is_grad_enabled as is_grad_enabled,
)
from dtrain.autograd.grad_mode import (
    is_inference_mode_enabled as is_inference_mode_enabled,
)
from dtrain.autograd.grad_mode import (
    no_grad as no_grad,
)
from dtrain.autograd.grad_mode import (
    set_grad_enabled as set_grad_enabled,
)
from dtrain.device import (
    device as device,
)
from dtrain.dtypes import (
    bfloat16 as bfloat16,
)
from dtrain.dtypes import (
    bool_ as bool,
)
from dtrain.dtypes import (
    can_cast as can_cast,
)
from dtrain.dtypes import (
    cdouble as cdouble,
)
from dtrain.dtypes import (
    cfloat as cfloat,
)
from dtrain.dtypes import (
    complex64 as complex64,
)
from dtrain.dtypes import (
    complex128 as complex128,
)
from dtrain.dtypes import (
    double as double,
)
from dtrain.dtypes import (
    dtype as dtype,
)
from dtrain.dtypes import (
    finfo as finfo,
)
from dtrain.dtypes import (
    float16 as float16,
)
from dtrain.dtypes import (
    float32 as float32,
)
from dtrain.dtypes import (
    float64 as float64,
)
from dtrain.dtypes import (
    float_ as float,
)
from dtrain.dtypes import (
    get_default_dtype as get_default_dtype,
)
from dtrain.dtypes import (
    half as half,
)
from dtrain.dtypes import (
    iinfo as iinfo,
)
from dtrain.dtypes import (
    int8 as int8,
)
from dtrain.dtypes import (
    int16 as int16,
)
from dtrain.dtypes import (
    int32 as int32,
)
from dtrain.dtypes import (
    int64 as int64,
)
from dtrain.dtypes import (
    int_ as int,
)
from dtrain.dtypes import (
    long as long,
)
from dtrain.dtypes import (
    promote_types as promote_types,
)
from dtrain.dtypes import (
    set_default_dtype as set_default_dtype,
)
from dtrain.dtypes import (
    short as short,
)
from dtrain.dtypes import (
    uint8 as uint8,
)
from dtrain.dtypes import (
    uint16 as uint16,
)
from dtrain.dtypes import (
    uint32 as uint32,
)
from dtrain.dtypes import (
    uint64 as uint64,
)
from dtrain.generator import (
    Generator as Generator,
)
from dtrain.methods import (
    add as add,
)
from dtrain.methods import (
    addcdiv as addcdiv,
)
from dtrain.methods import (
    addcmul as addcmul,
)
from dtrain.methods import (
    sub as sub,
)
from dtrain.methods import (
    true_divide as div,
)
from dtrain.methods import (
    true_divide as true_divide,
)
from dtrain.ops.activation import (
    log_softmax as log_softmax,
)
from dtrain.ops.activation import (
    relu as relu,
)
from dtrain.ops.activation import (
    softmax as softmax,
)
from dtrain.ops.create import (
    arange as arange,
)
from dtrain.ops.create import (
    as_tensor as as_tensor,
)
from dtrain.ops.create import (
    empty as empty,
)
from dtrain.ops.create import (
    empty_like as empty_like,
)
from dtrain.ops.create import (
    eye as eye,
)
from dtrain.ops.create import (
    from_numpy as from_numpy,
)
from dtrain.ops.create import (
    full as full,
)
from dtrain.ops.create import (
    full_like as full_like,
)
from dtrain.ops.create import (
    linspace as linspace,
)
from dtrain.ops.create import (
    meshgrid as meshgrid,
)
from dtrain.ops.create import (
    ones as ones,
)
from dtrain.ops.create import (
    ones_like as ones_like,
)
from dtrain.ops.create import (
    tensor as tensor,
)
from dtrain.ops.create import (
    zeros as zeros,
)
from dtrain.ops.create import (
    zeros_like as zeros_like,
)
from dtrain.ops.elementwise import (
    abs as abs,
)
from dtrain.ops.elementwise import (
    atan as atan,
)
from dtrain.ops.elementwise import (
    atan2 as atan2,
)
from dtrain.ops.elementwise import (
    bitwise_and as bitwise_and,
)
from dtrain.ops.elementwise import (
    bitwise_not as bitwise_not,
)
from dtrain.ops.elementwise import (
    bitwise_or as bitwise_or,
)
from dtrain.ops.elementwise import (
    bitwise_xor as bitwise_xor,
)
from dtrain.ops.elementwise import (
    ceil as ceil,
)
from dtrain.ops.elementwise import (
    clamp as clamp,
)
from dtrain.ops.elementwise import (
    clamp as clip,
)
from dtrain.ops.elementwise import (
    cos as cos,
)
from dtrain.ops.elementwise import (
    cosh as cosh,
)
from dtrain.ops.elementwise import (
    eq as eq,
)
from dtrain.ops.elementwise import (
    exp as exp,
)
from dtrain.ops.elementwise import (
    expm1 as expm1,
)
from dtrain.ops.elementwise import (
    floor as floor,
)
from dtrain.ops.elementwise import (
    floor_divide as floor_divide,
)
from dtrain.ops.elementwise import (
    fmod as fmod,
)
from dtrain.ops.elementwise import (
    ge as ge,
)
from dtrain.ops.elementwise import (
    gt as gt,
)
from dtrain.ops.elementwise import (
    isfinite as isfinite,
)
from dtrain.ops.elementwise import (
    isinf as isinf,
)
from dtrain.ops.elementwise import (
    isnan as isnan,
)
from dtrain.ops.elementwise import (
    le as le,
)
from dtrain.ops.elementwise import (
    lerp as lerp,
)
from dtrain.ops.elementwise import (
    log as log,
)
from dtrain.ops.elementwise import (
    log1p as log1p,
)
from dtrain.ops.elementwise import (
    log2 as log2,
)
from dtrain.ops.elementwise import (
    log10 as log10,
)
from dtrain.ops.elementwise import (
    logical_and as logical_and,
)
from dtrain.ops.elementwise import (
    logical_not as logical_not,
)
from dtrain.ops.elementwise import (
    logical_or as logical_or,
)
from dtrain.ops.elementwise import (
    logical_xor as logical_xor,
)
from dtrain.ops.elementwise import (
    lt as lt,
)
from dtrain.ops.elementwise import (
    maximum as maximum,
)
from dtrain.ops.elementwise import (
    minimum as minimum,
)
from dtrain.ops.elementwise import (
    mul as mul,
)
from dtrain.ops.elementwise import (
    mul as multiply,
)
from dtrain.ops.elementwise import (
    ne as ne,
)
from dtrain.ops.elementwise import (
    neg as neg,
)
from dtrain.ops.elementwise import (
    pow as pow,
)
from dtrain.ops.elementwise import (
    reciprocal as reciprocal,
)
from dtrain.ops.elementwise import (
    remainder as remainder,
)
from dtrain.ops.elementwise import (
    round as round,
)
from dtrain.ops.elementwise import (
    rsqrt as rsqrt,
)
from dtrain.ops.elementwise import (
    sigmoid as sigmoid,
)
from dtrain.ops.elementwise import (
    sign as sign,
)
from dtrain.ops.elementwise import (
    sin as sin,
)
from dtrain.ops.elementwise import (
    sinh as sinh,
)
from dtrain.ops.elementwise import (
    sqrt as sqrt,
)
from dtrain.ops.elementwise import (
    square as square,
)
from dtrain.ops.elementwise import (
    tan as tan,
)
from dtrain.ops.elementwise import (
    tanh as tanh,
)
from dtrain.ops.elementwise import (
    trunc as trunc,
)
from dtrain.ops.elementwise import (
    where as where,
)
from dtrain.ops.index import (
    gather as gather,
)
from dtrain.ops.index import (
    index_select as index_select,
)
from dtrain.ops.index import (
    masked_fill as masked_fill,
)
from dtrain.ops.index import (
    masked_select as masked_select,
)
from dtrain.ops.index import (
    scatter as scatter,
)
from dtrain.ops.index import (
    scatter_add as scatter_add,
)
from dtrain.ops.index import (
    take_along_dim as take_along_dim,
)
from dtrain.ops.linalg import (
    addmm as addmm,
)
from dtrain.ops.linalg import (
    bmm as bmm,
)
from dtrain.ops.linalg import (
    diagonal as diagonal,
)
from dtrain.ops.linalg import (
    dot as dot,
)
from dtrain.ops.linalg import (
    einsum as einsum,
)
from dtrain.ops.linalg import (
    matmul as matmul,
)
from dtrain.ops.linalg import (
    mm as mm,
)
from dtrain.ops.linalg import (
    mv as mv,
)
from dtrain.ops.linalg import (
    numel as numel,
)
from dtrain.ops.linalg import (
    outer as outer,
)
from dtrain.ops.random import (
    bernoulli as bernoulli,
)
from dtrain.ops.random import (
    multinomial as multinomial,
)
from dtrain.ops.random import (
    normal as normal,
)
from dtrain.ops.random import (
    rand as rand,
)
from dtrain.ops.random import (
    rand_like as rand_like,
)
from dtrain.ops.random import (
    randint as randint,
)
from dtrain.ops.random import (
    randn as randn,
)
from dtrain.ops.random import (
    randn_like as randn_like,
)
from dtrain.ops.random import (
    randperm as randperm,
)
from dtrain.ops.reduce import (
    all as all,
)
from dtrain.ops.reduce import (
    amax as amax,
)
from dtrain.ops.reduce import (
    amin as amin,
)
from dtrain.ops.reduce import (
    any as any,
)
from dtrain.ops.reduce import (
    argmax as argmax,
)
from dtrain.ops.reduce import (
    argmin as argmin,
)
from dtrain.ops.reduce import (
    count_nonzero as count_nonzero,
)
from dtrain.ops.reduce import (
    cumprod as cumprod,
)
from dtrain.ops.reduce import (
    cumsum as cumsum,
)
from dtrain.ops.reduce import (
    logsumexp as logsumexp,
)
from dtrain.ops.reduce import (
    max as max,
)
from dtrain.ops.reduce import (
    mean as mean,
)
from dtrain.ops.reduce import (
    min as min,
)
from dtrain.ops.reduce import (
    norm as norm,
)
from dtrain.ops.reduce import (
    prod as prod,
)
from dtrain.ops.reduce import (
    std as std,
)
from dtrain.ops.reduce import (
    sum as sum,
)
from dtrain.ops.reduce import (
    var as var,
)
from dtrain.ops.shape import (
    broadcast_to as broadcast_to,
)
from dtrain.ops.shape import (
    cat as cat,
)
from dtrain.ops.shape import (
    chunk as chunk,
)
from dtrain.ops.shape import (
    clone as clone,
)
from dtrain.ops.shape import (
    flatten as flatten,
)
from dtrain.ops.shape import (
    flip as flip,
)
from dtrain.ops.shape import (
    movedim as movedim,
)
from dtrain.ops.shape import (
    narrow as narrow,
)
from dtrain.ops.shape import (
    permute as permute,
)
from dtrain.ops.shape import (
    reshape as reshape,
)
from dtrain.ops.shape import (
    roll as roll,
)
from dtrain.ops.shape import (
    split as split,
)
from dtrain.ops.shape import (
    squeeze as squeeze,
)
from dtrain.ops.shape import (
    stack as stack,
)
from dtrain.ops.shape import (
    t as t,
)
from dtrain.ops.shape import (
    transpose as transpose,
)
from dtrain.ops.shape import (
    tril as tril,
)
from dtrain.ops.shape import (
    triu as triu,
)
from dtrain.ops.shape import (
    unbind as unbind,
)
from dtrain.ops.shape import (
    unflatten as unflatten,
)
from dtrain.ops.shape import (
    unsqueeze as unsqueeze,
)
from dtrain.ops.sorting import (
    argsort as argsort,
)
from dtrain.ops.sorting import (
    sort as sort,
)
from dtrain.ops.sorting import (
    topk as topk,
)
from dtrain.ops.sorting import (
    unique as unique,
)
from dtrain.random import (
    get_rng_state as get_rng_state,
)
from dtrain.random import (
    initial_seed as initial_seed,
)
from dtrain.random import (
    manual_seed as manual_seed,
)
from dtrain.random import (
    seed as seed,
)
from dtrain.random import (
    set_rng_state as set_rng_state,
)
from dtrain.tensor import (
    Size as Size,
)
from dtrain.tensor import (
    Tensor as Tensor,
)
from dtrain.threads import (
    get_num_threads as get_num_threads,
)
from dtrain.threads import (
    set_num_threads as set_num_threads,
)
from dtrain.version import (
    __version__ as __version__,
)

# NumPy warns of overflow, 0/0 and log(0); here, as in torch, inf and nan are values.
warnings.filterwarnings(
    "ignore", category=RuntimeWarning, module=r"dtrain\.(autograd|ops|nn|optim)\b"
)

_LAZY = frozenset(
    ("distributed", "nn", "optim", "serialization", "testing", "utils")
)  # sub-packages
_LAZY_NAMES = {"save": "serialization", "load": "serialization"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"dtrain.{name}")
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(f"dtrain.{_LAZY_NAMES[name]}"), name)
    raise AttributeError(
        f"module 'dtrain' has no attribute {name!r}: dtrain does not have it (yet)"
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_NAMES})
