"""The disk: files written whole or not at all, and arrays that stay in their files."""
