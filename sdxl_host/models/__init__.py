"""The networks of SDXL as MindSpore cells, under the names of the original single file."""
