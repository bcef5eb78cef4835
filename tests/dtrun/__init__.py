"""Tests of the launcher: pure parts by themselves, processes and signals for real."""
