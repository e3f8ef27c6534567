"""Stress and benchmarks: what unit tests cannot show. Not part of the installed package."""
