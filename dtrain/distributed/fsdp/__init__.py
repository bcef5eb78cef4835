"""Fully sharded data parallel, at torch.distributed.fsdp's names and paths.

wrap.py chooses the modules of a tree that become units of their own.
"""
