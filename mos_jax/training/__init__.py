"""Training: configuration, step, loop, checkpoints, metrics."""
