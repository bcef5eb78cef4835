"""Calls of functions on other workers, and references to values that live there.

api.py joins, calls and leaves; streams.py iterates over what is yielded elsewhere; agent.py is one
worker; ledger.py counts references; names.py says what may be called. Names and semantics are those
of torch.distributed.rpc; `export`, `stream`, `statistics`, `get_debug_info`, `RpcTimeout` and
`accept_code` are ours.
"""

from dtrain.distributed.rpc import functions as functions
from dtrain.distributed.rpc.api import (
    _get_debug_info as _get_debug_info,
    _set_rpc_timeout as _set_rpc_timeout,
    get_debug_info as get_debug_info,
    get_rpc_timeout as get_rpc_timeout,
    get_worker_info as get_worker_info,
    init_rpc as init_rpc,
    is_available as is_available,
    remote as remote,
    rpc_async as rpc_async,
    rpc_sync as rpc_sync,
    shutdown as shutdown,
    statistics as statistics,
)
from dtrain.distributed.rpc.failures import (
    RemoteError as RemoteError,
    RemoteTraceback as RemoteTraceback,
    RpcTimeout as RpcTimeout,
)
from dtrain.distributed.rpc.names import (
    export as export,
)
from dtrain.distributed.rpc.options import (
    BackendType as BackendType,
    RpcBackendOptions as RpcBackendOptions,
    TensorPipeRpcBackendOptions as TensorPipeRpcBackendOptions,
    WorkerInfo as WorkerInfo,
)
from dtrain.distributed.rpc.rref import (
    RRef as RRef,
)
from dtrain.distributed.rpc.streams import (
    Stream as Stream,
    stream as stream,
)
from dtrain.errors import (
    PeerLost as PeerLost,
)
