"""Lightning's own tests, run as by a user of Lightning who has replaced the checkpoint plugin."""
