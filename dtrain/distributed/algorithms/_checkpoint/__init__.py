"""Activation checkpointing of whole modules, at torch.distributed.algorithms._checkpoint's path.

checkpoint_wrapper.py has all of it; `dtrain.utils.checkpoint` is what it stands on.
"""
