"""Tests of `dtrain.distributed.rpc`: the books alone, ranks as threads, ranks as processes.

Functions that are called remotely stand at the top of the test modules, which are the program's.
"""
