"""The file formats of weights, each read and written under the single file's names."""
