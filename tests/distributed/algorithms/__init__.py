"""Tests of dtrain.distributed.algorithms."""
