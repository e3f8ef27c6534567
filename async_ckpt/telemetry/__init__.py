"""What is told of the work while it goes on: what events add up to, and how long nothing has moved."""
