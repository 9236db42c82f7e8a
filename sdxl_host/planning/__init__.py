"""What a run would be, found without training it."""
