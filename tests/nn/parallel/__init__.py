"""Tests of `dtrain.nn.parallel`: DistributedDataParallel."""
