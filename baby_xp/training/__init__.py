"""Training: the pure step, the loop around it, evaluation, workers."""
