"""Derived from events and progress: meters, traces, and time limits without progress."""
