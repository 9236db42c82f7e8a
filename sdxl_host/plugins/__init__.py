"""Plugins: found by their metadata, selected, checked, and called through the five hooks."""
