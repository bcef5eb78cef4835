"""Tests of the communication tower: ranks are threads unless a test needs real processes."""
