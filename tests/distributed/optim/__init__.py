"""Tests of dtrain.distributed.optim."""
