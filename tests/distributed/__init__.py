"""Tests of the bridge: tensors over the communication tower; ranks are threads of one process."""
