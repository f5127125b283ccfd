"""Measurements, apart from the tests: each program in this directory prints what it measured and how to repeat it."""
