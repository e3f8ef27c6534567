"""Benchmarks: contestants in shuffled rounds, medians, ratios. They print and never fail on a time."""
