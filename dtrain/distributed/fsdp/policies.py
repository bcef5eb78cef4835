"""What a user says about dtypes and memory: `MixedPrecisionPolicy`, `OffloadPolicy`.

Plain data. Source: torch.distributed.fsdp, _fully_shard/_fsdp_api.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.dtypes import dtype


@dataclass(frozen=True)
class MixedPrecisionPolicy:
    """Dtypes of floating parameters, gradients and results; None leaves one as it is.

    param_dtype    of whole parameters, hence of forward, backward and what is gathered.
    reduce_dtype   in which gradients are added; None: that of the whole parameters.
    output_dtype   to which floating results of forward are cast.
    cast_forward_inputs   whether floating inputs of forward are cast to `param_dtype`.

    Sharded parameters, their gradients and the optimizer keep the dtype that the model has.
    16-bit gradients travel as such also when they are added in float32.
    """

    param_dtype: dtype | None = None
    reduce_dtype: dtype | None = None
    output_dtype: dtype | None = None
    cast_forward_inputs: bool = True


@dataclass
class OffloadPolicy:
    """Nothing is offloaded."""


@dataclass
class CPUOffloadPolicy(OffloadPolicy):
    """Shards of parameters, their gradients and optimizer state are in files without names, in
    TMPDIR: the system writes out what memory has no room for. Whole units are gathered into memory,
    also on one host, and given back. `pin_memory` is accepted and changes nothing.
    """

    pin_memory: bool = True
