"""What is asked of the operating system and the interpreter; nothing here knows of checkpoints."""
