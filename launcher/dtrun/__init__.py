"""dtrun: starts the ranks of a distributed program on this host, watches them, and ends them.

The whole contract with a worker is its environment (see `dtrun.spec`), its exit code and one error
file: any program can be a worker, and nothing here needs NumPy, ZeroMQ or dtrain. A flag that
cannot be honoured is refused; a process that was started is always ended.
"""
