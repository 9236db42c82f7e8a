"""What may be set: options, the sections of a config, and the classes that a config may name."""
