"""Benchmarks of `ssa` beside dense attention: `python -m benchmarks.run` makes the whole table."""
