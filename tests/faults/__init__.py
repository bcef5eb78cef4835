"""Tests in which something goes wrong on purpose: faults, scarce resources, seeded bugs."""
