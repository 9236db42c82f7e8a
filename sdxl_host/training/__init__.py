"""The training loop, its compiled step, and what watches it."""
