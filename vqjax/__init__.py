"""Learned vector compression, and search with compressed vectors, in JAX."""

__version__ = "0.1.0"
