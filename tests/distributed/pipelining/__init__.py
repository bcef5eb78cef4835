"""Tests of dtrain.distributed.pipelining."""
