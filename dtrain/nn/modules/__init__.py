"""The modules of dtrain.nn, in files with torch's names.

`dtrain.nn` shows all of them under `nn.<name>`; pickles and scripts name the files here. What is
listed here is all there is: a new module is added to its file and to this list.
"""

from __future__ import annotations

from dtrain.nn.modules.activation import (
    ELU,
    GELU,
    GLU,
    Hardtanh,
    LeakyReLU,
    LogSigmoid,
    LogSoftmax,
    PReLU,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from dtrain.nn.modules.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from dtrain.nn.modules.container import (
    ModuleDict,
    ModuleList,
    ParameterDict,
    ParameterList,
    Sequential,
)
from dtrain.nn.modules.conv import Conv1d, Conv2d
from dtrain.nn.modules.dropout import Dropout
from dtrain.nn.modules.flatten import Flatten, Unflatten
from dtrain.nn.modules.linear import Identity, Linear
from dtrain.nn.modules.loss import (
    BCELoss,
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    L1Loss,
    MSELoss,
    NLLLoss,
    SmoothL1Loss,
)
from dtrain.nn.modules.module import Module
from dtrain.nn.modules.normalization import GroupNorm, LayerNorm, RMSNorm
from dtrain.nn.modules.pooling import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from dtrain.nn.modules.sparse import Embedding

__all__ = [
    "ELU",
    "GELU",
    "GLU",
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BCELoss",
    "BCEWithLogitsLoss",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "Flatten",
    "GroupNorm",
    "Hardtanh",
    "Identity",
    "L1Loss",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LogSigmoid",
    "LogSoftmax",
    "MSELoss",
    "MaxPool2d",
    "Module",
    "ModuleDict",
    "ModuleList",
    "NLLLoss",
    "PReLU",
    "ParameterDict",
    "ParameterList",
    "RMSNorm",
    "ReLU",
    "ReLU6",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "SmoothL1Loss",
    "Softmax",
    "Softplus",
    "Tanh",
    "Unflatten",
]
