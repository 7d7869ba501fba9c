"""Semantic ids: codes of items made unique, and reported."""
