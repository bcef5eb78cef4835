"""What holds where nothing else is said: the constants of torch.distributed.rpc.constants.

Owns: default timeouts (in seconds), place to meet and number of threads; the mark of a timeout that
was not given.
"""

DEFAULT_INIT_METHOD = "env://"
DEFAULT_NUM_WORKER_THREADS = 16
DEFAULT_RPC_TIMEOUT_SEC = 60.0
DEFAULT_SHUTDOWN_TIMEOUT = 0.0  # for ever
UNSET_RPC_TIMEOUT = -1.0
