"""How YAML, overrides and flags become one `RunConfig`."""
