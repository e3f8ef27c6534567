"""What happens behind a call: requests come in, wait their turn, run on one loop thread, and end once."""
