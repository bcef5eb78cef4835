"""Helpers around modules: gradient clipping, parameters as one vector, no first values.

Source: torch.nn.utils.
"""

from __future__ import annotations

from dtrain.nn.utils.clip_grad import (
    clip_grad_norm_ as clip_grad_norm_,
    clip_grad_value_ as clip_grad_value_,
    clip_grads_with_norm_ as clip_grads_with_norm_,
    get_total_norm as get_total_norm,
)
from dtrain.nn.utils.convert_parameters import (
    parameters_to_vector as parameters_to_vector,
    vector_to_parameters as vector_to_parameters,
)
from dtrain.nn.utils.init import (
    skip_init as skip_init,
)
