"""Tests of dtrain.utils."""
