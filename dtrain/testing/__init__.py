"""Helpers for testing distributed code: worlds of ranks, leak checks, conformance checks.

`world.run_world` runs a function on ranks that are threads or processes; `leaks.check_leaks` shows what a block leaves
behind; `conformance` checks any store, transport or group against what all of them must do.
"""
