"""Writing a checkpoint: from a snapshot to the bytes of its file, by reference."""
