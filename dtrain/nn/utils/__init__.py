"""Helpers around modules: gradient clipping and parameters as one vector.

Source: torch.nn.utils.
"""
