"""Helpers of elastic jobs, at torch.distributed.elastic.utils' names.

data/ has the sampler that goes on inside of an epoch.
"""
