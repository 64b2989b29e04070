"""Timing against stock, after a check of correctness: what the commands and `benchmarks/` share."""
