"""Helpers around the operating system and the interpreter, which know nothing about checkpoints."""
