"""Codes to neighbours: indexes, re-ranking and how good they are."""
