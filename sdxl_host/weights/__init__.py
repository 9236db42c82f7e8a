"""Weights: their names in the original single file, and reading and writing them."""
