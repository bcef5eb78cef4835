"""Process groups and collectives under torch.distributed's names: the bridge between the towers.

groups.py joins and leaves, world.py knows who is who, collectives.py, point_to_point.py and
objects.py move tensors and objects. The work itself is done by `dtrain.comm` on NumPy arrays.
What few programs need is loaded when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from dtrain.comm.reduce import (
    ReduceOp as ReduceOp,
)
from dtrain.comm.work import (
    Future as Future,
)
from dtrain.distributed.backend import (
    Backend as Backend,
    BackendConfig as BackendConfig,
    get_default_backend_for_device as get_default_backend_for_device,
    is_backend_available as is_backend_available,
    is_gloo_available as is_gloo_available,
    is_mpi_available as is_mpi_available,
    is_nccl_available as is_nccl_available,
    is_ucc_available as is_ucc_available,
    is_xccl_available as is_xccl_available,
)
from dtrain.distributed.coalescing import (
    _coalescing_manager as _coalescing_manager,
    all_gather_coalesced as all_gather_coalesced,
    all_reduce_coalesced as all_reduce_coalesced,
)
from dtrain.distributed.collectives import (
    _all_gather_base as _all_gather_base,
    _reduce_scatter_base as _reduce_scatter_base,
    all_gather as all_gather,
    all_gather_into_tensor as all_gather_into_tensor,
    all_gather_single as all_gather_single,
    all_reduce as all_reduce,
    all_to_all as all_to_all,
    all_to_all_single as all_to_all_single,
    barrier as barrier,
    broadcast as broadcast,
    empty as empty,
    gather as gather,
    gather_into_tensor as gather_into_tensor,
    gather_single as gather_single,
    monitored_barrier as monitored_barrier,
    reduce as reduce,
    reduce_scatter as reduce_scatter,
    reduce_scatter_single as reduce_scatter_single,
    reduce_scatter_tensor as reduce_scatter_tensor,
    scatter as scatter,
)
from dtrain.distributed.constants import (
    default_pg_timeout as default_pg_timeout,
)
from dtrain.distributed.debugging import (
    DebugLevel as DebugLevel,
    breakpoint as breakpoint,
    get_debug_level as get_debug_level,
    set_debug_level as set_debug_level,
    set_debug_level_from_env as set_debug_level_from_env,
    statistics as statistics,
)
from dtrain.distributed.grad_bucket import (
    BuiltinCommHookType as BuiltinCommHookType,
    GradBucket as GradBucket,
)
from dtrain.distributed.groups import (
    destroy_process_group as destroy_process_group,
    get_backend as get_backend,
    get_backend_config as get_backend_config,
    get_global_rank as get_global_rank,
    get_group_rank as get_group_rank,
    get_node_local_rank as get_node_local_rank,
    get_pg_count as get_pg_count,
    get_process_group_ranks as get_process_group_ranks,
    get_rank as get_rank,
    get_world_size as get_world_size,
    init_process_group as init_process_group,
    is_available as is_available,
    is_dtrun_launched as is_dtrun_launched,
    is_initialized as is_initialized,
    is_torchelastic_launched as is_torchelastic_launched,
    new_group as new_group,
    set_timeout as set_timeout,
)
from dtrain.distributed.hooks import (
    PostHookArgs as PostHookArgs,
    PreHookArgs as PreHookArgs,
)
from dtrain.distributed.notice import (
    request_stop as request_stop,
    should_stop as should_stop,
)
from dtrain.distributed.objects import (
    all_gather_object as all_gather_object,
    allow_pickle as allow_pickle,
    broadcast_object_list as broadcast_object_list,
    gather_object as gather_object,
    recv_object_list as recv_object_list,
    scatter_object_list as scatter_object_list,
    send_object_list as send_object_list,
)
from dtrain.distributed.point_to_point import (
    P2POp as P2POp,
    batch_isend_irecv as batch_isend_irecv,
    irecv as irecv,
    isend as isend,
    recv as recv,
    send as send,
)
from dtrain.distributed.rendezvous import (
    register_rendezvous_handler as register_rendezvous_handler,
    rendezvous as rendezvous,
)
from dtrain.distributed.sections import (
    rank0_first as rank0_first,
    rank0_section as rank0_section,
)
from dtrain.distributed.stores import (
    FakeStore as FakeStore,
    FileStore as FileStore,
    HashStore as HashStore,
    PrefixStore as PrefixStore,
    Store as Store,
    TCPStore as TCPStore,
)
from dtrain.distributed.subgroups import (
    SHRINK_ABORT as SHRINK_ABORT,
    SHRINK_DEFAULT as SHRINK_DEFAULT,
    new_subgroups as new_subgroups,
    new_subgroups_by_enumeration as new_subgroups_by_enumeration,
    shrink_group as shrink_group,
    split_group as split_group,
)
from dtrain.distributed.work import (
    Work as Work,
)
from dtrain.distributed.world import (
    GroupMember as GroupMember,
    ProcessGroup as ProcessGroup,
    group as group,
)
from dtrain.errors import (
    DistBackendError as DistBackendError,
    DistError as DistError,
    DistNetworkError as DistNetworkError,
    DistStoreError as DistStoreError,
    QueueEmptyError as QueueEmptyError,
)

_LAZY = (
    "_functional_collectives",
    "algorithms",
    "autograd",
    "checkpoint",
    "device_mesh",
    "distributed_c10d",
    "elastic",
    "fsdp",
    "nn",
    "optim",
    "pipelining",
    "rpc",
    "tensor",
)
_LAZY_NAMES = ("DeviceMesh", "init_device_mesh")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"dtrain.distributed.{name}")
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module("dtrain.distributed.device_mesh"), name)
    raise AttributeError(f"module 'dtrain.distributed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_NAMES})
