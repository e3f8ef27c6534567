"""The tests of the conformance suite, by subject; ``conformance`` combines them."""
