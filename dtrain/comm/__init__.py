"""The communication tower: process groups over NumPy arrays and bytes. Never a Tensor.

Start at `group.ProcessGroup`; the meaning of each collective is its `reference` in `collectives`.
Importing this package imports nothing: name the module that you need.
"""
