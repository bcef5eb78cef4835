"""Tests of whole runs: examples under dtrun, faults, start-up, golden losses."""
