"""The disks of guests that move: what is done with each, and doing it."""
