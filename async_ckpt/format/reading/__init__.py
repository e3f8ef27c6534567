"""From the bytes of a file to a state: as much of them as is asked for."""
