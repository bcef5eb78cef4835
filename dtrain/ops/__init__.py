"""The operations of dtrain, one file per family, each a list of `define(...)` statements.

Public functions have torch's names and argument order. Every one works on Tensors and on plain
arrays: gradient rules are written with them, and run on either.
"""
