"""Tests of dtrain.distributed.elastic."""
