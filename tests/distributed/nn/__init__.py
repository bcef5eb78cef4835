"""Tests of the differentiable collectives."""
