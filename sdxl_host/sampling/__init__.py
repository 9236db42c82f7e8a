"""Drawing pictures from a model."""
