"""Sharded checkpoints: a directory of many files, with a part of the state in each."""
