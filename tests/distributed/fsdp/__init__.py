"""Tests of dtrain.distributed.fsdp."""
