"""Vectors come in: file formats, named data sets, batches."""
