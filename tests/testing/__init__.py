"""Tests of the helpers in `dtrain.testing`: each must catch what it is there to catch."""
