"""Tests of dtrain.distributed.checkpoint."""
