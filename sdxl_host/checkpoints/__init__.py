"""A run's checkpoints: written, opened, and removed; the states of plugins in them."""
