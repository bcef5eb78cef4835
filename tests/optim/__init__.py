"""Tests of dtrain.optim."""
