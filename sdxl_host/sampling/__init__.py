"""Drawing images from a model."""
