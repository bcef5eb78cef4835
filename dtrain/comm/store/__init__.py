"""Key-value stores through which ranks find each other.

`base.Store` says what each of them can do; `memory` serves threads of one process, `tcp` processes
anywhere, `file` processes that share a file system, and `prefix` gives out parts of another store.
"""
