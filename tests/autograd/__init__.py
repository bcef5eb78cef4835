"""Tests of `dtrain.autograd`: engine, functions, modes, checks, views and changes in place."""
