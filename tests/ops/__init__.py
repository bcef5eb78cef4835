"""Tests of `dtrain.ops` and of the functions that name them, `dtrain.nn.functional`."""
