"""A module that a block of changing_nets imports when it runs."""
FACTOR = 1.0
EXPONENT = 1.0
