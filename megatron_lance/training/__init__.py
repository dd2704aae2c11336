"""Training: setup, step, loop and the command line entry."""
