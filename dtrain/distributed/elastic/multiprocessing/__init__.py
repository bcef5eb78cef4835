"""Errors of ranks, at torch.distributed.elastic.multiprocessing's path; the rest of it is dtrun's.

`errors` has `record` and `ChildFailedError`.
"""
