"""Reading a checkpoint: from the bytes of a file to a state, or a part of it."""
