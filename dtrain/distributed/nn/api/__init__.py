"""Modules on other workers, at torch's path: see remote_module.py.

Source: torch.distributed.nn.api.
"""
