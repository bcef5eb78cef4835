"""Tests of dtrain.multiprocessing and of the notebook launcher."""
