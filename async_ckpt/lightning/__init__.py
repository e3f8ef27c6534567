"""What Lightning users hold; nothing in here is imported by the rest of the package."""
