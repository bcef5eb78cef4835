"""Tests of dtrain.utils.data."""
