"""Benchmarks: `python -m jliger.bench`."""
