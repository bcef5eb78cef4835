"""Tests of dtrain.distributed.tensor."""
