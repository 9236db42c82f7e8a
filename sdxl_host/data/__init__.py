"""Captioned images: from a folder to the arrays that a training step takes."""
