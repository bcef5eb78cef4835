"""Tests of dtrain.nn; cases.py and scenarios.py are run with PyTorch too, by tests/record_nn.py."""
